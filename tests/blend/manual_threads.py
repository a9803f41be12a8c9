"""Lanes and a timer thread whose work the test runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from kvcore.blend import blend_engine as blend_engine
from kvcore.blend import matchers
from kvcore.engine import lookups
from kvcore.tiers.timer_thread import Call, Timer, TimerThread


@dataclass
class ManualLane:
    """Lane of one direction; the test runs each copy."""

    queue: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = field(
        default_factory=list
    )

    def submit(self, call: Callable[..., Any], *args: Any, **named: Any) -> Future[Any]:
        """Queue a copy."""
        future: Future[Any] = Future()
        args = (*args, named)
        self.queue.append((future, call, args))
        return future

    def shutdown(self, **_: bool) -> None:
        """Cancel queued copies; none is running."""
        for future, _, _ in self.queue:
            future.cancel()
            future.set_running_or_notify_cancel()
        self.queue.clear()


class SteppedClock(TimerThread):
    """Timer thread that runs posted calls in `run_due` and collects their errors."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        super().__init__(name, lambda: clock() + self.ahead)
        self.errors: list[Exception] = []
        self.ahead = 0.0

    def start(self) -> None:
        """Start no thread."""

    def post(self, call: Call) -> None:
        """Run a call at the next `run_due`."""
        super().post(lambda: self._try(call))

    def at(self, when: float, call: Call) -> Timer:
        """Run a call at the first `run_due` after a time."""
        return super().at(when, lambda: self._try(call))

    def _try(self, call: Call) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the test checks `errors`
            self.errors.append(error)


def small_steps() -> ExitStack:
    """Reduce step sizes, so that short prompts make the engine yield."""
    stack = ExitStack()
    for place, name, number in (
        (matchers, "MATCH_STEP", 2),
        (blend_engine, "MATCH_STEP", 2),
        (matchers, "SLICE_WINDOWS", 8),
        (lookups, "ACQUIRE_CHUNKS", 2),
    ):
        stack.enter_context(mock.patch.object(place, name, number))
    return stack
