"""Counts, errors and chunk heads of an engine."""

from __future__ import annotations

import pytest

from kvctl.lab.engine.engine_statistics import EngineStatistics
from kvctl.lab.process_messages import Tally


def test_counts_add_up() -> None:
    """Errors count one each; a chunk that is requested twice counts once."""
    statistics = EngineStatistics()
    statistics.add(Tally(requests=1, chunks=2), {"lookup": 0.5}, [b"a" * 8, b"b" * 8])
    statistics.add(Tally(requests=1, chunks=1), {"lookup": 0.25}, [b"a" * 8], ["lost"])
    report = statistics.report()
    tally = report.tally
    assert (tally.requests, tally.chunks, tally.errors) == (2, 3, 1)
    assert len(report.chunk_heads) == 16
    assert report.errors == ("lost",)
    assert report.samples.summary()["lookup"].count == 2


def test_of_the_warm_up_only_errors_count() -> None:
    """Wrong bytes and errors count; requests and durations do not."""
    statistics = EngineStatistics()
    warm = Tally(requests=1, tokens=9, bytes_wrong=3)
    statistics.add(warm, {"lookup": 0.5}, [b"a" * 8], ["lost"], warm_up=True)
    report = statistics.report()
    tally = report.tally
    assert (tally.requests, tally.warm_ups, tally.tokens) == (0, 1, 0)
    assert (tally.bytes_wrong, tally.errors) == (3, 1)
    assert (report.chunk_heads, report.warm_heads) == (b"", b"a" * 8)
    assert report.samples.summary() == {}


@pytest.mark.parametrize("count", [9, 15])
def test_only_the_first_errors_are_reported(count: int) -> None:
    """All are counted, ten messages are reported."""
    statistics = EngineStatistics()
    for number in range(count):
        statistics.add(Tally(), {}, errors=[str(number)])
    assert statistics.tally().errors == count
    assert len(statistics.report().errors) == min(count, 10)
