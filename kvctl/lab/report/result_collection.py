"""Saved results as the sides of a report, the first compared with each other one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvcore.errors import SetupError
from kvctl.console import Table, markdown
from kvctl.lab.compare.comparison import COMPARISON, Comparison, compare, read_results
from kvctl.lab.compare.paired_runs import BASE, NEW
from kvctl.lab.latency import Histogram, decode
from kvctl.lab.report import comparison_report, result_tables
from kvctl.lab.results.result import Result

MAX_SIDES = 4
"""As many as there are distinguishable colours."""
OPERATION_ORDER = ("request", "ttft", "lookup", "retrieve", "store", "end_session")
"""The first operations of a page; others follow."""


@dataclass(frozen=True, slots=True)
class RunGroup:
    """The runs of one side. `place` selects the colour."""

    label: str
    place: int
    results: Sequence[Result]
    histograms: Mapping[str, Histogram]
    """Of each operation, over all runs."""

    @classmethod
    def of(cls, label: str, place: int, results: Sequence[Result]) -> RunGroup:
        """Return a group with the histograms of its runs merged."""
        names = dict.fromkeys(name for one in results for name in one.operations)
        histograms = {
            name: Histogram.merge(
                decode(result.operations[name].histogram)
                for result in results
                if name in result.operations and result.operations[name].histogram
            )
            for name in names
        }
        return cls(label, place, results, histograms)

    @property
    def median_run(self) -> Result:
        """The run with the median throughput."""
        ranked = sorted(self.results, key=lambda one: one.throughput.requests_per_s)
        return ranked[len(ranked) // 2]


def list_operations(sides: Sequence[RunGroup]) -> list[str]:
    """Return the operations that any side measured, in the order of a page."""
    found = dict.fromkeys(name for side in sides for name in side.histograms)
    ranks = {name: rank for rank, name in enumerate(OPERATION_ORDER)}
    return sorted(found, key=lambda name: (ranks.get(name, len(ranks)), name))


@dataclass(frozen=True, slots=True)
class ResultCollection:
    """Sides, and the comparisons of the first with each other one."""

    sides: Sequence[RunGroup]
    comparisons: Sequence[Comparison]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> ResultCollection:
        """Read results; a folder of `bench run --versus` holds two sides.

        Raises:
            SetupError: a file cannot be read, or there are more than MAX_SIDES sides.
        """
        named = [side for path in paths for side in _find_sides(path)]
        if len(named) > MAX_SIDES:
            raise SetupError(f"{len(named)} sides: a report shows at most {MAX_SIDES}")
        sides = [
            RunGroup.of(label, place, read_results(path))
            for place, (label, path) in enumerate(named)
        ]
        first = sides[0]
        comparisons = [
            compare(
                first.results,
                side.results,
                (first.label, side.label),
                allow_unlike=True,
            )
            for side in sides[1:]
        ]
        return cls(sides, comparisons)

    def build_tables(self) -> Iterator[Table | str]:
        """Yield tables and lines for `console.show`."""
        for side in self.sides:
            yield from result_tables.build_tables(side.median_run)
        for comparison in self.comparisons:
            yield from comparison_report.build_tables(comparison)

    def render_markdown(self) -> str:
        """Return Markdown: the comparisons, then the tables of each side."""
        parts = [comparison_report.render_markdown(one) for one in self.comparisons]
        for side in self.sides:
            tables = result_tables.build_tables(side.median_run)
            parts.append(markdown(f"## {side.label}", *tables))
        return "\n\n".join(parts)


def _find_sides(path: Path) -> list[tuple[str, Path]]:
    """Return labels and paths; a side is named after its file without the time."""
    saved = path / COMPARISON
    if not saved.exists():
        return [(path.name if path.is_dir() else path.stem.partition("-2")[0], path)]
    try:
        comparison = msgspec.json.decode(saved.read_bytes(), type=Comparison)
    except (OSError, msgspec.MsgspecError) as error:
        raise SetupError(f"{saved}: not a comparison: {error}") from None
    return [(comparison.base.label, path / BASE), (comparison.new.label, path / NEW)]
