"""Simulated hosts: one server each, and hits on chunks that other hosts stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from kvcore.errors import SetupError
from kvctl.lab.config.scenario import Scenario, read
from kvctl.lab.latency import LatencySamples
from kvctl.lab.process_messages import EngineReport, Tally
from kvctl.lab.report import result_tables
from kvctl.lab.results.result_builder import report_hosts
from kvctl.lab.runner import run

SCENARIO = """\
hosts = 2
engines = 2
cache_blocks = 64
[model]
preset = "tiny-llama"
block_size = 16
[server]
chunk_size = 32
l1.size = "8MiB"
l1.page = "4KiB"
[workload]
kind = "uniform"
num_requests = 24
num_prompts = 4
prompt_tokens = 128
[load]
concurrency = 1
"""


def scenario(folder: Path, *settings: str) -> Scenario:
    """Two hosts with an engine each."""
    path = folder / "hosts.toml"
    path.write_text(SCENARIO)
    return read(path, settings)


def report(host: int, hit: int, heads: list[int]) -> EngineReport:
    """Return the report of an engine that looked up ten chunks."""
    packed = b"".join(head.to_bytes(8, "big") for head in heads)
    return EngineReport(
        Tally(chunks=10, chunks_hit=hit), LatencySamples(), packed, host=host
    )


def test_hits_beyond_an_infinite_own_cache_are_from_others() -> None:
    """Ten chunks with four unique ones: six hits need no other host."""
    reports = [report(0, 6, [1, 2, 3, 4]), report(1, 9, [1, 2, 3, 4])]
    own, other = report_hosts(reports, [{}, {"bytes_prefetched": 7}])
    assert (own.chunks_hit_alone, own.chunks_hit_from_others) == (6, 0)
    assert (other.chunks_hit_alone, other.chunks_hit_from_others) == (6, 3)
    assert (own.tier_bytes, other.tier_bytes) == (0, 7)


def test_warm_up_chunks_of_a_host_are_its_own() -> None:
    """Chunks of a host's warm-up can be hit without other hosts."""
    reports = [
        replace(report(0, 10, [1, 2]), warm_heads=(1).to_bytes(8, "big")),
        report(1, 10, [1, 2]),
    ]
    own, other = report_hosts(reports, [{}, {}])
    assert (own.chunks_hit_from_others, other.chunks_hit_from_others) == (1, 2)


def test_hosts_share_nothing_without_a_tier(tmp_path: Path) -> None:
    """Each engine uses its own server and misses chunks of the other host."""
    result = run("hosts", scenario(tmp_path), 0, None)
    assert not result.problems
    first, second = result.hosts
    assert first.requests == second.requests == 12
    for host in result.hosts:
        assert 0 < host.chunks_hit == host.chunks_hit_alone
        assert (host.chunks_hit_from_others, host.tier_bytes) == (0, 0)
    assert result.counters["lookups"] == 24
    assert result.counts.chunks_hit < result.counts.chunks_hit_ideal
    tables = [
        one for one in result_tables.build_tables(result) if not isinstance(one, str)
    ]
    [table] = [one for one in tables if one.title == "hosts"]
    assert [row[:2] for row in table.rows] == [("0", "12"), ("1", "12")]


@pytest.mark.parametrize(
    ("settings", "address", "word"),
    [
        (["engines=1"], None, "hosts"),
        (["faults=[{at_s=1}]"], None, "hosts"),
        ([], "tcp://127.0.0.1:1", "hosts"),
    ],
)
def test_invalid_hosts_are_refused(
    tmp_path: Path, settings: list[str], address: str | None, word: str
) -> None:
    """More hosts than engines, faults, an external server."""
    with pytest.raises(SetupError, match=word):
        run("hosts", scenario(tmp_path, *settings), 0, address)
