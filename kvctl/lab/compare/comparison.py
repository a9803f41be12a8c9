"""Two sides of results, judged: what one counts exactly, what the other takes longer.

Counts must repeat: where they do on both sides, any difference is one. Of timings one
metric an operation is judged, over the spread between a side's runs.
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
from kvcore.options import encode_hook
from kvctl.lab.compare.significance import Contrast, Effect, judge, paired, unpaired
from kvctl.lab.latency import Latency
from kvctl.lab.results.result import Result, System, read

COMPARISON = "comparison.json"
COMPARISON_VERSION = 1

PRIMARY = "p50_s"
"""The metric of each operation that is judged."""

NOT_JUDGED = frozenset({"ping"})
"""Told for what it says of the machine: pings are made when the load is over."""

FIGURES = ("requests_per_s", "tokens_per_s", "store_gb_per_s", "retrieve_gb_per_s")
"""Of a result's throughput."""

COUNTED_BY_SERVER = ("chunks_evicted", "deadlines_exceeded", "retrieves_missing")
"""Of the server's counters, those that are compared beside the run's own counts."""
WORSE_WHEN_MORE = frozenset(
    {"errors", "bytes_wrong", "leases_leaked", *COUNTED_BY_SERVER}
)
WORSE_WHEN_LESS = frozenset({"requests", "tokens_hit", "chunks_hit"})
MUST_BE_NOTHING = frozenset({"errors", "bytes_wrong", "leases_leaked"})
OF_ANY_SYSTEM = WORSE_WHEN_LESS | {"errors", "bytes_wrong", "tokens", "chunks"}
"""Counts that mean the same whatever was under the load."""


class CountVerdict(StrEnum):
    """What is said of one count."""

    SAME = "same"
    BETTER = "better"
    WORSE = "worse"
    DIFFERS = "differs"
    VARIES = "varies"
    """From run to run on one side, and the other is within that."""


class Count(msgspec.Struct, frozen=True):
    """One count on both sides, least and most over the runs."""

    base: tuple[int, int]
    new: tuple[int, int]
    verdict: CountVerdict


class Timing(msgspec.Struct, frozen=True):
    """One operation on both sides: medians over the runs, and what they amount to."""

    base_s: float
    new_s: float
    effect: Effect


class ComparisonSide(msgspec.Struct, frozen=True):
    """Where one side's figures came from."""

    label: str
    system: System
    commit: str | None
    num_runs: int


class Comparison(msgspec.Struct, frozen=True):
    """All that is said of two sides."""

    version: int
    base: ComparisonSide
    new: ComparisonSide
    in_pairs: bool
    settings: dict[str, tuple[str, str]]
    """Where the two scenarios differ."""
    timings: dict[str, Timing]
    counts: dict[str, Count]
    figures: dict[str, tuple[float | None, float | None]] = {}
    """Medians that are told and not judged."""
    notes: tuple[str, ...] = ()

    def save(self, folder: Path) -> Path:
        """Write `comparison.json`.

        Raises:
            SetupError: it cannot be written.
        """
        path = folder / COMPARISON
        text = msgspec.json.format(msgspec.json.encode(self, enc_hook=encode_hook))
        try:
            path.write_bytes(text + b"\n")
        except OSError as error:
            raise SetupError(f"{path}: {error.strerror}") from None
        return path


def gather(path: Path) -> list[Result]:
    """Read a result file, or all that lie in a folder, in the order of their names.

    Raises:
        SetupError: there is none, or one cannot be read.
    """
    if not path.is_dir():
        return [read(path)]
    files = [file for file in sorted(path.glob("*.json")) if file.name != COMPARISON]
    if not files:
        # A comparison's folder has its runs in one for each side.
        inside = sorted({file.parent.name for file in path.glob("*/*.json")})
        where = f", but in its folders {', '.join(inside)}" if inside else ""
        raise SetupError(f"{path}: no results in it{where}")
    return [read(file) for file in files]


