"""Arrival times of a workload's requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, cycle, groupby, pairwise
from math import inf

import numpy as np

from kvcore.errors import SetupError
from kvctl.lab.config.arrival_config import (
    Bursts,
    ClosedLoop,
    Constant,
    Load,
    Poisson,
    RateLoad,
    Sweep,
    TraceTimes,
)
from kvctl.lab.workload.access_generators import Access

ARRIVALS = 101
"""Stream of random numbers, distinct from those of the workloads."""
LAST_GAP_S = 1.0
"""Interval over which requests of a trace's last time are spread."""


@dataclass(frozen=True, slots=True)
class Due:
    """An access and its arrival time, in seconds after the start of the load."""

    access: Access
    index: int
    """Its index in the whole workload."""
    at_s: float | None = None
    """None in a closed loop: as soon as a slot is free."""
    step: int = 0
    """Of a sweep."""


@dataclass(frozen=True, slots=True)
class RateSegment:
    """An interval of constant rate."""

    rate: float
    seconds: float
    step: int = 0


def schedule(load: Load, accesses: Iterable[Access], seed: int) -> Iterator[Due]:
    """Return the arrival time of each access, in the order of the workload.

    A sweep ends with its last step, even if the workload does not. Times depend on
    the workload, the load and the seed alone.

    Raises:
        SetupError: the load follows a trace without times, or with decreasing ones.
    """
    if isinstance(load, ClosedLoop):
        return (Due(access, index) for index, access in enumerate(accesses))
    if isinstance(load, TraceTimes):
        return _trace_times(load, accesses)
    rng = np.random.default_rng((seed, ARRIVALS))
    moments = _moments(_segments(load), None if isinstance(load, Constant) else rng)
    return (
        Due(access, index, at_s, step)
        for index, (access, (at_s, step)) in enumerate(
            zip(accesses, moments, strict=False)
        )
    )


def _segments(load: RateLoad) -> Iterator[RateSegment]:
    match load:
        case Constant() | Poisson():
            return iter([RateSegment(load.rate, inf)])
        case Bursts():
            quiet = RateSegment(load.rate, load.every_s - load.burst_s)
            return cycle([quiet, RateSegment(load.burst_rate, load.burst_s)])
        case Sweep():
            return (
                RateSegment(load.rate * load.factor**step, load.step_s, step)
                for step in range(load.max_steps)
            )


def _moments(
    segments: Iterator[RateSegment], rng: np.random.Generator | None
) -> Iterator[tuple[float, int]]:
    """Yield times and steps of arrivals at a piecewise constant rate.

    Distances on the axis of the rate's integral are 1 without a random generator, else
    exponential: a Poisson process of varying rate has rate 1 on that axis. Source:
    Lewis and Shedler, 1979.
    """
    begin, passed = 0.0, 0.0
    target = _distance(rng)
    for segment in segments:
        expected = segment.rate * segment.seconds
        while target - passed < expected:
            at_s = begin + (target - passed) / segment.rate
            yield at_s, segment.step
            target += _distance(rng)
        passed += expected
        begin += segment.seconds


def _distance(rng: np.random.Generator | None) -> float:
    return 1.0 if rng is None else float(rng.exponential())


def _trace_times(load: TraceTimes, accesses: Iterable[Access]) -> Iterator[Due]:
    """Yield the trace's times; equal ones are spread up to the next time."""
    ties = ((at_s, list(tied)) for at_s, tied in groupby(accesses, _arrival_s))
    end: tuple[float, list[Access]] = (inf, [])
    first_s: float | None = None
    numbers = count()
    for (at_s, tied), (next_s, following) in pairwise(chain(ties, [end])):
        first_s = at_s if first_s is None else first_s
        gap = next_s - at_s if following else LAST_GAP_S
        if gap < 0:
            raise SetupError(
                f"request {following[0].request_id} of the trace is {-gap} s earlier "
                "than the one before it: sort the trace by time"
            )
        for place, access in enumerate(tied):
            due_s = at_s - first_s + gap * place / len(tied)
            yield Due(access, next(numbers), due_s / load.speed)


def _arrival_s(access: Access) -> float:
    if access.arrival_s is None:
        raise SetupError("load.kind = 'trace': the trace has no times")
    return access.arrival_s
