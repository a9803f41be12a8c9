"""The page: a summary, then its sections."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from kvctl.console import Table, plural, write_text
from kvctl.lab.compare.comparison import Comparison
from kvctl.lab.page import html_sections as sections
from kvctl.lab.page import plots
from kvctl.lab.page.html_sections import legend, section
from kvctl.lab.report import load_report_tables
from kvctl.lab.report.comparison_report import describe_comparison, format_runs
from kvctl.lab.report.result_collection import ResultCollection, RunGroup
from kvctl.lab.report.result_tables import CEILING_NOTE, copy_table, describe_result

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The page loads nothing; browsers enforce it."""


def save_page(collection: ResultCollection, path: Path) -> None:
    """Write the page as a file.

    Raises:
        SetupError: the file cannot be written.
    """
    write_text(path, render(collection))


def render(collection: ResultCollection) -> str:
    """Return the page as HTML."""
    sides, comparisons = collection.sides, collection.comparisons
    first = sides[0].median_run
    summary = [describe_comparison(one) for one in comparisons]
    summary = summary or [describe_result(first)]
    body = "".join(_body(sides, comparisons))
    style = files("kvctl.lab.page").joinpath("style.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(first.name)}: {escape(summary[0])}</title>"
        f"<style>{style}</style></head><body><main>"
        f"<header><h1>{escape(_names(sides))}</h1>"
        + "".join(f'<p class="verdict">{escape(line)}</p>' for line in summary)
        + f'<p class="lead">{escape(first.scenario.question)}</p></header>'
        f"{body}<footer>Measured {escape(first.started)} with kvctl "
        f"{escape(first.environment.versions.get('kvctl', ''))}.</footer>"
        "</main></body></html>\n"
    )


def _names(sides: Sequence[RunGroup]) -> str:
    names = list(dict.fromkeys(side.median_run.name for side in sides))
    runs = plural(sum(len(side.results) for side in sides), "run")
    return f"{', '.join(names)} · {runs}"


def _body(
    sides: Sequence[RunGroup], comparisons: Sequence[Comparison]
) -> Sequence[str]:
    colours = legend(sides)
    return (
        _problems(sides),
        colours,
        sections.tiles(sides),
        *(_comparison(one) for one in comparisons),
        section(
            "Latency",
            "Latency percentiles over all runs of a side; both scales are logarithmic.",
            _plots(colours, *plots.distributions(sides)),
        ),
        section(
            "Over time",
            "The run of each side with the median throughput. Shaded: faults, until "
            "recovery."
            if any(
                side.median_run.load and side.median_run.load.faults for side in sides
            )
            else "The run of each side with the median throughput.",
            _plots(colours, *plots.over_time(sides)),
        ),
        section(
            "Sources of prompt tokens",
            "Shares of all prompt tokens: from memory; from tiers (paler); seen "
            "before but evicted (palest); never seen before (empty).",
            sections.sources(sides),
        ),
        *(_load(side, several=len(sides) > 1) for side in sides),
        section(
            "How close to the ceiling",
            f"Measured in the same run. {CEILING_NOTE}",
            sections.ceilings(sides),
        ),
        *(_copies(side, several=len(sides) > 1) for side in sides),
        section("Scenario", "", sections.settings(sides)),
        section("Environment", "", sections.environment(sides)),
    )


def _plots(colours: str, *drawn: str) -> str:
    inner = "".join(filter(None, drawn))
    return f'{colours}<div class="plots">{inner}</div>' if inner else ""


def _problems(sides: Sequence[RunGroup]) -> str:
    found = [
        f"<p>{sections.chip('problem', 'bad')} {escape(line)}</p>"
        for side in sides
        for line in dict.fromkeys(
            problem for result in side.results for problem in result.problems
        )
    ]
    return "".join(found)


def _comparison(comparison: Comparison) -> str:
    note = (
        f"{format_runs(comparison)}. One metric per operation is tested; the intervals "
        "hold for all operations together (rank tests, Holm, 5 %), and less than 5 % "
        "faster or slower is called the same."
    )
    title = f"{comparison.new.label} against {comparison.base.label}"
    notes = "".join(f'<p class="note">Note: {escape(n)}.</p>' for n in comparison.notes)
    return section(title, note, sections.timings(comparison)) + section(
        "Counts", "Compared exactly.", sections.counts(comparison), notes
    )


def _load(side: RunGroup, *, several: bool) -> str:
    load = side.median_run.load
    if load is None:
        return ""
    drawn = [
        sections.table(part) if isinstance(part, Table) else _sentence(part)
        for part in load_report_tables.build_tables(load)
    ]
    title = f"Load of {side.label}" if several else "Load"
    return section(title, "", *drawn, _plots("", plots.sweep(side)))


def _copies(side: RunGroup, *, several: bool) -> str:
    rows = side.median_run.copies
    if not rows:
        return ""
    title = f"Copies of {side.label}" if several else "Copies"
    return section(title, "", sections.table(copy_table(rows)))


def _sentence(text: str) -> str:
    return f"<p>{escape(text[:1].upper() + text[1:])}.</p>"
