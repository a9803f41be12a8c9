"""The sections of a page as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

import msgspec

from kvcore.option_structs import encode_hook
from kvctl.console import Table, duration
from kvctl.lab.compare.comparison import (
    Comparison,
    Count,
    CountVerdict,
    Timing,
    flatten,
)
from kvctl.lab.compare.significance import Verdict
from kvctl.lab.config.scenario import Scenario
from kvctl.lab.page import svg
from kvctl.lab.report.comparison_report import format_change, format_interval, words
from kvctl.lab.report.result_collection import RunGroup
from kvctl.lab.report.result_tables import list_ceiling_shares

SMALLEST_REACH = 1.25
"""The smallest range of an interval plot: 1/1.25 to 1.25 times the base."""
LARGEST_REACH = 4.0

VERDICT_STYLES = {
    Verdict.WORSE: ("worse", "bad", "▲ slower"),
    Verdict.BETTER: ("better", "good", "▼ faster"),
    Verdict.SAME: ("same", "", "= same"),
    Verdict.CANNOT_TELL: ("unsure", "warn", "? cannot tell"),
}
COUNT_STYLES = {
    CountVerdict.WORSE: "bad",
    CountVerdict.BETTER: "good",
    CountVerdict.DIFFERS: "warn",
    CountVerdict.VARIES: "",
    CountVerdict.SAME: "",
}


def section(title: str, note: str, *inner: str) -> str:
    """Return HTML under a heading; empty without any."""
    body = "".join(inner)
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>" if body else ""


def _box(style: str, rows: str, heads: str = "") -> str:
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    return (
        f'<div class="box"><table class="{style}">{head}<tbody>{rows}</tbody></table>'
        "</div>"
    )


def chip(text: str, style: str = "") -> str:
    """Return a word in a box."""
    return f'<span class="chip {style}">{escape(text)}</span>'


def legend(sides: Sequence[RunGroup]) -> str:
    """Return the legend of colours; empty for one side."""
    if len(sides) < 2:
        return ""
    items = (
        f'<span><i class="side{side.place}"></i>{escape(side.label)}</span>'
        for side in sides
    )
    return f'<div class="legend">{"".join(items)}</div>'


# -- figures ----------------------------------------------------------------------


def tiles(sides: Sequence[RunGroup]) -> str:
    """Return the main figures."""
    results = [side.median_run for side in sides]
    rates = [
        ("requests/s", [f"{r.throughput.requests_per_s:,.3g}" for r in results]),
        ("tokens from the cache", [f"{r.hit_rates.by_token:.1%}" for r in results]),
        (
            "wrong bytes, errors",
            [f"{r.counts.bytes_wrong:,}, {r.counts.errors:,}" for r in results],
        ),
    ]
    more = {
        "tokens from the cache": "infinite cache: "
        f"{results[0].hit_rates.ideal_by_token:.1%}",
        "wrong bytes, errors": (
            f"in {results[0].counts.retrieved_bytes / 1e9:,.2f} GB, "
            f"{results[0].counts.requests:,} requests"
        ),
    }
    shown = [_tile(name, values, more.get(name, "")) for name, values in rates]
    shown[2:2] = [
        _tile(
            f"{name}, p50",
            [duration(result.operations[name].p50_s) for result in results],
            "p99 " + ", ".join(duration(r.operations[name].p99_s) for r in results),
        )
        for name in ("ttft", "request", "lookup", "retrieve")
        if all(name in result.operations for result in results)
    ]
    return f'<div class="tiles">{"".join(shown)}</div>'


def _tile(name: str, values: Sequence[str], more: str) -> str:
    marks = [f'<i class="side{place}"></i>' for place in range(len(values))]
    marks = [""] if len(set(values)) == 1 else marks
    lines = "".join(
        f'<div class="value">{mark}{escape(value)}</div>'
        for mark, value in zip(marks, values[: len(marks)], strict=True)
    )
    detail = f'<div class="more">{escape(more)}</div>' if more else ""
    head = f'<div class="name">{escape(name)}</div>'
    return f'<div class="tile">{head}{lines}{detail}</div>'


# -- comparison -------------------------------------------------------------------


def timings(comparison: Comparison) -> str:
    """Return the tested timings, with intervals drawn."""
    if not comparison.timings:
        return ""
    reach = _reach(comparison)
    rows = "".join(
        _timing(name, timing, reach, comparison)
        for name, timing in comparison.timings.items()
    )
    heads = "".join(
        f'<th class="{style}">{escape(text)}</th>'
        for style, text in (
            ("", "operation, p50"),
            ("number", comparison.base.label),
            ("number", comparison.new.label),
            ("number", "change"),
            ("", "interval: faster | slower"),
            ("", ""),
        )
    )
    return _box("stacked", rows, heads)


def _reach(comparison: Comparison) -> float:
    farthest = SMALLEST_REACH
    for timing in comparison.timings.values():
        effect = timing.effect
        farthest = max(farthest, effect.ratio, 1 / effect.ratio)
        if effect.low is not None and effect.high is not None:
            farthest = max(farthest, effect.high, 1 / effect.low)
    return min(farthest, LARGEST_REACH)


def _timing(name: str, timing: Timing, reach: float, of: Comparison) -> str:
    base, new = escape(of.base.label), escape(of.new.label)
    effect = timing.effect
    style, chip_style, word = VERDICT_STYLES[effect.verdict]
    drawn = svg.interval(effect.ratio, effect.low, effect.high, reach, style)
    return (
        f"<tr><td><b>{escape(name)}</b></td>"
        f'<td class="number" data-label="{base}">{duration(timing.base_s)}</td>'
        f'<td class="number" data-label="{new}">{duration(timing.new_s)}</td>'
        f'<td class="number" title="{format_interval(timing)}">'
        f"{format_change(timing)}</td>"
        f"<td>{drawn}</td><td>{chip(word, chip_style)}</td></tr>"
    )


def counts(comparison: Comparison) -> str:
    """Return counts that differ and, folded, those that are equal."""
    same = {
        k: v for k, v in comparison.counts.items() if v.verdict is CountVerdict.SAME
    }
    unequal = {k: v for k, v in comparison.counts.items() if k not in same}
    summary = f"{len(same)} of {len(comparison.counts)} are equal"
    folded = f"<details><summary>{summary}</summary>{_counts(same)}</details>"
    return (_counts(unequal) if unequal else "") + (folded if same else "")


def _counts(counts: Mapping[str, Count]) -> str:
    rows = "".join(
        f"<tr><td>{escape(words(name))}</td>"
        f'<td class="number">{escape(count.text)}</td>'
        f'<td class="number">{chip(count.verdict, COUNT_STYLES[count.verdict])}'
        "</td></tr>"
        for name, count in counts.items()
    )
    return _box("counts", rows)


# -- sources of tokens, and ceilings ----------------------------------------------


def sources(sides: Sequence[RunGroup]) -> str:
    """Return bars of the sources of prompt tokens."""
    rows = "".join(_sources(side, alone=len(sides) == 1) for side in sides)
    return f'<div class="box bars">{rows}</div>'


def _sources(side: RunGroup, *, alone: bool) -> str:
    result = side.median_run
    counts = result.counts
    total = max(1, counts.tokens)
    cached = counts.tokens_hit / total
    lost = max(0, counts.tokens_hit_ideal - counts.tokens_hit) / total
    beneath = counts.tokens_from_tiers / total
    colour = f"side{side.place}"
    fills = "".join(
        f'<div class="fill {style}" style="width:{share:.2%}" '
        f'title="{name}: {share:.1%}"></div>'
        for style, name, share in (
            (colour, "from memory", cached - beneath),
            (f"{colour} middle", "from tiers", beneath),
            (f"{colour} weak", "seen before, evicted", lost),
        )
        if share
    )
    label = "all tokens" if alone else side.label
    named = [f"{one.name} {one.hit_rate:.1%}" for one in result.tiers]
    rest = "".join(f", {escape(one)}" for one in (*named, f"{lost:.1%} evicted"))
    return _bar(label, fills, f"<b>{cached:.1%}</b>{rest}")


def _bar(label: str, fills: str, figure: str) -> str:
    return (
        f'<div class="bar"><span>{escape(label)}</span>'
        f'<span class="track">{fills}</span><span class="figure">{figure}</span></div>'
    )


def ceilings(sides: Sequence[RunGroup]) -> str:
    """Return bars of the share of each ceiling."""
    rows = [row for side in sides for row in _ceilings(side, several=len(sides) > 1)]
    return f'<div class="box bars">{"".join(rows)}</div>' if rows else ""


def _ceilings(side: RunGroup, *, several: bool) -> Iterator[str]:
    for one in list_ceiling_shares(side.median_run):
        label = f"{side.label}: {one.name}" if several else one.name
        width = f"{min(1.0, one.share):.2%}"
        fill = f'<div class="fill side{side.place}" style="width:{width}"></div>'
        yield _bar(
            label, fill, f"<b>{one.share:.0%}</b>: {one.figure}, ceiling {one.ceiling}"
        )


# -- scenario, environment --------------------------------------------------------


def table(part: Table) -> str:
    """Return a table of the terminal report as HTML."""
    styles = ["number" if name.startswith(">") else "" for name in part.columns]
    heads = "".join(
        f'<th class="{style}">{escape(name.removeprefix(">"))}</th>'
        for style, name in zip(styles, part.columns, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="{style}">{escape(cell)}</td>'
            for style, cell in zip(styles, row, strict=True)
        )
        + "</tr>"
        for row in part.rows
    )
    caption = f'<p class="note">{escape(part.title)}</p>' if part.title else ""
    return caption + _box("", rows, heads)


def settings(sides: Sequence[RunGroup]) -> str:
    """Return the scenario's keys, unequal ones first; defaults folded."""
    first = sides[0].median_run.scenario
    plain = _flat(Scenario(first.model, first.workload))
    given = [_flat(side.median_run.scenario) for side in sides]
    defaults = {
        key
        for key, value in plain.items()
        if key.partition(".")[0] not in ("model", "workload")
        and all(column.get(key) == value for column in given)
    }
    chosen = [
        {key: value for key, value in column.items() if key not in defaults}
        | {"seed": side.median_run.seed}
        for column, side in zip(given, sides, strict=True)
    ]
    summary = f"{len(defaults)} keys have their defaults"
    folded = _keys([{key: value for key, value in plain.items() if key in defaults}])
    return _keys(chosen) + f"<details><summary>{summary}</summary>{folded}</details>"


def _flat(scenario: Scenario) -> dict[str, object]:
    return dict(flatten(msgspec.to_builtins(scenario, enc_hook=encode_hook)))


def environment(sides: Sequence[RunGroup]) -> str:
    """Return the machine and the versions."""
    found = []
    for side in sides:
        one = side.median_run
        row = dict(flatten(msgspec.to_builtins(one.environment)))
        row |= {"system": f"{one.system.name} {one.system.version}".strip()}
        row |= {"started": one.started, "runs": len(side.results)}
        found.append(row)
    return _keys(found)


def _written(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value)) or "-"
    return "-" if value in (None, "") else str(value)


def _keys(columns: Sequence[dict[str, object]]) -> str:
    keys = list(dict.fromkeys(key for column in columns for key in column))
    equal: list[str] = []
    unequal: list[str] = []
    for key in keys:
        values = [_written(column.get(key)) for column in columns]
        if set(values) <= {"-", "{}"}:
            continue
        same = len(set(values)) == 1
        cells = "<br>".join(escape(value) for value in (values[:1] if same else values))
        row = f'<td class="key">{escape(key)}</td><td class="key">{cells}</td>'
        (equal if same else unequal).append(f"<tr>{row}</tr>")
    return _box("keys", "".join(unequal + equal))
