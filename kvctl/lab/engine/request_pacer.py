"""Hands out requests when they are due, and says how late each one begins."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

from kvctl.lab.workload.access_generators import Access, Tokens
from kvctl.lab.workload.arrivals import Due


class Clock:
    """The time, and how to wait for it; tests set their own."""

    def now(self) -> float:
        """Return seconds on the host's monotonic clock."""
        return monotonic()

    def wait(self, changed: threading.Condition, timeout_s: float | None) -> None:
        """Wait for a change, at most so long; the lock is held on both sides."""
        changed.wait(timeout_s)


@dataclass(frozen=True, slots=True)
class PacedRequest:
    """A request that begins now. Times are the clock's."""

    access: Access
    tokens: Tokens
    due_s: float
    """Latency counts from here; in a closed loop, the moment there was room."""
    begun_s: float
    lag_s: float
    """Of that, what the generator itself was late: it was due and a slot was free."""
    step: int
    warm_up: bool


@dataclass(frozen=True, slots=True)
class _Freed:
    """A parked request whose session is free again, since `due_s`."""

    head: Due
    due_s: float


class RequestPacer:
    """One engine's share of the workload. Slots take from it; any thread may call.

    A session has one request under way: a user sends the next turn after reading the
    answer. In an open loop the next turn is then due at its time or when the one
    before it has ended, whichever is later, and other sessions go on meanwhile. In a
    closed loop all wait behind it, so that the order is the workload's.
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
        self._head_tokens: Tokens | None = None
        self._exhausted = False
        self._led = False
        """A slot waits for the head's time; the others wait for that one."""
        self._active: set[str] = set()
        self._parked: dict[str, deque[Due]] = {}
        """Due, but their session has another request under way."""
        self._released: deque[_Freed] = deque()
        self._stopped = False
        self.next_index = 0
        """Of the workload, behind the last one that began."""

    def start(self, epoch_s: float) -> None:
        """Set the time that all others count from."""
        self.epoch_s = epoch_s

    def take(self) -> PacedRequest | None:
        """Wait for the next request that is due; None when no more is to begin.

        Raises:
            SetupError: from a trace reader.
        """
        with self._changed:
            free_s = self._clock.now()
            while not self._stopped:
                taken = self._pop_released(free_s) or self._pop_head(free_s)
                if taken is not None:
                    self._active.add(taken.access.session)
                    self._changed.notify()
                    return taken
                if self._exhausted and not self._parked:
                    return None
                self._wait()
            return None

    def done(self, taken: PacedRequest) -> None:
        """Say that a request has ended."""
        with self._changed:
            session = taken.access.session
            self._active.discard(session)
            waiting = self._parked.get(session)
            if waiting:
                self._release(session, waiting)
            self._changed.notify_all()

    @property
    def num_under_way(self) -> int:
        """Requests that have begun and not ended."""
        with self._changed:
            return len(self._active)

    def stop(self) -> None:
        """Hand out no more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait(self) -> None:
        lead = not self._led and self._head is not None
        if lead:
            self._led = True
        try:
            self._clock.wait(self._changed, self._until_head() if lead else None)
        finally:
            if lead:
                self._led = False

    def _until_head(self) -> float | None:
        """Return the seconds until the head is due; None when it waits for another."""
        if self._head is None or self._head.at_s is None:
            return None
        return max(0.0, self.epoch_s + self._head.at_s - self._clock.now())

    def _pop_released(self, free_s: float) -> PacedRequest | None:
        if not self._released:
            return None
        freed = self._released.popleft()
        lag_s = self._clock.now() - max(freed.due_s, free_s)
        return self._taken(freed.head, None, freed.due_s, lag_s)

    def _pop_head(self, free_s: float) -> PacedRequest | None:
        """Return the head if it is due; those whose session is busy are parked."""
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
        """Return the next of the source; its prompt is made now, ahead of its time."""
        if self._head is None and not self._exhausted:
            self._head = next(self._source, None)
            self._exhausted = self._head is None
            if self._head is not None:
                self._head_tokens = self._head.access.tokens()
        return self._head

    def _pop(self, head: Due, due_s: float, lag_s: float) -> PacedRequest:
        tokens, self._head, self._head_tokens = self._head_tokens, None, None
        return self._taken(head, tokens, due_s, lag_s)

    def _release(self, session: str, waiting: deque[Due]) -> None:
        """Let a session's next request begin, due now."""
        head = waiting.popleft()
        if not waiting:
            del self._parked[session]
        self._active.add(session)
        self._released.append(_Freed(head, self._clock.now()))

    def _taken(
        self, head: Due, tokens: Tokens | None, due_s: float, lag_s: float
    ) -> PacedRequest:
        now = self._clock.now()
        self.next_index = max(self.next_index, head.index + 1)
        return PacedRequest(
            access=head.access,
            tokens=head.access.tokens() if tokens is None else tokens,
            due_s=due_s,
            begun_s=now,
            lag_s=lag_s,
            step=head.step,
            warm_up=head.index < self._warmup_requests
            or now - self.epoch_s < self._warmup_s,
        )
