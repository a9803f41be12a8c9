"""Requests made of documents, and the reader of RAGPulse's trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvcore.errors import SetupError
from kvctl.lab.config.workload_config import Documents
from kvctl.lab.traces.ragpulse_trace import TABLES, read
from kvctl.lab.traces.trace_profile import profile
from kvctl.lab.workload.document_requests import count_contents, requests

PASSAGE = '{"passage_id": 0, "token_length": 7}\n'
LENGTHS = {
    "1_sys_prompt": {5: 9, 6: 4},
    "2_passages": {0: 7, 1: 3},
    "3_history": {8: 2},
    "4_user_input": {9: 1},
    "5_web_search": {7: 6},
}


def line(at: int, **ids: list[int]) -> dict[str, object]:
    """Return a request of a trace."""
    return {
        "timestamp": str(at),
        "input_length": 0,
        "output_length": 3,
        "hash_ids": {kind: ids.get(kind, []) for kind in TABLES},
        "session_id": f"s{at}",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a small trace and return its folder."""
    for stem, key in TABLES.values():
        rows = [{key: i, "token_length": n} for i, n in LENGTHS[stem].items()]
        write(tmp_path / f"{stem}.jsonl", rows)
    trace = [
        line(20, sys_prompt=[5], passages_ids=[1, 0], user_input=[9]),
        line(10, sys_prompt=[5, 6], passages_ids=[0, 1], history=[8], web_search=[7]),
    ]
    write(tmp_path / "0_trace.jsonl", trace)
    return tmp_path


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_trace_is_ordered_by_time(folder: Path) -> None:
    """Contents have the prompt's order, and lengths from the tables of their kinds."""
    first, second = read(folder)
    assert (first.arrival_s, first.output_length, first.session_id) == (10.0, 3, "s10")
    assert [c.num_tokens for c in first.contents] == [9, 4, 7, 3, 2, 6]
    assert [c.num_tokens for c in second.contents] == [9, 3, 7, 1]
    assert second.contents[1].id == first.contents[3].id
    assert len({c.id for c in first.contents}) == 6


def test_equal_contents_have_equal_tokens_at_any_position(folder: Path) -> None:
    """Two prompts share only a passage, at different positions."""
    first, second = requests(Documents(trace=str(folder)), 0)
    one, two = first.tokens(1000), second.tokens(1000)
    assert (one.size, two.size) == (first.num_tokens, second.num_tokens) == (31, 20)
    passage = first.pieces[2]
    again = second.pieces[2]
    assert passage.content == again.content
    assert passage.start != again.start
    assert np.array_equal(one[13:20], two[12:19])
    assert not np.array_equal(one[13:16], two[9:12])


def test_reuse_of_a_trace_is_counted_in_contents(folder: Path) -> None:
    """Of ten contents one is reused as a prefix, three at any position."""
    counted = count_contents(Documents(trace=str(folder)), 0)
    assert (counted.num_asked, counted.num_prefix, counted.num_anywhere) == (10, 1, 3)
    found = profile(read(folder))
    assert (found.num_requests, found.num_sessions, found.span_s) == (2, 2, 10.0)
    assert (found.num_blocks, found.num_unique_blocks) == (10, 7)
    assert (found.ideal_hit_rate, found.anywhere_hit_rate) == (0.1, 0.3)
    assert (found.prompts.total, found.ideal_token_hit_rate) == (51, 9 / 51)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "2_passages.jsonl",
            '{"passage_id": 0, "token_length": 7}\n',
            "passages_ids 1",
        ),
        ("2_passages.jsonl", '{"id": 0}\n', "2_passages.jsonl:1: needs passage_id"),
        ("0_trace.jsonl", '{"timestamp": 1}\n', "0_trace.jsonl:1: "),
        ("0_trace.jsonl", None, r"no 0_trace\.jsonl; a RAGPulse trace has one"),
    ],
)
def test_errors_of_a_trace_are_located(
    folder: Path, name: str, text: str | None, says: str
) -> None:
    """The error has file, line and reason."""
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(SetupError, match=says):
        read(folder)


def test_generated_requests_repeat_documents_only() -> None:
    """A system prompt, unique glue, and documents in random order."""
    workload = Documents(num_requests=30, num_documents=6, documents_per_request=3)
    made = list(requests(workload, 1))
    assert [r.pieces for r in made] == [r.pieces for r in requests(workload, 1)]
    glue = [p.content for r in made for p in r.pieces if not p.is_document]
    assert len(set(glue)) == len(glue) == 30 * 4
    documents = [p for r in made for p in r.documents]
    assert len({p.content for p in documents}) == 7
    assert len({(p.content, p.num_tokens) for p in documents}) == 7
    orders = {tuple(p.content for p in r.documents) for r in made}
    assert len(orders) > 10
    assert {p.content for r in made for p in r.pieces}.isdisjoint(
        {p.content for r in requests(workload, 2) for p in r.pieces}
    )


def test_more_documents_per_request_than_exist_are_refused() -> None:
    """The error names the key."""
    with pytest.raises(SetupError, match=r"workload\.documents_per_request"):
        Documents(num_documents=2, documents_per_request=3)
