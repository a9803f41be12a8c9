"""Trace readers: all formats on small files, published figures on real traces."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest
import zstandard

from kvcore.errors import SetupError
from kvctl.lab.config.workload_config import Reuse, Trace
from kvctl.lab.traces import ragpulse_trace as ragpulse
from kvctl.lab.traces import trace_catalogue as catalogue
from kvctl.lab.traces import trace_reader as reader
from kvctl.lab.traces.trace_catalogue import PublicTrace
from kvctl.lab.traces.trace_profile import Profile, profile
from kvctl.lab.traces.trace_rows import TraceRow
from tests.cli.test_cli import run_in_process

TRACES = os.environ.get("KVCTL_TRACES")
NEEDS_TRACES = pytest.mark.skipif(
    TRACES is None, reason="KVCTL_TRACES does not name a folder of public traces"
)

BAILIAN = """\
{"chat_id":1,"parent_chat_id":-1,"timestamp":0.5,"input_length":40,"output_length":3,\
"type":"text","turn":1,"hash_ids":[18446744073709551615,2,3]}
{"chat_id":9,"parent_chat_id":-1,"timestamp":1,"input_length":16,"output_length":3,\
"type":"text","turn":1,"hash_ids":[7]}
{"chat_id":2,"parent_chat_id":1,"timestamp":2,"input_length":70,"output_length":4,\
"type":"text","turn":2,"hash_ids":[18446744073709551615,2,4,5,6]}
"""
WEKA = {
    "id": "s",
    "block_size": 64,
    "hash_id_scope": "local",
    "requests": [
        {"t": 0.0, "type": "n", "in": 100, "out": 5, "hash_ids": [1, 2]},
        {
            "t": 3.0,
            "type": "subagent",
            "agent_id": "a",
            "requests": [{"t": 1.0, "type": "s", "in": 64, "out": 1, "hash_ids": [9]}],
        },
        {"t": 8.0, "type": "s", "in": 200, "out": 7, "hash_ids": [1, 2, 3, 4]},
    ],
}
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.2299600,3180,8
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,0,230,1317,Conversation log
118,GPT-4,1087,276,1363,Conversation log
"""


def rows(path: Path, **more: object) -> list[TraceRow]:
    """Read a trace, detecting its format."""
    return list(reader.read(Trace(trace=str(path), **more)))  # type: ignore[arg-type]


def test_bailian_links_turns_to_sessions(tmp_path: Path) -> None:
    """A session is named after its first chat; ids keep all 64 bits."""
    path = tmp_path / "b.jsonl"
    path.write_text(BAILIAN)
    first, other, second = rows(path)
    assert (first.session_id, other.session_id, second.session_id) == ("1", "9", "1")
    assert int(first.hash_ids[0]) == 2**64 - 1
    assert (first.block_size, first.arrival_s, second.num_tokens) == (16, 0.5, 70)
    assert (first.tokens()[:32] == second.tokens()[:32]).all()
    assert (first.tokens()[32:] != second.tokens()[32:40]).any()


def test_local_ids_of_weka_sessions_are_distinct(tmp_path: Path) -> None:
    """Rows of sessions and subagents are ordered by time; local ids are distinct."""
    (tmp_path / "one.json").write_text(json.dumps(WEKA, indent=1))
    (tmp_path / "two.json").write_text(json.dumps(WEKA | {"id": "t"}))
    found = rows(tmp_path)
    assert [row.arrival_s for row in found] == [0, 0, 4, 4, 8, 8]
    assert [row.session_id for row in found] == ["s", "t", "s/a", "t/a", "s", "t"]
    assert not set(found[0].hash_ids.tolist()) & set(found[1].hash_ids.tolist())
    assert found[0].hash_ids.tolist() == found[4].hash_ids.tolist()[:2]
    alone = rows(tmp_path / "one.json")
    assert [row.num_tokens for row in alone] == [100, 64, 200]


@pytest.mark.parametrize(
    ("text", "times", "lengths"),
    [(AZURE, [0, 0.25], [4808, 3180]), (BURSTGPT, [0, 113], [472, 1087])],
)
def test_csv_of_lengths_gets_its_reuse_from_a_generator(
    tmp_path: Path, text: str, times: list[float], lengths: list[int]
) -> None:
    """Times count from the first line; prompts share the system prompt."""
    path = tmp_path / "t.csv"
    path.write_text(text)
    found = rows(path, reuse=Reuse(share=0.0, system_tokens=128))
    assert [row.arrival_s for row in found] == pytest.approx(times)
    assert [row.num_tokens for row in found] == lengths
    first, second = (row.tokens() for row in found)
    assert (first[:128] == second[:128]).all()
    assert (first[128:192] != second[128:192]).any()


