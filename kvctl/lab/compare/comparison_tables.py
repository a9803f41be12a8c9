"""A comparison as tables, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvctl.console import Table, duration, many
from kvctl.lab.compare.comparison import Comparison, CountVerdict
from kvctl.lab.compare.conclusions import bounds, change, of_comparison, spans, words


def parts(comparison: Comparison) -> Iterator[Table | str]:
    """Render a comparison for `console.show`."""
    yield of_comparison(comparison)
    yield _timings(comparison)
    yield _figures(comparison)
    counts = _counts(comparison)
    if counts.rows:
        yield counts
    yield _same(comparison)
    for key, (ours, theirs) in comparison.settings.items():
        yield f"setting {key}: {ours} -> {theirs}"
    for note in comparison.notes:
        yield f"note: {note}"


def _timings(comparison: Comparison) -> Table:
    rows = tuple(
        (
            name,
            duration(timing.base_s),
            duration(timing.new_s),
            change(timing),
            bounds(timing),
            timing.effect.verdict,
        )
        for name, timing in comparison.timings.items()
    )
    runs = many(comparison.base.num_runs, "pair" if comparison.in_pairs else "run")
    title = f"timings, p50, {runs}{'' if comparison.in_pairs else ' a side'}"
    sides = (f">{comparison.base.label}", f">{comparison.new.label}")
    return Table(title, ("", *sides, ">change", ">interval", ""), rows)


def _figures(comparison: Comparison) -> Table:
    rows = tuple(
        (words(name), *("-" if value is None else f"{value:,.3g}" for value in pair))
        for name, pair in comparison.figures.items()
    )
    sides = (f">{comparison.base.label}", f">{comparison.new.label}")
    return Table("throughput, not judged", ("", *sides), rows)


def _counts(comparison: Comparison) -> Table:
    rows = tuple(
        (words(name), spans(count), count.verdict)
        for name, count in comparison.counts.items()
        if count.verdict is not CountVerdict.SAME
    )
    return Table("counts that are not the same", ("", "", ""), rows)


def _same(comparison: Comparison) -> str:
    verdicts = [count.verdict for count in comparison.counts.values()]
    same = verdicts.count(CountVerdict.SAME)
    return f"{same} of {len(verdicts)} counts are exactly the same"


def markdown(comparison: Comparison) -> str:
    """Write a comparison as Markdown."""
    lines = [f"**{of_comparison(comparison)}**", ""]
    for part in (_timings(comparison), _figures(comparison), _counts(comparison)):
        if part.rows:
            lines += [f"{part.title}", "", *table(part), ""]
    lines += [f"{_same(comparison)}.", ""]
    lines += [
        f"- setting `{key}`: {ours} -> {theirs}"
        for key, (ours, theirs) in comparison.settings.items()
    ]
    lines += [f"- note: {note}" for note in comparison.notes]
    return "\n".join(lines).strip()


def table(part: Table) -> list[str]:
    """Write a table as Markdown's lines."""
    heads = [name.removeprefix(">") for name in part.columns]
    rules = ["---:" if name.startswith(">") else "---" for name in part.columns]
    return [_row(heads), _row(rules), *(_row(row) for row in part.rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
