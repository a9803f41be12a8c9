"""When a store that failed is asked again: back off, then let one call probe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]

_MAX_BACKOFF = 16
"""The back-off doubles with every failed probe, to so many times the first."""


@dataclass(frozen=True, slots=True)
class BreakerState:
    """Up or down since a Unix time, and what was last wrong.

    A store is not up before it has answered once.
    """

    up: bool
    since: float
    last_error: str
    num_failures: int


class CircuitBreaker:
    """Says who may ask a store; thread-safe.

    While it is down nobody may, until the back-off is over; then one call may (the
    probe), and others again when it succeeded, or when it has not come back within
    `probe_s`.
    """

    def __init__(
        self, backoff_s: float, probe_s: float, clock: Clock = time.monotonic
    ) -> None:
        self._backoff_s = backoff_s
        self._probe_s = probe_s
        self._clock = clock
        self._lock = threading.Lock()
        self._tries = 0
        """Failures in a row; 0 is up."""
        self._retry_at = 0.0
        self._probing = False
        self._up = False
        self._since = time.time()
        self._last_error = "it has not answered yet"
        self._num_failures = 0

    def admit(self) -> bool:
        """Say whether a call may go ahead; who is told so MUST report its end."""
        if not self._tries:
            return True
        with self._lock:
            now = self._clock()
            if self._tries and now < self._retry_at:
                return False
            self._probing = True
            self._retry_at = now + self._probe_s
            return True

    def succeed(self) -> bool:
        """Note that the store answered; return whether that is news."""
        if self._up:
            return False
        with self._lock:
            was_up, self._up = self._up, True
            self._tries = 0
            self._probing = False
            self._since = time.time()
            if not self._num_failures:
                self._last_error = ""
            return not was_up

    def fail(self, error: str) -> bool:
        """Note that it did not; return whether that is news."""
        with self._lock:
            if self._tries and not self._probing:
                return False  # One of many calls that met the same failure.
            if not self._tries:
                self._num_failures += 1
                self._since = time.time()
            self._tries += 1
            self._up = False
            self._probing = False
            factor = min(2 ** (self._tries - 1), _MAX_BACKOFF)
            self._retry_at = self._clock() + self._backoff_s * factor
            self._last_error = error
            return self._tries == 1

    def state(self) -> BreakerState:
        """Return the state of this moment."""
        with self._lock:
            return BreakerState(
                self._up, self._since, self._last_error, self._num_failures
            )
