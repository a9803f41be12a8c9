"""A clock that tests control."""

from __future__ import annotations

import threading

from kvctl.lab.engine.request_pacer import Clock


class FakeClock(Clock):
    """Time that passes only in waits, or when a test sets it."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Return the time."""
        return self.time

    def wait(self, changed: threading.Condition, timeout_s: float | None) -> None:
        """Advance the time immediately."""
        del changed
        assert timeout_s is not None, "this wait would never end"
        self.time += timeout_s
