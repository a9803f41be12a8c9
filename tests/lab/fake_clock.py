"""A clock that tests set."""

from __future__ import annotations

import threading

from kvctl.lab.engine.request_pacer import Clock


class FakeClock(Clock):
    """Time that passes only when somebody waits, or when it is told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Return the time."""
        return self.time

    def wait(self, changed: threading.Condition, timeout_s: float | None) -> None:
        """Let the time pass at once."""
        del changed
        assert timeout_s is not None, "nobody would ever wake this"
        self.time += timeout_s
