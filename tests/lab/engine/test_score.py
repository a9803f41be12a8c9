"""What slots count together."""

from __future__ import annotations

import pytest

from kvctl.lab.engine.engine_statistics import EngineStatistics
from kvctl.lab.process_messages import Tally


def test_the_score_adds_up() -> None:
    """Counts add, errors count one each, a chunk asked for twice is one."""
    score = EngineStatistics()
    score.add(Tally(requests=1, chunks=2), {"lookup": 0.5}, [b"a" * 8, b"b" * 8])
    score.add(Tally(requests=1, chunks=1), {"lookup": 0.25}, [b"a" * 8], ["lost"])
    report = score.report()
    tally = report.tally
    assert (tally.requests, tally.chunks, tally.errors) == (2, 3, 1)
    assert len(report.chunk_heads) == 16
    assert report.errors == ("lost",)
    assert report.samples.summary()["lookup"].count == 2


def test_a_warm_up_counts_nothing_but_trouble() -> None:
    """Wrong bytes and errors count, requests and durations do not."""
    score = EngineStatistics()
    warm = Tally(requests=1, tokens=9, bytes_wrong=3)
    score.add(warm, {"lookup": 0.5}, [b"a" * 8], ["lost"], warm_up=True)
    report = score.report()
    tally = report.tally
    assert (tally.requests, tally.warm_ups, tally.tokens) == (0, 1, 0)
    assert (tally.bytes_wrong, tally.errors) == (3, 1)
    assert (report.chunk_heads, report.warm_heads) == (b"", b"a" * 8)
    assert report.samples.summary() == {}


@pytest.mark.parametrize("count", [9, 15])
def test_only_the_first_errors_are_told(count: int) -> None:
    """All are counted, ten are told."""
    score = EngineStatistics()
    for number in range(count):
        score.add(Tally(), {}, errors=[str(number)])
    assert score.tally().errors == count
    assert len(score.report().errors) == min(count, 10)
