"""Comparison of two sides of results: counts exactly, timings by rank tests.

Where a count repeats in all runs of both sides, any difference counts. Of each
operation, one timing metric is tested against the spread between the runs of a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvcore.errors import SetupError
from kvcore.option_structs import encode_hook
from kvctl.console import write_text
from kvctl.lab.compare.significance import Contrast, Effect, judge, paired, unpaired
from kvctl.lab.results.result import Result, System, read

COMPARISON = "comparison.json"
COMPARISON_VERSION = 1

NOT_TESTED = frozenset({"ping"})
"""Pings are made after the load: they describe the machine."""

FIGURES = ("requests_per_s", "tokens_per_s", "store_gb_per_s", "retrieve_gb_per_s")
"""Fields of a result's throughput that are reported and not tested."""

SERVER_COUNTERS = ("chunks_evicted", "deadlines_exceeded", "retrieves_missing")
"""Counters of the server that are compared beside the counts of the run."""
WORSE_WHEN_MORE = frozenset(
    {"errors", "bytes_wrong", "leases_leaked", *SERVER_COUNTERS}
)
WORSE_WHEN_LESS = frozenset({"requests", "tokens_hit", "chunks_hit"})
MUST_BE_ZERO = frozenset({"errors", "bytes_wrong", "leases_leaked"})
COUNTS_OF_ANY_SYSTEM = WORSE_WHEN_LESS | {"errors", "bytes_wrong", "tokens", "chunks"}
"""Counts with one meaning for all systems."""


class CountVerdict(StrEnum):
    """Result of comparing one count."""

    SAME = "same"
    BETTER = "better"
    WORSE = "worse"
    DIFFERS = "differs"
    VARIES = "varies"
    """Between the runs of one side, with the other side inside that range."""


class Count(msgspec.Struct, frozen=True):
    """Minimum and maximum of one count over the runs of each side."""

    base: tuple[int, int]
    new: tuple[int, int]
    verdict: CountVerdict

    @property
    def text(self) -> str:
        """Both sides: `3 -> 1 to 2`."""
        return f"{format_range(self.base)} -> {format_range(self.new)}"


def format_range(bounds: Iterable[int]) -> str:
    """Return a count, or the range in which it varies: `1 to 2`."""
    return " to ".join(f"{value:,}" for value in dict.fromkeys(bounds))


class Timing(msgspec.Struct, frozen=True):
    """Medians of one operation over the runs of each side, and the tested effect."""

    base_s: float
    new_s: float
    effect: Effect


class ComparisonSide(msgspec.Struct, frozen=True):
    """Origin of one side's figures."""

    label: str
    system: System
    commit: str | None
    num_runs: int


class Comparison(msgspec.Struct, frozen=True):
    """Differences between two sides, with the notes that qualify them."""

    version: int
    base: ComparisonSide
    new: ComparisonSide
    in_pairs: bool
    settings: dict[str, tuple[str, str]]
    """Keys in which the two scenarios differ."""
    timings: dict[str, Timing]
    counts: dict[str, Count]
    figures: dict[str, tuple[float | None, float | None]] = {}
    """Medians of throughput, not tested."""
    notes: tuple[str, ...] = ()

    @property
    def failing_verdicts(self) -> frozenset[CountVerdict]:
        """Verdicts of counts that are a regression.

        Other settings or another system may store other amounts.
        """
        if self.settings:
            return frozenset({CountVerdict.WORSE})
        return frozenset({CountVerdict.WORSE, CountVerdict.DIFFERS})

    def save(self, folder: Path) -> Path:
        """Write `comparison.json` into a folder and return its path.

        Raises:
            SetupError: the file cannot be written.
        """
        path = folder / COMPARISON
        text = msgspec.json.format(msgspec.json.encode(self, enc_hook=encode_hook))
        write_text(path, text.decode() + "\n")
        return path


