"""The plots of a page: how long calls take, and how a run went over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from kvctl.console import duration
from kvctl.lab.page import svg
from kvctl.lab.page.run_group import RunGroup, operations
from kvctl.lab.page.svg import Axis, Line, Tick
from kvctl.lab.report.load_tables import fault_name
from kvctl.lab.results.time_series import Series, SeriesPoint

SHARES = (
    0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97,
    0.98, 0.99, 0.995, 0.998, 0.999, 0.9999,
)  # fmt: skip
"""Of calls, at which a distribution is drawn."""
MARKED = (0.5, 0.9, 0.99, 0.999)


def figure(title: str, unit: str, drawn: str) -> str:
    """Put a plot under its title."""
    caption = f"{escape(title)} <span>{escape(unit)}</span>"
    return f'<figure class="plot"><figcaption>{caption}</figcaption>{drawn}</figure>'


# -- distributions ----------------------------------------------------------------


def distributions(sides: Sequence[RunGroup]) -> Iterator[str]:
    """Draw how long the calls of each operation take, share by share.

    The horizontal axis gives each further nine of the calls as much room.
    """
    for name in operations(sides):
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
        svg.Point(_nine(share), seconds, f"{side.label}, p{share * 100:g}: {said}")
        for share, seconds in zip(shares, histogram.quantiles_s(shares), strict=True)
        if (said := duration(seconds))
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
    """Draw throughput, hit rate, latency and bytes moved, each side's typical run."""
    courses = [
        (side, series)
        for side in sides
        if (series := side.typical.series) and len(series.points) > 1
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
        value: Callable[[RunGroup, Series, SeriesPoint], float | None],
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
                    if (found := value(side, series, point)) is not None
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

    yield plot("Requests", "a second", _requests_per_s, _short)
    ideal = [
        Line(
            f"{side.label}, endless cache",
            [svg.Point(0, rate), svg.Point(end, rate)],
            side.place,
            dashed=True,
        )
        for side, _ in courses[:1]
        if (rate := side.typical.hit_rates.ideal_by_token)
    ]
    yield plot(
        "Hit rate",
        "of tokens; dashed: an endless cache, over the whole run",
        _hit_rate, "{:.0%}".format, top=1.0, bounds=ideal,
    )  # fmt: skip
    if any(side.typical.tiers for side, _ in courses):
        yield plot(
            "Hit rate of tiers", "of tokens, beneath memory",
            _tiers_rate, "{:.0%}".format, top=1.0,
        )  # fmt: skip
    if any("request" in point.operations for _, s in courses for point in s.points):
        yield plot("Request, p50", "", _median("request"), duration)
        yield plot("Request, p99", "", _tail("request"), duration)
    yield plot("Retrieved", "GB a second", _moved("retrieve_bytes"), _short)
    yield plot("Stored", "GB a second", _moved("store_bytes"), _short)


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _requests_per_s(side: RunGroup, series: Series, point: SeriesPoint) -> float:
    del side
    return point.counts.get("requests", 0) / series.width_s


def _hit_rate(side: RunGroup, series: Series, point: SeriesPoint) -> float | None:
    del side, series
    tokens = point.counts.get("tokens", 0)
    return point.counts.get("tokens_hit", 0) / tokens if tokens else None


def _tiers_rate(side: RunGroup, series: Series, point: SeriesPoint) -> float | None:
    del side, series
    tokens = point.counts.get("tokens", 0)
    return point.counts.get("tokens_from_tiers", 0) / tokens if tokens else None


def _faults(side: RunGroup) -> Iterator[svg.Band]:
    """Shade the time from each fault until it was over."""
    load = side.typical.load
    for one in load.faults if load else ():
        lasted = one.recovered_s or one.back_s or one.fault.for_s
        says = f"{fault_name(one.fault)}, over after {duration(lasted)}"
        yield svg.Band(one.struck_s, one.struck_s + lasted, says)


# -- sweeps -----------------------------------------------------------------------


def sweep(side: RunGroup) -> str:
    """Draw how long requests take, by the rate at which they are due."""
    load = side.typical.load
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
    return figure("Request, p50 and p99", "above it; by requests due a second", drawn)


def _at_rate(rate: float, name: str, seconds: float) -> svg.Point:
    says = f"{rate:,.0f} a second: {name} {duration(seconds)}"
    return svg.Point(rate, seconds, says)


def _median(name: str) -> Callable[[RunGroup, Series, SeriesPoint], float | None]:
    def value(side: RunGroup, series: Series, point: SeriesPoint) -> float | None:
        del side, series
        moment = point.operations.get(name)
        return moment.p50_s if moment else None

    return value


def _tail(name: str) -> Callable[[RunGroup, Series, SeriesPoint], float | None]:
    def value(side: RunGroup, series: Series, point: SeriesPoint) -> float | None:
        del side, series
        moment = point.operations.get(name)
        return moment.p99_s if moment else None

    return value


def _moved(name: str) -> Callable[[RunGroup, Series, SeriesPoint], float]:
    def value(side: RunGroup, series: Series, point: SeriesPoint) -> float:
        del side
        return point.counts.get(name, 0) / series.width_s / 1e9

    return value