def test_a_prompt_continues_an_earlier_one(tmp_path: Path) -> None:
    """With `share` 1, each longer prompt begins with the previous one."""
    path = tmp_path / "t.csv"
    lines = [f"{number},m,{1000 + 500 * number},1,1,x" for number in range(5)]
    path.write_text(BURSTGPT.splitlines()[0] + "\n" + "\n".join(lines) + "\n")
    found = rows(path, reuse=Reuse(share=1.0))
    assert len({row.session_id for row in found}) == 1
    for earlier, later in pairwise(found):
        whole = earlier.num_tokens - earlier.num_tokens % 64
        assert (earlier.tokens()[:whole] == later.tokens()[:whole]).all()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("b.jsonl", BAILIAN + '{"chat_id":3}\n', r"b\.jsonl:4: .*input_length"),
        ("b.jsonl", BAILIAN.replace('"input_length":16', '"input_length":99'), ":2: "),
        ("a.csv", AZURE + "2023-11-16 18:17:05.0,x,1\n", r"a\.csv:4: .*'x'"),
        ("a.csv", AZURE + "2023-11-16\n", r"a\.csv:4: 1 columns"),
        ("a.csv", AZURE.replace("Gen", "Ben"), r"a\.csv:1: the header lacks"),
        ("w.json", '{"requests": [{"t": "x"}], "id": "s"}', r"w\.json: .*`float`"),
        ("n.txt", "nothing\n", "no known trace format"),
        ("n.txt", "", r"n\.txt: empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    """The error has file, line and reason."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SetupError, match=says):
        rows(path)


def test_a_wrong_header_is_shortened_in_the_error(tmp_path: Path) -> None:
    """A line of another format may have a megabyte."""
    path = tmp_path / "a.csv"
    path.write_text("x" * 10_000)
    with pytest.raises(SetupError, match=r":1: the header lacks TIMESTAMP") as raised:
        rows(path, format="azure")
    assert len(raised.value.message) < 300


def test_a_ragpulse_file_stands_for_its_folder(tmp_path: Path) -> None:
    """The tables of lengths are in the same folder."""
    for stem, key in ragpulse.TABLES.values():
        (tmp_path / f"{stem}.jsonl").write_text(f'{{"{key}":1,"token_length":9}}\n')
    path = tmp_path / "0_trace.jsonl"
    path.write_text(
        '{"timestamp":"1","hash_ids":{"passages_ids":[1]},"session_id":"s"}\n'
    )
    assert reader.detect(path) == "ragpulse"
    assert ragpulse.read(path) == ragpulse.read(tmp_path)


def test_a_profile_counts_hits_of_an_infinite_cache(tmp_path: Path) -> None:
    """Of nine blocks seven are unique: two hits."""
    path = tmp_path / "b.jsonl"
    path.write_text(BAILIAN)
    found = profile(rows(path))
    assert (found.num_requests, found.num_sessions, found.span_s) == (3, 2, 1.5)
    assert (found.num_blocks, found.num_unique_blocks) == (9, 7)
    assert found.ideal_hit_rate == pytest.approx(2 / 9)
    assert found.ideal_token_hit_rate == pytest.approx(32 / 126)
    assert found.prompts.longest == 70


def test_a_fetched_trace_is_checked(tmp_path: Path) -> None:
    """A file with another sha256 is deleted."""

    def fetcher(url: str) -> BinaryIO:
        return io.BytesIO(url.encode())

    sha256 = "4a1da5e58a4ba5c67ae05b4e2b3ca87b1aba4d3ebfaf1fc7ee8cbfdcf0b6e2b2"
    wrong = PublicTrace("t", "mooncake", "x://t.jsonl", "s", "l", "a", 1, sha256)
    with pytest.raises(SetupError, match="has changed"):
        catalogue.fetch(wrong, tmp_path, fetcher)
    assert list(tmp_path.iterdir()) == []
    free = PublicTrace("t", "mooncake", "x://t.jsonl", "s", "l", "a")
    assert catalogue.fetch(free, tmp_path, fetcher).read_bytes() == b"x://t.jsonl"


class Files(SimpleHTTPRequestHandler):
    """A silent HTTP server of one folder; truncates files named `half`."""

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Log nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file, or its first half."""
        whole = source.read()
        outputfile.write(whole[: len(whole) // (2 if "half" in self.path else 1)])


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Start an HTTP server of `tmp_path`/served and yield its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name in ("whole.jsonl", "half.jsonl"):
        (folder / name).write_text("x" * 5_000_000)
    handler = partial(Files, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def entry(url: str, sha256: str | None) -> PublicTrace:
    """Return a catalogue entry for a URL."""
    return PublicTrace("t", "mooncake", url, "s", "l", "a", 5_000_000, sha256)


def test_a_trace_is_fetched_over_http(tmp_path: Path, address: str) -> None:
    """A file with the sha256 is kept and not fetched again; any other is refused."""
    into, right = tmp_path / "into", hashlib.sha256(b"x" * 5_000_000).hexdigest()
    path = catalogue.fetch(entry(f"{address}/whole.jsonl", right), into)
    assert catalogue.sha256_of(path) == right
    assert catalogue.fetch(entry("http://127.0.0.1:9/gone.jsonl", right), into) == path
    path.unlink()
    with pytest.raises(SetupError, match="has changed: 5000000 bytes"):
        catalogue.fetch(entry(f"{address}/whole.jsonl", "0" * 64), into)
    assert list(into.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"), [("half.jsonl", "ended early"), ("none.jsonl", "not found")]
)
def test_a_truncated_download_is_an_error(
    tmp_path: Path, address: str, name: str, says: str
) -> None:
    """Without a known sha256 as well, no file remains; the error has the reason."""
    with pytest.raises(SetupError, match=says):
        catalogue.fetch(entry(f"{address}/{name}", None), tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []


def test_the_list_names_source_licence_size_and_sha256() -> None:
    """Checksums are not shortened; missing ones are listed as unknown."""
    done = run_in_process("bench", "traces")
    assert done.returncode == 0, done.stderr
    for one in catalogue.CATALOGUE:
        assert one.name in done.stdout
        assert one.source in done.stdout
        assert (one.sha256 or "unknown") in done.stdout
    wrong = run_in_process("bench", "traces", "nonsense")
    assert wrong.returncode == 2
    assert "no trace 'nonsense'" in wrong.stderr


def test_an_unreachable_host_is_reported(tmp_path: Path) -> None:
    """The error has the trace, its URL and the reason."""

    def fetcher(url: str) -> BinaryIO:
        raise OSError(f"no way to {url}")

    with pytest.raises(SetupError, match=r"azure-code: https.*no way"):
        catalogue.fetch(catalogue.find("azure-code")[0], tmp_path, fetcher)


@NEEDS_TRACES
def test_catalogued_checksums_match_the_files() -> None:
    """Checks every catalogued file that is present."""
    sums = {}
    for path in Path(str(TRACES)).rglob("*.zst"):
        with zstandard.open(path, "rb") as file:
            data = file.read()
        sums[hashlib.sha256(data).hexdigest()] = len(data)
    known = [one for one in catalogue.CATALOGUE if one.sha256]
    assert len(known) >= 10
    assert {one.sha256: one.num_bytes for one in known}.items() <= sums.items()


def published(name: str) -> Profile:
    """Return the profile of a public trace."""
    return profile(rows(Path(str(TRACES)) / name))


@NEEDS_TRACES
@pytest.mark.parametrize(
    ("name", "num_requests", "span_s", "unique", "ideal"),
    [
        ("mooncake_conversation.jsonl.zst", 12_031, 3_537, 182_790, 0.366),
        ("mooncake_synthetic.jsonl.zst", 3_993, 1_022, None, 0.640),
        ("weka_60sessions.jsonl.zst", 2_938, 20.8 * 3600, None, 0.961),
        ("azure/AzureLLMInferenceTrace_code.csv.zst", 8_819, None, None, None),
        ("azure/AzureLLMInferenceTrace_conv.csv.zst", 19_366, None, None, None),
    ],
)
def test_public_traces_have_the_published_figures(
    name: str,
    num_requests: int,
    span_s: float | None,
    unique: int | None,
    ideal: float | None,
) -> None:
    """Requests, span, unique blocks and the ideal hit rate."""
    found = published(name)
    assert found.num_requests == num_requests
    assert span_s is None or found.span_s == pytest.approx(span_s, rel=0.01)
    assert unique is None or found.num_unique_blocks == unique
    assert ideal is None or found.ideal_hit_rate == pytest.approx(ideal, abs=0.0005)


@NEEDS_TRACES
def test_the_conversation_trace_has_the_published_lengths() -> None:
    """145 M tokens, a median of 6,909, up to 28 requests with one timestamp."""
    found = published("mooncake_conversation.jsonl.zst")
    assert round(found.prompts.total / 1e6) == 145
    assert (found.prompts.p50, found.most_at_once) == (6_909, 28)
    assert found.prompts.p99 == pytest.approx(85_400, rel=0.001)


@NEEDS_TRACES
def test_ragpulse_repeats_contents_at_any_position() -> None:
    """7,106 requests: 0.18 of contents repeat in prefixes, 0.69 at any position."""
    done = run_in_process("inspect", "trace", f"{TRACES}/ragpulse", "--json")
    found = msgspec.json.decode(done.stdout, type=Profile)
    assert (found.num_requests, round(found.span_s / 3600)) == (7_106, 168)
    assert found.ideal_hit_rate == pytest.approx(0.180, abs=0.0005)
    assert found.anywhere_hit_rate == pytest.approx(0.694, abs=0.0005)
    assert (
        "known at any position"
        in run_in_process("inspect", "trace", f"{TRACES}/ragpulse").stdout
    )