def read_results(path: Path) -> list[Result]:
    """Read a result file, or all result files of a folder ordered by name.

    Raises:
        SetupError: the folder has no result, or a file cannot be read.
    """
    if not path.is_dir():
        return [read(path)]
    files = [file for file in sorted(path.glob("*.json")) if file.name != COMPARISON]
    if not files:
        # A comparison has one folder of runs per side.
        inside = sorted({file.parent.name for file in path.glob("*/*.json")})
        where = f"; its folders {', '.join(inside)} have some" if inside else ""
        raise SetupError(f"{path}: no results{where}")
    return [read(file) for file in files]


def compare(
    base: Sequence[Result],
    new: Sequence[Result],
    labels: tuple[str, str] = ("base", "new"),
    *,
    allow_unlike: bool = False,
) -> Comparison:
    """Compare two sides of at least one result each.

    Raises:
        SetupError: the machines differ and `allow_unlike` is false.
    """
    notes = _unlike_machines(base, new)
    if notes and not allow_unlike:
        raise SetupError(
            f"the machines differ ({'; '.join(notes)}); --anyway compares them"
        )
    settings = differences(base[0], new[0])
    return Comparison(
        version=COMPARISON_VERSION,
        base=_side(labels[0], base),
        new=_side(labels[1], new),
        in_pairs=_in_pairs(base, new),
        settings=settings,
        timings=_timings(base, new),
        counts=compare_counts(base, new, same_work=not _is_other_work(settings)),
        figures=_figures(base, new),
        notes=tuple(notes + _notes(base, new)),
    )


def _side(label: str, results: Sequence[Result]) -> ComparisonSide:
    first = results[0]
    return ComparisonSide(
        label, first.system, first.environment.git_commit, len(results)
    )


def _figures(
    base: Sequence[Result], new: Sequence[Result]
) -> dict[str, tuple[float | None, float | None]]:
    sides = [
        [msgspec.structs.asdict(result.throughput) for result in side]
        for side in (base, new)
    ]

    def median(side: Sequence[dict[str, float | None]], name: str) -> float | None:
        known = [value for row in side if (value := row[name]) is not None]
        return _median(known) if known else None

    return {name: (median(sides[0], name), median(sides[1], name)) for name in FIGURES}


def _unlike_machines(base: Sequence[Result], new: Sequence[Result]) -> list[str]:
    first = base[0].environment
    found = [first.unlike(result.environment) for result in (*base[1:], *new)]
    return list(dict.fromkeys(line for lines in found for line in lines))


