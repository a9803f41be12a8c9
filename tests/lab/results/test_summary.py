"""Results of fabricated reports: counts, rates, problems, and the saved file."""

from __future__ import annotations

from array import array
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from kvcore.errors import SetupError
from kvctl.console import Table
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.config.scenario import Limits, ModelConfig, Scenario
from kvctl.lab.config.workload_config import Chat
from kvctl.lab.latency import LatencySamples
from kvctl.lab.process_messages import EngineReport, Tally
from kvctl.lab.report import result_tables
from kvctl.lab.results.result import Result, read
from kvctl.lab.results.result_builder import summarise
from kvctl.lab.results.time_series import Series, SeriesPoint
from kvctl.lab.run.raw_measurements import RawMeasurements, TierBytes

SCENARIO = Scenario(ModelConfig("tiny-llama"), Chat())
CEILINGS = Ceilings(1 << 20, 4096, 1000, 10.0, 8.0, 0.0001, 0.0002)


def engine(*heads: bytes, **counts: int) -> EngineReport:
    """Return the report of an engine with two lookups and these chunks."""
    tally = Tally(
        requests=2,
        tokens=2560,
        chunks=10,
        store_bytes=10**9,
        store_s=0.5,
        copy_bytes=10**9,
        copy_s=0.1,
        **counts,
    )
    samples = LatencySamples.pack({"lookup": array("d", [0.0004, 0.0005])})
    return EngineReport(tally, samples, b"".join(head.ljust(8) for head in heads))


def measurements(
    *reports: EngineReport, limits: Limits | None = None
) -> RawMeasurements:
    """Return the measurements of a run of these engines."""
    scenario = replace(SCENARIO, limits=limits or Limits())
    return RawMeasurements(
        "planted", scenario, 0, elapsed_s=2.0, reports=list(reports), ceilings=CEILINGS
    )


def test_rates_beside_those_of_an_infinite_cache() -> None:
    """20 chunks, 5 unique: an infinite cache misses 5."""
    one = engine(b"a", b"b", b"c", chunks_hit=6, tokens_hit=1536)
    two = engine(b"c", b"d", b"e", chunks_hit=4, tokens_hit=1024)
    result = summarise(measurements(one, two))
    assert result.counts.chunks_hit_ideal == 15
    assert result.hit_rates.by_block == 0.5
    assert result.hit_rates.ideal_by_block == 0.75
    assert result.hit_rates.by_token == 0.5
    assert result.problems == ()


def test_hits_are_split_between_memory_and_tiers() -> None:
    """Half of the tokens hit; half of these were loaded, 3 to 1 from two tiers."""
    found = measurements(engine(b"a", tokens_hit=1280, tokens_from_tiers=640))
    assert summarise(found).tiers == ()
    found.tier_bytes = [TierBytes("file", 3000), TierBytes("s3", 1000)]
    result = summarise(found)
    assert {one.name: one.hit_rate for one in result.tiers} == {
        "L1": 0.25,
        "tier 1: file": 0.1875,
        "tier 2: s3": 0.0625,
    }
    assert "from tier 1: file 0.188 (2.9 KiB loaded)" in rendered(result)


def test_a_long_run_shows_its_first_and_last_tenth() -> None:
    """Twenty points: means of the first two and the last two; memory too."""
    points = tuple(
        SeriesPoint(
            0.5 * (at + 1), {"requests": at, "tokens": 10, "tokens_hit": at // 2}, {}
        )
        for at in range(20)
    )
    found = measurements(engine(b"a"))
    found.server_bytes = (30 << 20, 31 << 20)
    text = rendered(replace(summarise(found), series=Series(0.5, points)))
    assert "▇██ 1 37 38" in text, text
    assert "0.000 0.900 0.900" in text
    assert "30.0 MiB, after the load 31.0 MiB" in text


def test_throughput_and_shares_follow_from_the_ceilings() -> None:
    """1 GB in half a second is 2 GB/s, a fifth of the 10 GB/s of plain copies."""
    result = summarise(measurements(engine(b"a")))
    assert result.throughput.store_gb_per_s == 2.0
    assert result.throughput.retrieve_gb_per_s is None
    assert result.shares.store == 0.2
    assert result.shares.lookup == pytest.approx(0.5, rel=1e-3)
    assert result.throughput.requests_per_s == 1.0


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"bytes_wrong": 3}, "3 bytes were wrong"),
        ({"errors": 2}, "2 errors, limits.max_errors is 0"),
    ],
)
def test_wrong_bytes_and_errors_are_problems(counts: dict[str, int], says: str) -> None:
    """Each is a reason for exit code 1."""
    result = summarise(measurements(engine(b"a", **counts)))
    assert result.problems == (says,)


def test_leaks_failures_and_missed_limits_are_problems() -> None:
    """Failed processes, leaked leases and missed limits of the scenario."""
    found = measurements(engine(b"a", b"b"), limits=Limits(min_hit_rate=0.5))
    found.leases_leaked = 1
    leaked, missed = summarise(found).problems
    assert "1 leases left" in leaked
    assert "min_hit_rate is 0.5" in missed
    found.failures.append("rank 0 of engine 0 ended with exit code -9")
    result = summarise(found)
    assert result.counts.errors == 1
    assert any("exit code -9" in problem for problem in result.problems)


@pytest.mark.parametrize("failure", [None, "the server ended early"])
def test_an_incomplete_run_has_no_minimum_hit_rate(failure: str | None) -> None:
    """Interrupted, or stopped by a failure."""
    found = measurements(engine(b"a"), limits=Limits(min_share_of_ideal=0.9))
    found.interrupted = failure is None
    found.failures += [failure] if failure else []
    assert not any("min_share" in problem for problem in summarise(found).problems)


def test_a_run_without_requests_is_a_problem() -> None:
    """Without reports the rates are 0 and a problem is listed."""
    assert summarise(measurements()).problems == ("no request was made",)


def test_a_result_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    """A saved result reads back equal; counts have their documented keys."""
    result = summarise(measurements(engine(b"a", chunks_hit=9)))
    path = result.save(tmp_path / "new")
    assert read(path) == result
    counts = msgspec.json.decode(path.read_bytes())["counts"]
    assert {"requests", "errors", "bytes_wrong", "leases_leaked"} <= counts.keys()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a result"),
        ('{"version": 99}', "version 99; this kvctl reads 1"),
        ('{"version": 1}', "not a result: .*missing required"),
    ],
)
def test_an_invalid_file_is_reported_with_its_reason(
    tmp_path: Path, text: str, says: str
) -> None:
    """Invalid JSON, another version, or missing fields."""
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(SetupError, match=rf"r\.json: .*{says}"):
        read(path)


def rendered(result: Result) -> str:
    """Return the text of a result's tables."""
    texts = []
    for part in result_tables.build_tables(result):
        rows = part.rows if isinstance(part, Table) else ((part,),)
        texts += [cell for row in rows for cell in row]
    return " ".join(texts)


def test_the_tables_show_what_was_measured() -> None:
    """Counts, rates beside the ideal, latencies with units, shares, problems."""
    text = rendered(summarise(measurements(engine(b"a", bytes_wrong=7))))
    for shown in ("bytes wrong 7", "400 us", "20%", "problem: 7 bytes were wrong"):
        assert shown in text
