"""Arrival times: constant, Poisson, bursts, sweeps, and those of a trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kvcore.errors import SetupError
from kvctl.lab.config.arrival_config import (
    Bursts,
    ClosedLoop,
    Constant,
    Load,
    Poisson,
    Sweep,
    TraceTimes,
)
from kvctl.lab.workload.access_generators import Access
from kvctl.lab.workload.arrivals import Due, schedule


def access(number: int, arrival_s: float | None = None) -> Access:
    """Return a short request."""
    name = str(number)
    return Access(name, name, 0, 4, 1, arrival_s, lambda: np.zeros(4, np.uint32))


def planned(load: Load, num_requests: int, seed: int = 0) -> list[Due]:
    """Return the schedule of this number of requests."""
    return list(schedule(load, map(access, range(num_requests)), seed))


def times(dues: Sequence[Due]) -> list[float]:
    """Return the arrival times."""
    return [due.at_s for due in dues if due.at_s is not None]


def test_a_closed_loop_has_no_times() -> None:
    """Requests have no due time: they begin when a slot is free."""
    assert times(planned(ClosedLoop(), 3)) == []


def test_a_constant_load_is_even() -> None:
    """10 requests/s are 0.1 s apart."""
    assert times(planned(Constant(rate=10), 4)) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_poisson_load_has_the_rate_and_the_spread() -> None:
    """Gaps have the mean and deviation of an exponential, and repeat per seed."""
    moments = times(planned(Poisson(rate=50), 4000))
    gaps = np.diff(moments)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)
    assert moments == times(planned(Poisson(rate=50), 4000))
    assert moments != times(planned(Poisson(rate=50), 4000, seed=1))


def test_bursts_rise_and_fall() -> None:
    """Nine seconds at 10 requests/s alternate with one at 200."""
    load = Bursts(rate=10, burst_rate=200, burst_s=1, every_s=10)
    moments = np.array(times(planned(load, 1160)))
    inside = moments % 10 >= 9
    assert inside.sum() == pytest.approx(800, rel=0.15)
    assert (~inside).sum() == pytest.approx(360, rel=0.15)


def test_a_sweep_rises_in_steps_and_ends() -> None:
    """Each step has its rate and duration; the rest of the workload is not used."""
    dues = planned(Sweep(rate=100, factor=2, step_s=2, max_steps=3), 100_000)
    counts = np.bincount([due.step for due in dues])
    assert counts.tolist() == pytest.approx([200, 400, 800], rel=0.25)
    assert max(times(dues)) < 6


def test_a_traces_ties_are_spread_to_the_next_time() -> None:
    """Four equal times are spread over the gap; `speed` divides all times."""
    arrivals = [10.0, 10.0, 10.0, 10.0, 12.0]
    accesses = [access(number, at) for number, at in enumerate(arrivals)]
    dues = list(schedule(TraceTimes(speed=2), accesses, 0))
    assert times(dues) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert [due.index for due in dues] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arrivals", "says"), [([2.0, 1.0], "sort the trace"), ([None], "no times")]
)
def test_a_trace_must_have_ascending_times(
    arrivals: list[float | None], says: str
) -> None:
    """Missing or decreasing times are an error."""
    accesses = [access(number, at) for number, at in enumerate(arrivals)]
    with pytest.raises(SetupError, match=says):
        list(schedule(TraceTimes(), accesses, 0))
