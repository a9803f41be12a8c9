"""The page: what it says first, and its sections in their order."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from kvctl.console import Table, many
from kvctl.lab.compare import conclusions as verdict
from kvctl.lab.compare.comparison import Comparison
from kvctl.lab.page import html_sections as sections
from kvctl.lab.page import plots
from kvctl.lab.page.html_sections import legend, section
from kvctl.lab.page.run_group import RunGroup
from kvctl.lab.report import load_tables
from kvctl.lab.report import result_tables as report
from kvctl.lab.results import ceiling_shares as limits

MAX_SIDES = 4
"""As many as there are colours that can be told apart."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The page needs nothing from anywhere, and a browser holds it to that."""


def render(sides: Sequence[RunGroup], comparisons: Sequence[Comparison]) -> str:
    """Write the whole page; comparisons are of the first side with each other one."""
    first = sides[0].typical
    said = [verdict.of_comparison(one) for one in comparisons]
    said = said or [verdict.of_result(first)]
    body = "".join(_body(sides, comparisons))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(first.name)}: {escape(said[0])}</title>"
        f"<style>{_style()}</style></head><body><main>"
        f"<header><h1>{escape(_names(sides))}</h1>"
        + "".join(f'<p class="verdict">{escape(line)}</p>' for line in said)
        + f'<p class="lead">{escape(first.scenario.question)}</p></header>'
        f"{body}<footer>Measured {escape(first.started)} with kvctl "
        f"{escape(first.environment.versions.get('kvctl', ''))}.</footer>"
        "</main></body></html>\n"
    )


def _style() -> str:
    return files("kvctl.lab.page").joinpath("style.css").read_text()


def _names(sides: Sequence[RunGroup]) -> str:
    names = list(dict.fromkeys(side.typical.name for side in sides))
    runs = sum(len(side.results) for side in sides)
    return f"{', '.join(names)} · {runs} {'run' if runs == 1 else 'runs'}"


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
            "How long calls take",
            "How long so many of a hundred calls took at most; both scales are "
            "logarithmic. All runs of a side together.",
            _plots(colours, *plots.distributions(sides)),
        ),
        section(
            "Over time",
            "The run of each side with the middle throughput. Shaded: faults, until "
            "they were over."
            if any(side.typical.load and side.typical.load.faults for side in sides)
            else "The run of each side with the middle throughput.",
            _plots(colours, *plots.over_time(sides)),
        ),
        section(
            "Where the tokens came from",
            "Of all prompts' tokens: from memory; from the tiers beneath it (paler); "
            "seen before but gone (palest); never seen before (empty).",
            sections.sources(sides),
        ),
        *(_load(side, several=len(sides) > 1) for side in sides),
        section(
            "Share of the machine's limit",
            f"Measured in the same run. {limits.NOTE}",
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
        for line in verdict.problems(side.results)
    ]
    return "".join(found)


def _comparison(comparison: Comparison) -> str:
    runs = many(comparison.base.num_runs, "pair" if comparison.in_pairs else "run")
    note = (
        f"{runs}{'' if comparison.in_pairs else ' a side'}. One metric an operation "
        "is judged; the intervals hold for all operations together (ranks, Holm, 5 %), "
        "and less than 5 % either way is called the same."
    )
    title = f"{comparison.new.label} against {comparison.base.label}"
    notes = "".join(f'<p class="note">Note: {escape(n)}.</p>' for n in comparison.notes)
    return section(title, note, sections.timings(comparison)) + section(
        "Counts", "What must repeat exactly.", sections.counts(comparison), notes
    )


def _load(side: RunGroup, *, several: bool) -> str:
    load = side.typical.load
    if load is None:
        return ""
    drawn = [
        sections.table(part) if isinstance(part, Table) else _said(part)
        for part in load_tables.parts(load)
    ]
    title = f"Load of {side.label}" if several else "Load"
    return section(title, "", *drawn, _plots("", plots.sweep(side)))


def _copies(side: RunGroup, *, several: bool) -> str:
    rows = side.typical.copies
    if not rows:
        return ""
    title = f"Copies of {side.label}" if several else "Copies"
    return section(title, "", sections.table(report.copy_rows(rows)))


def _said(sentence: str) -> str:
    return f"<p>{escape(sentence[:1].upper() + sentence[1:])}.</p>"
