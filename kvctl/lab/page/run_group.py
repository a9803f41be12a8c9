"""One side of a page: the runs of one system with one setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvctl.lab.latency import Histogram, decode
from kvctl.lab.results.result import Result

SHOWN = ("request", "ttft", "lookup", "retrieve", "store", "end_session")
"""Operations in the order that a page shows them; others follow."""


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs that belong together. `place` picks the colour."""

    label: str
    place: int
    results: Sequence[Result]
    histograms: Mapping[str, Histogram]
    """Of each operation, over all runs."""

    @classmethod
    def of(cls, label: str, place: int, results: Sequence[Result]) -> RunGroup:
        """Put runs together."""
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
    def typical(self) -> Result:
        """The run with the middle throughput: the one whose course is drawn."""
        ranked = sorted(self.results, key=lambda one: one.throughput.requests_per_s)
        return ranked[len(ranked) // 2]


def operations(sides: Sequence[RunGroup]) -> list[str]:
    """List the operations that any side measured."""
    found = dict.fromkeys(name for side in sides for name in side.histograms)
    return sorted(found, key=lambda name: (_rank(name), name))


def _rank(name: str) -> int:
    return SHOWN.index(name) if name in SHOWN else len(SHOWN)
