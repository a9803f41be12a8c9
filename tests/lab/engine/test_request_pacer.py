"""Request pacing with a fake clock: start times, lag, sessions, warm-up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvctl.lab.config.scenario import ModelConfig, Scenario
from kvctl.lab.config.workload_config import Chat
from kvctl.lab.engine.engine_state import own_requests
from kvctl.lab.engine.request_pacer import PacedRequest, RequestPacer
from kvctl.lab.process_messages import EnginePlan
from kvctl.lab.workload.access_generators import Access
from kvctl.lab.workload.arrivals import Due
from tests.lab.fake_clock import FakeClock


def due(number: int, at_s: float | None, session: str | None = None) -> Due:
    """Return a short request with its arrival time."""
    name = session or str(number)
    access = Access(str(number), name, 0, 4, 1, None, lambda: np.zeros(4, np.uint32))
    return Due(access, number, at_s)


def names(pacer: RequestPacer) -> Iterator[str]:
    """Take all requests, one after another; return their names."""
    while (taken := pacer.take()) is not None:
        yield taken.access.request_id
        pacer.done(taken)


def test_requests_begin_when_they_are_due() -> None:
    """A free slot waits for the due time of each request, without lag."""
    pacer = RequestPacer(iter([due(0, 0.5), due(1, 2.0)]), clock=FakeClock())
    first, second = pacer.take(), pacer.take()
    assert first
    assert second
    assert (first.begun_s, second.begun_s) == (0.5, 2.0)
    assert first.lag_s == second.lag_s == 0.0
    assert pacer.take() is None


def test_waiting_for_a_slot_is_no_lag_of_the_generator() -> None:
    """The system causes that delay: latency counts from the due time."""
    clock = FakeClock()
    pacer = RequestPacer(iter([due(0, 0.0), due(1, 1.0)]), clock=clock)
    pacer.take()
    clock.time = 5.0
    taken = pacer.take()
    assert taken
    assert (taken.due_s, taken.begun_s, taken.lag_s) == (1.0, 5.0, 0.0)


def test_a_late_start_in_a_free_slot_is_lag() -> None:
    """The slot was free and the request was due: the generator was late."""

    class Late(FakeClock):
        def wait(self, changed: threading.Condition, timeout_s: float | None) -> None:
            super().wait(changed, timeout_s)
            self.time += 0.25

    taken = RequestPacer(iter([due(0, 1.0)]), clock=Late()).take()
    assert taken
    assert taken.lag_s == pytest.approx(0.25)


def test_an_open_loop_continues_beside_a_busy_session() -> None:
    """The session's next turn is due after the answer; other sessions continue."""
    clock = FakeClock()
    source = [due(0, 0.0, "a"), due(1, 1.0, "a"), due(2, 2.0, "b")]
    pacer = RequestPacer(iter(source), clock=clock)
    first, second = pacer.take(), pacer.take()
    assert first
    assert second
    assert second.access.request_id == "2"
    clock.time = 7.0
    pacer.done(first)
    third = pacer.take()
    assert third
    assert (third.access.request_id, third.due_s) == ("1", 7.0)


def test_a_closed_loop_keeps_the_workloads_order() -> None:
    """All requests wait for a busy session; none overtakes."""
    source = [due(0, None, "a"), due(1, None, "a"), due(2, None, "b")]
    pacer = RequestPacer(iter(source))
    first = pacer.take()
    taken: list[PacedRequest | None] = []
    waiter = threading.Thread(target=lambda: taken.append(pacer.take()))
    waiter.start()
    assert first
    pacer.done(first)
    waiter.join(10)
    assert taken[0]
    assert taken[0].access.request_id == "1"


def test_a_stop_wakes_waiting_slots() -> None:
    """After a stop no slot gets a request, also not one that waited for a session."""
    pacer = RequestPacer(iter([due(0, None, "a"), due(1, None, "a")]))
    pacer.take()
    taken: list[PacedRequest | None] = []
    waiter = threading.Thread(target=lambda: taken.append(pacer.take()))
    waiter.start()
    pacer.stop()
    waiter.join(10)
    assert taken == [None]
    assert pacer.take() is None


@pytest.mark.parametrize("settings", [{"warmup_requests": 2}, {"warmup_s": 2.0}])
def test_requests_of_the_warm_up_are_marked(settings: dict[str, float]) -> None:
    """The warm-up is a number of requests, or a time."""
    source = iter([due(number, float(number)) for number in range(4)])
    pacer = RequestPacer(source, clock=FakeClock(), **settings)  # type: ignore[arg-type]
    taken = [pacer.take() for _ in range(4)]
    assert [one.warm_up for one in taken if one] == [True, True, False, False]


def test_engines_share_a_workload_without_overlap() -> None:
    """Two engines take each access once, and all turns of a session."""
    scenario = Scenario(ModelConfig("tiny-llama"), Chat(num_sessions=3), engines=2)
    shares = [
        list(
            names(
                RequestPacer(
                    own_requests(EnginePlan("", place, "e", "m", 0, scenario, place))
                )
            )
        )
        for place in (0, 1)
    ]
    ours, theirs = ({name.partition(".")[0] for name in one} for one in shares)
    assert not ours & theirs
    assert len(shares[0] + shares[1]) == len({*shares[0], *shares[1]}) == 12