def compare(
    base: Sequence[Result],
    new: Sequence[Result],
    labels: tuple[str, str] = ("base", "new"),
    *,
    anyway: bool = False,
) -> Comparison:
    """Judge two sides of at least one result each.

    Raises:
        SetupError: the machines are unlike, and nobody said that it does not matter.
    """
    notes = _unlike_machines(base, new)
    if notes and not anyway:
        raise SetupError(
            "the machines are unlike (" + "; ".join(notes) + "): --anyway compares them"
        )
    settings = differences(base[0], new[0])
    return Comparison(
        version=COMPARISON_VERSION,
        base=_side(labels[0], base),
        new=_side(labels[1], new),
        in_pairs=_in_pairs(base, new),
        settings=settings,
        timings=_timings(base, new),
        counts=count(base, new, comparable=not _other_work(settings)),
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
    def median(results: Sequence[Result], name: str) -> float | None:
        values = [getattr(result.throughput, name) for result in results]
        known = [value for value in values if value is not None]
        return _median(known) if known else None

    return {name: (median(base, name), median(new, name)) for name in FIGURES}


def _unlike_machines(base: Sequence[Result], new: Sequence[Result]) -> list[str]:
    first = base[0].environment
    found = [first.unlike(result.environment) for result in (*base[1:], *new)]
    return list(dict.fromkeys(line for lines in found for line in lines))


def _notes(base: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """Say what a reader should know before believing the figures."""
    notes = []
    cut = sum(result.interrupted for result in (*base, *new))
    if cut:
        notes.append(f"{cut} runs were interrupted")
    if base[0].environment.versions != new[0].environment.versions:
        notes.append("the versions of packages differ")
    if _in_pairs(base, new) and not base[0].turns:
        notes.append(
            "each run had the machine for itself: to take turns, which tells more in "
            "fewer pairs, needs engines = 1, load.concurrency = 1 and memory for both"
        )
    cores = base[0].environment.num_cores
    busy = sum(result.environment.load > 2 * cores for result in (*base, *new))
    if busy:
        notes.append(f"the machine was busy beside {busy} of the runs")
    return notes


def differences(base: Result, new: Result) -> dict[str, tuple[str, str]]:
    """Return where two results' scenarios, seeds and systems differ, by key."""

    def flat(result: Result) -> dict[str, str]:
        given = msgspec.to_builtins(result.scenario, enc_hook=encode_hook)
        given |= {"seed": result.seed, "system": result.system.name}
        return {key: str(value) for key, value in flatten(given)}

    ours, theirs = flat(base), flat(new)
    keys = [*ours, *(key for key in theirs if key not in ours)]
    pairs = {key: (ours.get(key, "-"), theirs.get(key, "-")) for key in keys}
    ignored = {"question", "server.address"}
    return {
        key: pair
        for key, pair in pairs.items()
        if pair[0] != pair[1] and key not in ignored
    }


def flatten(given: dict[str, Any], where: str = "") -> Iterator[tuple[str, object]]:
    """Iterate the leaves of nested dicts with their dotted keys."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


# -- counts -----------------------------------------------------------------------


def _other_work(settings: Iterable[str]) -> bool:
    """Say whether the sides were asked different things."""
    return any(key.partition(".")[0] in ("workload", "seed") for key in settings)


def count(
    base: Sequence[Result], new: Sequence[Result], *, comparable: bool = True
) -> dict[str, Count]:
    """Compare counts, exactly where they repeat.

    Of sides that were asked different things only what must be nothing is compared.
    """
    ours, theirs = _counts(base), _counts(new)
    names = [name for name in ours if name in theirs]
    if base[0].system.name != new[0].system.name:
        names = [name for name in names if name in OF_ANY_SYSTEM]
    if not comparable:
        names = [name for name in names if name in MUST_BE_NOTHING]
    return {
        name: Count(ours[name], theirs[name], _said(name, ours[name], theirs[name]))
        for name in names
    }


def _counts(results: Sequence[Result]) -> dict[str, tuple[int, int]]:
    rows = [
        msgspec.structs.asdict(result.counts)
        | {
            name: result.counters[name]
            for name in COUNTED_BY_SERVER
            if name in result.counters
        }
        for result in results
    ]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {
        name: (min(row[name] for row in rows), max(row[name] for row in rows))
        for name in names
    }


def _said(name: str, base: tuple[int, int], new: tuple[int, int]) -> CountVerdict:
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
        if name not in NOT_JUDGED
        and all(name in result.operations for result in (*base, *new))
    ]
    effects = judge({name: _contrast(name, base, new, in_pairs) for name in names})
    return {
        name: Timing(
            _median([primary(result.operations[name]) for result in base]),
            _median([primary(result.operations[name]) for result in new]),
            effects[name],
        )
        for name in names
    }


def _contrast(
    name: str, base: Sequence[Result], new: Sequence[Result], in_pairs: bool
) -> Contrast:
    if in_pairs:
        return paired([_gap(name, *pair) for pair in zip(base, new, strict=True)])
    ours = [math.log(primary(result.operations[name])) for result in base]
    theirs = [math.log(primary(result.operations[name])) for result in new]
    return unpaired(ours, theirs)


def _gap(name: str, base: Result, new: Result) -> float:
    """Return the logarithm of how many times as long a pair's new run took.

    Where the two took turns, each turn of one is held against the same requests' turn
    of the other, and the middle one counts.
    """
    turns = zip(base.turns.get(name, ()), new.turns.get(name, ()), strict=False)
    gaps = [math.log(theirs / ours) for ours, theirs in turns if ours and theirs]
    if gaps:
        return _median(gaps)
    ours, theirs = primary(base.operations[name]), primary(new.operations[name])
    return math.log(theirs / ours)


def primary(latency: Latency) -> float:
    """Return the one figure of an operation that is judged."""
    return float(getattr(latency, PRIMARY))


def _in_pairs(base: Sequence[Result], new: Sequence[Result]) -> bool:
    """Say whether every run has its pair in the same comparison."""
    ours, theirs = _places(base), _places(new)
    return ours == theirs and len(ours) == len(base) == len(new)


def _places(results: Sequence[Result]) -> set[tuple[str, int]]:
    places = (result.repetition for result in results)
    return {(place.comparison, place.number) for place in places if place}


def _by_number(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda r: r.repetition.number if r.repetition else 0)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
