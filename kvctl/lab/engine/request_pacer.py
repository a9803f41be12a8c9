"""Paces an engine's requests: each begins when it is due and a slot is free."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

import numpy as np

from kvctl.lab.traces.trace_rows import Tokens
from kvctl.lab.workload.access_generators import Access
from kvctl.lab.workload.arrivals import Due


class Clock:
    """The time, and waits for it; tests replace it."""

    def now(self) -> float:
        """Return seconds on the host's monotonic clock."""
        return monotonic()

    def wait(self, changed: threading.Condition, timeout_s: float | None) -> None:
        """Wait for a notification, at most `timeout_s`; the caller holds the lock."""
        changed.wait(timeout_s)


@dataclass(frozen=True, slots=True)
class PacedRequest:
    """A request that begins now. Times are those of the clock."""

    access: Access
    tokens: Tokens
    due_s: float
    """Start of its latency; in a closed loop, the time when a slot was free."""
    begun_s: float
    lag_s: float
    """Delay by the load generator: the request was due and a slot was free."""
    step: int
    warm_up: bool


class RequestPacer:
    """The queue of one engine's requests, from which its slots take. Thread-safe.

    A session has one request in progress: a user reads the answer before the next
    turn. In an open loop the next turn is due at its arrival time or at the end of the
    previous one, whichever is later, while other sessions continue. In a closed loop
    all later requests wait for it, which keeps the order of the workload.
    """

    def __init__(
        self,
        source: Iterator[Due],
        *,
        warmup_requests: int = 0,
        warmup_s: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or Clock()
        self._changed = threading.Condition()
        self._source = source
        self._warmup_requests = warmup_requests
        self._warmup_s = warmup_s
        self.epoch_s = self._clock.now()
        self._head: Due | None = None
        self._head_tokens: Tokens = np.empty(0, np.uint32)
        self._exhausted = False
        self._has_leader = False
        """A slot sleeps until the head is due; the others wait for it."""
        self._active: set[str] = set()
        self._parked: dict[str, deque[Due]] = {}
        """Due, but their session has another request in progress."""
        self._released: deque[tuple[Due, float]] = deque()
        """Requests that were parked, and when their session's previous one ended."""
        self._stopped = False
        self.next_index = 0
        """Index in the workload after the last request that began."""

    def start(self, epoch_s: float) -> None:
        """Set the start of the load."""
        self.epoch_s = epoch_s

    def take(self) -> PacedRequest | None:
        """Wait for the next due request; None after the last one, or after `stop`.

        Raises:
            SetupError: from a trace reader.
        """
        with self._changed:
            free_s = self._clock.now()
            while not self._stopped:
                request = self._pop_released(free_s) or self._pop_head(free_s)
                if request is not None:
                    self._active.add(request.access.session)
                    self._changed.notify()
                    return request
                if self._exhausted and not self._parked:
                    return None
                self._wait()
            return None

    def done(self, request: PacedRequest) -> None:
        """Record that a request has ended."""
        with self._changed:
            session = request.access.session
            self._active.discard(session)
            if waiting := self._parked.get(session):
                self._active.add(session)
                self._released.append((waiting.popleft(), self._clock.now()))
                if not waiting:
                    del self._parked[session]
            self._changed.notify_all()

    @property
    def num_in_progress(self) -> int:
        """Number of requests in progress."""
        with self._changed:
            return len(self._active)

    def stop(self) -> None:
        """Begin no more requests."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait(self) -> None:
        lead = not self._has_leader and self._head is not None
        if lead:
            self._has_leader = True
        try:
            self._clock.wait(self._changed, self._until_head() if lead else None)
        finally:
            if lead:
                self._has_leader = False

    def _until_head(self) -> float | None:
        """Return the seconds until the head is due; None in a closed loop."""
        if self._head is None or self._head.at_s is None:
            return None
        return max(0.0, self.epoch_s + self._head.at_s - self._clock.now())

    def _pop_released(self, free_s: float) -> PacedRequest | None:
        if not self._released:
            return None
        head, due_s = self._released.popleft()
        lag_s = self._clock.now() - max(due_s, free_s)
        return self._make(head, head.access.tokens(), due_s, lag_s)

    def _pop_head(self, free_s: float) -> PacedRequest | None:
        """Return the head if it is due; park it while its session is busy."""
        while (head := self._peek()) is not None:
            now = self._clock.now()
            if head.at_s is None:
                if head.access.session in self._active:
                    return None
                return self._pop(head, due_s=now, lag_s=0.0)
            due_s = self.epoch_s + head.at_s
            if now < due_s:
                return None
            if head.access.session in self._active:
                self._parked.setdefault(head.access.session, deque()).append(head)
                self._head = None
                continue
            return self._pop(head, due_s, now - max(due_s, free_s))
        return None

    def _peek(self) -> Due | None:
        """Return the next request; its prompt is generated before it is due."""
        if self._head is None and not self._exhausted:
            self._head = next(self._source, None)
            self._exhausted = self._head is None
            if self._head is not None:
                self._head_tokens = self._head.access.tokens()
        return self._head

    def _pop(self, head: Due, due_s: float, lag_s: float) -> PacedRequest:
        tokens, self._head = self._head_tokens, None
        return self._make(head, tokens, due_s, lag_s)

    def _make(
        self, head: Due, tokens: Tokens, due_s: float, lag_s: float
    ) -> PacedRequest:
        now = self._clock.now()
        self.next_index = max(self.next_index, head.index + 1)
        return PacedRequest(
            access=head.access,
            tokens=tokens,
            due_s=due_s,
            begun_s=now,
            lag_s=lag_s,
            step=head.step,
            warm_up=head.index < self._warmup_requests
            or now - self.epoch_s < self._warmup_s,
        )
