"""The plots of a page: latency distributions, time series, sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from kvctl.console import duration
from kvctl.lab.page import svg
from kvctl.lab.page.svg import Axis, Line, Tick
from kvctl.lab.report.load_report_tables import fault_name
from kvctl.lab.report.result_collection import RunGroup, list_operations
from kvctl.lab.results.time_series import LatencyPoint, Series, SeriesPoint

SHARES = (
    0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97,
    0.98, 0.99, 0.995, 0.998, 0.999, 0.9999,
)  # fmt: skip
"""Quantiles at which a distribution is drawn."""
MARKED = (0.5, 0.9, 0.99, 0.999)


PointValue = Callable[[Series, SeriesPoint], float | None]


def figure(title: str, unit: str, drawn: str) -> str:
    """Return a plot under its title."""
    caption = f"{escape(title)} <span>{escape(unit)}</span>"
    return f'<figure class="plot"><figcaption>{caption}</figcaption>{drawn}</figure>'


# -- distributions ----------------------------------------------------------------


def distributions(sides: Sequence[RunGroup]) -> Iterator[str]:
    """Yield a latency plot per operation, over -log10(1 - quantile)."""
    for name in list_operations(sides):
        drawn = [_distribution(side, name) for side in sides]
        lines = [line for line in drawn if line.points]
        if not lines:
            continue
        values = [point.y for line in lines for point in line.points]
        y = svg.logarithmic(values, duration)
        yield figure(name, "", svg.lines(f"latency of {name}", lines, _nines(lines), y))


def _distribution(side: RunGroup, name: str) -> Line:
    histogram = side.histograms.get(name)
    if histogram is None or not histogram.values:
        return Line(side.label, (), side.place)
    shares = [share for share in SHARES if histogram.count * (1 - share) >= 1]
    points = [
        svg.Point(_nine(share), seconds, f"{side.label}, p{share * 100:g}: {text}")
        for share, seconds in zip(shares, histogram.quantiles_s(shares), strict=True)
        if (text := duration(seconds))
    ]
    return Line(side.label, points, side.place)


def _nine(share: float) -> float:
    return -math.log10(1 - share)


def _nines(lines: Sequence[Line]) -> Axis:
    high = max(point.x for line in lines for point in line.points)
    ticks = [Tick(_nine(share), f"p{share * 100:g}") for share in MARKED]
    return Axis(0.0, high, [tick for tick in ticks if tick.value <= high * 1.02])


# -- over time --------------------------------------------------------------------


def over_time(sides: Sequence[RunGroup]) -> Iterator[str]:
    """Yield plots of throughput, hit rate, latency and bytes of each median run."""
    courses = [
        (side, series)
        for side in sides
        if (series := side.median_run.series) and len(series.points) > 1
    ]
    if not courses:
        return
    end = max(series.points[-1].end_s for _, series in courses)
    x = svg.linear([end], lambda value: f"{value:g} s")
    x = Axis(0.0, end, [tick for tick in x.ticks if tick.value <= end])

    bands = [band for side, _ in courses for band in _faults(side)]

    def plot(
        title: str,
        unit: str,
        value: PointValue,
        write: Callable[[float], str],
        *,
        top: float | None = None,
        bounds: Sequence[Line] = (),
    ) -> str:
        lines = [
            Line(
                side.label,
                [
                    svg.Point(point.end_s, found, f"{side.label}: {write(found)}")
                    for point in series.points
                    if (found := value(series, point)) is not None
                ],
                side.place,
                reach=1.5 * series.width_s,
            )
            for side, series in courses
        ]
        values = [point.y for line in lines for point in line.points]
        y = svg.linear([top] if top else values, write)
        drawn = svg.lines(title, [*lines, *bounds], x, y, bands)
        return figure(title, unit, drawn)

    yield plot("Requests", "per second", _rate("requests"), _short)
    ideal = [
        Line(
            f"{side.label}, infinite cache",
            [svg.Point(0, rate), svg.Point(end, rate)],
            side.place,
            dashed=True,
        )
        for side, _ in courses[:1]
        if (rate := side.median_run.hit_rates.ideal_by_token)
    ]
    yield plot(
        "Hit rate",
        "of tokens; dashed: an infinite cache, over the whole run",
        _token_share("tokens_hit"), "{:.0%}".format, top=1.0, bounds=ideal,
    )  # fmt: skip
    if any(side.median_run.tiers for side, _ in courses):
        yield plot(
            "Hit rate of tiers", "of tokens",
            _token_share("tokens_from_tiers"), "{:.0%}".format, top=1.0,
        )  # fmt: skip
    if any("request" in point.operations for _, s in courses for point in s.points):
        yield plot("Request, p50", "", _request(lambda one: one.p50_s), duration)
        yield plot("Request, p99", "", _request(lambda one: one.p99_s), duration)
    yield plot("Retrieved", "GB/s", _rate("retrieve_bytes", 1e9), _short)
    yield plot("Stored", "GB/s", _rate("store_bytes", 1e9), _short)


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _rate(name: str, unit: float = 1.0) -> PointValue:
    def value(series: Series, point: SeriesPoint) -> float:
        return point.counts.get(name, 0) / series.width_s / unit

    return value


def _token_share(name: str) -> PointValue:
    def value(series: Series, point: SeriesPoint) -> float | None:
        del series
        tokens = point.counts.get("tokens", 0)
        return point.counts.get(name, 0) / tokens if tokens else None

    return value


def _request(percentile: Callable[[LatencyPoint], float]) -> PointValue:
    def value(series: Series, point: SeriesPoint) -> float | None:
        del series
        latency = point.operations.get("request")
        return percentile(latency) if latency else None

    return value


def _faults(side: RunGroup) -> Iterator[svg.Band]:
    """Yield the spans from each fault until recovery."""
    load = side.median_run.load
    for one in load.faults if load else ():
        lasted = one.recovered_s or one.back_s or one.fault.for_s
        label = f"{fault_name(one.fault)}, recovered after {duration(lasted)}"
        yield svg.Band(one.struck_s, one.struck_s + lasted, label)


# -- sweeps -----------------------------------------------------------------------


def sweep(side: RunGroup) -> str:
    """Return a plot of request latency by offered rate."""
    load = side.median_run.load
    taken = {step.rate: step.request for step in load.steps} if load else {}
    known = {rate: latency for rate, latency in taken.items() if latency}
    if len(known) < 2:
        return ""
    lines = [
        Line(name, [_at_rate(rate, name, seconds) for rate, seconds in points], place)
        for place, (name, points) in enumerate(
            (
                ("p50", [(rate, one.p50_s) for rate, one in known.items()]),
                ("p99", [(rate, one.p99_s) for rate, one in known.items()]),
            )
        )
    ]
    x = svg.logarithmic(list(known), _short)
    y = svg.logarithmic([point.y for line in lines for point in line.points], duration)
    drawn = svg.lines("latency of requests by rate", lines, x, y)
    return figure("Request, p50 and p99", "upper line; by offered requests/s", drawn)


def _at_rate(rate: float, name: str, seconds: float) -> svg.Point:
    label = f"{rate:,.0f} requests/s: {name} {duration(seconds)}"
    return svg.Point(rate, seconds, label)
