"""A thread that runs posted calls in order, and timers at their time."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic

log = logging.getLogger(__name__)

Call = Callable[[], None]


@dataclass(order=True, slots=True)
class Timer:
    """A call scheduled for a time of the clock."""

    when: float
    number: int
    call: Call | None = field(compare=False)

    def cancel(self) -> None:
        """Prevent the call."""
        self.call = None


class TimerThread:
    """Runs calls one after another on one thread.

    State that only these calls change needs no lock. A call that raises is logged, and
    the next one runs.
    """

    def __init__(self, name: str, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self._name = name
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._timers: list[Timer] = []
        self._numbers = count()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Start the thread. Without it, `run_due` runs the calls."""
        self._thread = Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def post(self, call: Call) -> None:
        """Run a call soon. Any thread."""
        self._calls.put(call)

    def at(self, when: float, call: Call) -> Timer:
        """Run a call at a time of `clock`. Only from calls that run here."""
        timer = Timer(when, next(self._numbers), call)
        heapq.heappush(self._timers, timer)
        return timer

    def run_due(self) -> None:
        """Run posted calls and due timers in the calling thread; for tests."""
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                if not self._run_timer():
                    return
            else:
                _attempt(call)

    def close(self) -> None:
        """Run the calls posted so far, then end the thread; timers are dropped."""
        if self._thread is None:
            self.run_due()
            return
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=self._wait_s())
            except Empty:
                self._run_timer()
                continue
            if call is None:
                return
            _attempt(call)
            self._run_timer()

    def _wait_s(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, self._timers[0].when - self.clock())

    def _run_timer(self) -> bool:
        """Run the first timer if it is due; return whether it was."""
        if not self._timers or self._timers[0].when > self.clock():
            return False
        _attempt(heapq.heappop(self._timers).call)
        return True


def _attempt(call: Call | None) -> None:
    if call is None:
        return
    try:
        call()
    except Exception:
        log.exception("a call failed")
