"""Plots as inline SVG; the page's style sheet sets the colours of the classes.

Plots are about as wide as a phone's screen, so that text keeps its size there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
NUM_TICKS = 4


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a line, with its tooltip."""

    x: float
    y: float
    tooltip: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One line; `side` selects its colour, and a dashed line is a bound."""

    label: str
    points: Sequence[Point]
    side: int = 0
    dashed: bool = False
    reach: float = math.inf
    """Points farther apart than this are not joined."""


@dataclass(frozen=True, slots=True)
class Band:
    """A shaded span of the x axis, with its tooltip."""

    start: float
    end: float
    tooltip: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A position on an axis and its label."""

    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values, its ticks, and its scale function."""

    low: float
    high: float
    ticks: Sequence[Tick]
    scale: Callable[[float], float] = field(default=float)

    def share(self, value: float) -> float:
        """Return the position of a value: 0 at the low end, 1 at the high end."""
        low, high = self.scale(self.low), self.scale(self.high)
        if high == low:
            return 0.5
        return min(1.0, max(0.0, (self.scale(value) - low) / (high - low)))


def linear(values: Sequence[float], write: Callable[[float], str]) -> Axis:
    """Return an axis from zero, with round ticks."""
    top = max(values, default=0.0) or 1.0
    step = _round_step(top / NUM_TICKS)
    count = math.ceil(top / step - 1e-9)
    above = [Tick(step * place, write(step * place)) for place in range(1, count + 1)]
    return Axis(0.0, step * count, [Tick(0.0, "0"), *above])


def _round_step(about: float) -> float:
    power = 10.0 ** math.floor(math.log10(about))
    return next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= about)


def logarithmic(values: Sequence[float], write: Callable[[float], str]) -> Axis:
    """Return a logarithmic axis with ticks at powers of ten.

    With fewer than two of these, 2 and 5 times each power have ticks as well.
    """
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.1, max(positive) * 1.1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [
        [one * 10.0**power for power in powers for one in ones]
        for ones in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
    ]
    seen = [[value for value in some if low <= value <= high] for some in places]
    chosen = next((some for some in seen if len(some) >= 2), seen[-1])
    return Axis(low, high, [Tick(value, write(value)) for value in chosen], math.log)


def lines(
    title: str, drawn: Sequence[Line], x: Axis, y: Axis, bands: Sequence[Band] = ()
) -> str:
    """Return lines over a grid of the y axis and over bands."""
    parts = [
        *(_band(band, x) for band in bands),
        *_grid(x, y),
        *(_line(line, x, y) for line in drawn),
    ]
    return _figure(title, "".join(parts))


def _band(band: Band, x: Axis) -> str:
    left, right = _at_x(x, band.start), _at_x(x, band.end)
    return (
        f'<rect class="band" x="{left:.1f}" width="{max(2.0, right - left):.1f}" '
        f'y="{TOP}" height="{HEIGHT - TOP - BOTTOM}">'
        f"<title>{escape(band.tooltip)}</title></rect>"
    )


def _figure(title: str, inner: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{inner}</svg>"
    )


def _at_x(x: Axis, value: float) -> float:
    return LEFT + x.share(value) * (WIDTH - LEFT - RIGHT)


def _at_y(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    for tick in y.ticks:
        at = _at_y(y, tick.value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" {_same_y(at)}/>'
        yield _text(LEFT - 6, at + 4, tick.text, "end")
    for tick in x.ticks:
        yield _text(_at_x(x, tick.value), HEIGHT - 8, tick.text, "middle")


def _same_y(at: float) -> str:
    return f'y1="{at:.1f}" y2="{at:.1f}"'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(line: Line, x: Axis, y: Axis) -> str:
    places = [(_at_x(x, one.x), _at_y(y, one.y), one.tooltip) for one in line.points]
    paths = [""]
    for number, (px, py, _) in enumerate(places):
        if number and line.points[number].x - line.points[number - 1].x > line.reach:
            paths.append("")
        paths[-1] += f"{px:.1f},{py:.1f} "
    drawn = "".join(f'<polyline points="{path.rstrip()}"/>' for path in paths)
    style = f"side{line.side}" + (" dashed" if line.dashed else "")
    dots = "".join(
        f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="5">'
        f"<title>{escape(tooltip)}</title></circle>"
        for px, py, tooltip in places
        if tooltip
    )
    return f'<g class="{style}">{drawn}{dots}</g>'


def interval(
    ratio: float, low: float | None, high: float | None, reach: float, style: str
) -> str:
    """Return an estimate between its bounds, from 1/`reach` to `reach`.

    Without bounds (too few runs), the interval spans the whole width.
    """
    width, height, middle = 220, 24, 12

    def at(value: float) -> float:
        bounded = min(max(value, 1 / reach), reach)
        return width / 2 * (1 + 0.96 * math.log(bounded) / math.log(reach))

    known = low is not None and high is not None
    tooltip = f"{low:.3f} to {high:.3f} times as long" if known else "too few runs"
    left, right = at(low or 1 / reach), at(high or reach)
    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{tooltip}"><title>{tooltip}</title>'
        f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>'
        f'<line class="grid" x1="0" x2="{width}" {_same_y(middle)}/>'
        f'<g class="{style}{"" if known else " unknown"}">'
        f'<line class="reach" x1="{left:.1f}" x2="{right:.1f}" {_same_y(middle)}/>'
        f'<circle cx="{at(ratio):.1f}" cy="{middle}" r="5"/></g></svg>'
    )
