"""Windows of several processes become points of one series."""

from __future__ import annotations

import numpy as np
import pytest

from kvctl.lab.latency import Histogram, LatencySamples, Window
from kvctl.lab.results.time_series import MAX_POINTS, build_series


def window(end_s: float, *lookups: float, **counts: int) -> Window:
    """Return the windows of one process up to this time."""
    return Window(end_s, {"lookup": Histogram.of(np.array(lookups))}, counts)


def test_windows_of_one_time_add_up() -> None:
    """Counts are summed, percentiles are those of all durations together."""
    ours = LatencySamples([window(100.5, 0.1, 0.1, requests=2)])
    theirs = LatencySamples(
        [window(100.6, 0.4, requests=1), window(101.0, 0.2, requests=1)]
    )
    found = build_series(LatencySamples.merge([ours, theirs]), 100.0)
    assert [point.end_s for point in found.points] == [0.5, 1.0]
    assert [point.counts["requests"] for point in found.points] == [3, 1]
    first = found.points[0].operations["lookup"]
    assert first.count == 3
    assert (first.p50_s, first.p99_s) == pytest.approx((0.1, 0.4), rel=1e-3)


def test_a_stall_is_an_empty_point() -> None:
    """A span in which no window ended is a point without calls."""
    found = build_series(LatencySamples([window(0.5, 1.0), window(1.51, 1.0)]), 0.0)
    assert [len(point.operations) for point in found.points] == [1, 0, 1]


def test_long_runs_have_wider_points() -> None:
    """The number of points is limited to those of a page."""
    windows = [window(second, 0.1) for second in range(1, 3600)]
    found = build_series(LatencySamples(windows), 0.0)
    assert len(found.points) <= MAX_POINTS
    assert sum(p.operations["lookup"].count for p in found.points) == 3599
    assert build_series(LatencySamples(), 0.0).points == ()