def _notes(base: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """Return what limits the comparison."""
    notes = []
    cut = sum(result.interrupted for result in (*base, *new))
    if cut:
        notes.append(f"{cut} runs were interrupted")
    if base[0].environment.versions != new[0].environment.versions:
        notes.append("the versions of packages differ")
    if _in_pairs(base, new) and not base[0].turns:
        notes.append(
            "the runs of a pair ran one after the other; to interleave them, which "
            "needs fewer pairs, set engines = 1 and load.concurrency = 1, with memory "
            "for both"
        )
    cores = base[0].environment.num_cores
    busy = sum(result.environment.load > 2 * cores for result in (*base, *new))
    if busy:
        notes.append(f"other processes kept the machine busy during {busy} of the runs")
    return notes


def differences(base: Result, new: Result) -> dict[str, tuple[str, str]]:
    """Return the keys in which scenarios, seeds and systems differ, with values."""

    def flat(result: Result) -> dict[str, str]:
        given = msgspec.to_builtins(result.scenario, enc_hook=encode_hook)
        given |= {"seed": result.seed, "system": result.system.name}
        return {key: str(value) for key, value in flatten(given)}

    old, changed = flat(base), flat(new)
    pairs = {
        key: (old.get(key, "-"), changed.get(key, "-"))
        for key in dict.fromkeys((*old, *changed))
    }
    ignored = {"question", "server.address"}
    return {
        key: pair
        for key, pair in pairs.items()
        if pair[0] != pair[1] and key not in ignored
    }


def flatten(given: dict[str, Any], where: str = "") -> Iterator[tuple[str, object]]:
    """Yield the leaves of nested dicts with their dotted keys."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


# -- counts -----------------------------------------------------------------------


def _is_other_work(settings: Iterable[str]) -> bool:
    """Return whether the sides had different workloads."""
    return any(key.partition(".")[0] in ("workload", "seed") for key in settings)


def compare_counts(
    base: Sequence[Result], new: Sequence[Result], *, same_work: bool = True
) -> dict[str, Count]:
    """Compare counts, exactly where they repeat.

    For different workloads, only the counts that must be zero are compared.
    """
    old, changed = _count_ranges(base), _count_ranges(new)
    names = [name for name in old if name in changed]
    if base[0].system.name != new[0].system.name:
        names = [name for name in names if name in COUNTS_OF_ANY_SYSTEM]
    if not same_work:
        names = [name for name in names if name in MUST_BE_ZERO]
    return {
        name: Count(old[name], changed[name], _judge(name, old[name], changed[name]))
        for name in names
    }


def _count_ranges(results: Sequence[Result]) -> dict[str, tuple[int, int]]:
    rows = [
        msgspec.structs.asdict(result.counts)
        | {
            name: result.counters[name]
            for name in SERVER_COUNTERS
            if name in result.counters
        }
        for result in results
    ]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {
        name: (min(row[name] for row in rows), max(row[name] for row in rows))
        for name in names
    }


def _judge(name: str, base: tuple[int, int], new: tuple[int, int]) -> CountVerdict:
    if base == new:
        return CountVerdict.SAME if base[0] == base[1] else CountVerdict.VARIES
    more, less = new[0] > base[1], new[1] < base[0]
    if not more and not less:
        return CountVerdict.VARIES
    if name in WORSE_WHEN_MORE:
        return CountVerdict.WORSE if more else CountVerdict.BETTER
    if name in WORSE_WHEN_LESS:
        return CountVerdict.WORSE if less else CountVerdict.BETTER
    return CountVerdict.DIFFERS


# -- timings ----------------------------------------------------------------------


def _timings(base: Sequence[Result], new: Sequence[Result]) -> dict[str, Timing]:
    in_pairs = _in_pairs(base, new)
    if in_pairs:
        base, new = _by_number(base), _by_number(new)
    names = [
        name
        for name in base[0].operations
        if name not in NOT_TESTED
        and all(name in result.operations for result in (*base, *new))
    ]
    effects = judge({name: _contrast(name, base, new, in_pairs) for name in names})
    return {
        name: Timing(
            _median([result.operations[name].p50_s for result in base]),
            _median([result.operations[name].p50_s for result in new]),
            effects[name],
        )
        for name in names
    }


def _contrast(
    name: str, base: Sequence[Result], new: Sequence[Result], in_pairs: bool
) -> Contrast:
    if in_pairs:
        pairs = zip(base, new, strict=True)
        return paired([_log_ratio(name, *pair) for pair in pairs])
    old, changed = (
        [math.log(result.operations[name].p50_s) for result in side]
        for side in (base, new)
    )
    return unpaired(old, changed)


def _log_ratio(name: str, base: Result, new: Result) -> float:
    """Return the logarithm of new duration over base duration of one pair.

    For interleaved runs, the median over the pairs of turns with equal requests.
    """
    turns = zip(base.turns.get(name, ()), new.turns.get(name, ()), strict=False)
    ratios = [
        math.log(slower / faster) for faster, slower in turns if faster and slower
    ]
    if ratios:
        return _median(ratios)
    return math.log(new.operations[name].p50_s / base.operations[name].p50_s)


def _in_pairs(base: Sequence[Result], new: Sequence[Result]) -> bool:
    """Return whether every run has its pair in the same comparison."""
    numbers = _pair_numbers(base)
    return numbers == _pair_numbers(new) and len(numbers) == len(base) == len(new)


def _pair_numbers(results: Sequence[Result]) -> set[tuple[str, int]]:
    repetitions = (result.repetition for result in results)
    return {(one.comparison, one.number) for one in repetitions if one}


def _by_number(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda r: r.repetition.number if r.repetition else 0)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
