"""Time series of a run: points of equal width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from kvctl.lab.latency import Histogram, LatencySamples, Window

WIDTH_S = 0.5
MAX_POINTS = 240
"""Limit of a page's plots; longer runs get wider points."""
SHOWN = ("request", "lookup", "store", "retrieve", "ttft")
"""Operations of a time series."""


class LatencyPoint(msgspec.Struct, frozen=True):
    """Latency of the calls of one operation that ended in the span of a point."""

    count: int
    p50_s: float
    p99_s: float


class SeriesPoint(msgspec.Struct, frozen=True):
    """Counts and latencies of calls that ended in a span, over all engines."""

    end_s: Annotated[float, Meta(description="since the start of the first point")]
    counts: Annotated[dict[str, int], Meta(description="as in `counts` of the result")]
    operations: dict[str, LatencyPoint]


class Series(msgspec.Struct, frozen=True):
    """Consecutive points of equal width."""

    width_s: float
    points: tuple[SeriesPoint, ...]


def build_series(samples: LatencySamples, begun_s: float) -> Series:
    """Merge windows into points; `begun_s` is on the host's monotonic clock."""
    last = max((window.end_s for window in samples.windows), default=begun_s)
    width = WIDTH_S
    while (last - begun_s) / width > MAX_POINTS:
        width *= 2
    by_place: dict[int, list[Window]] = {}
    for window in samples.windows:
        # A window is as wide as a point and ends shortly after it.
        place = max(0, round((window.end_s - begun_s) / width) - 1)
        by_place.setdefault(place, []).append(window)
    count = max(by_place, default=-1) + 1
    points = (
        _point((place + 1) * width, by_place.get(place, ())) for place in range(count)
    )
    return Series(width, tuple(points))


def _point(end_s: float, windows: Iterable[Window]) -> SeriesPoint:
    counts: dict[str, int] = {}
    parts: dict[str, list[Histogram]] = {}
    for window in windows:
        for name, count in window.counts.items():
            counts[name] = counts.get(name, 0) + count
        for name, histogram in window.durations.items():
            parts.setdefault(name, []).append(histogram)
    latencies = {
        name: _latency(Histogram.merge(parts[name])) for name in SHOWN if name in parts
    }
    return SeriesPoint(end_s, counts, latencies)


def _latency(histogram: Histogram) -> LatencyPoint:
    p50, p99 = histogram.quantiles_s((0.5, 0.99))
    return LatencyPoint(histogram.count, p50, p99)
