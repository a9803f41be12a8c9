"""Requests under way, from the first send to the one answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kvcore.errors import DeadlineExceeded, KVError
from kvcore.protocol import NO_BOOT, BootToken, Lane, Request

NEVER_NS = 2**63 - 1

Retry = Callable[[KVError], Request[Any] | None]
"""Given an error, returns the request to send in its place, or None to let it be."""
Late = Callable[[Any], None]
"""Given a reply that came when nobody waited any more; must not wait for others."""


class PendingRequest:
    """A request on its way, and its answer when that has come.

    Only a request that somebody submitted has a future: for a call, whose thread
    itself waits at the socket, making and waking one would cost 4 us.
    """

    __slots__ = (
        "boot", "deadline_ns", "error", "future", "id", "is_done", "is_restoring",
        "late", "num_sends", "reply", "request", "retry", "taken",
    )  # fmt: skip

    def __init__(
        self,
        request: Request[Any],
        deadline_ns: int,
        retry: Retry | None = None,
        late: Late | None = None,
    ) -> None:
        self.request = request
        self.deadline_ns = deadline_ns
        self.retry = retry
        self.late = late
        self.id = 0
        self.boot = NO_BOOT
        self.num_sends = 0
        self.is_done = False
        # Every run of the server is told anew, so another never gets this one.
        self.is_restoring = False
        # Told of the reply before anything else is received; may refuse it.
        self.taken: Callable[[Any], None] | None = None
        self.reply: Any = None
        self.error: BaseException | None = None
        self.future: Future[Any] | None = None

    @property
    def expires(self) -> bool:
        """Whether its deadline ends it once it is sent.

        Not a retrieve's: until the server answers or is gone it may still write.
        """
        if self.is_done or not self.deadline_ns:
            return False
        return self.request.lane is not Lane.RETRIEVE

    def promise(self) -> Future[Any]:
        """Give it a future, which nobody can cancel: the server may be at it."""
        self.future = Future()
        self.future.set_running_or_notify_cancel()
        return self.future

    def succeed(self, reply: Any) -> None:
        """End it with its reply, or hand on what comes when it has ended."""
        if self.is_done:
            if self.late is not None:
                self.late(reply)
            return
        try:
            if self.taken is not None:
                self.taken(reply)
        except Exception as error:  # noqa: BLE001 - raised to whoever asked
            self.fail(error)
            return
        self.is_done = True
        self.reply = reply
        if self.future is not None:
            self.future.set_result(reply)

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it has ended."""
        if self.is_done:
            return
        self.is_done = True
        self.error = error
        if self.future is not None:
            self.future.set_exception(error)

    def result(self) -> Any:
        """Return the reply or raise the error."""
        if self.error is not None:
            raise self.error
        return self.reply


class PendingTable:
    """What was sent and is not answered. For who holds the socket."""

    def __init__(self) -> None:
        self.by_id: dict[int, PendingRequest] = {}
        self.unsent: deque[PendingRequest] = deque()
        """Ends of work that found the socket's queue full."""
        self.earliest_ns = NEVER_NS
        """No deadline is before this; answers do not raise it."""

    def __len__(self) -> int:
        return len(self.by_id) + len(self.unsent)

    def add(self, pending: PendingRequest) -> None:
        """Enter a request that is about to be sent."""
        self.by_id[pending.id] = pending
        if pending.deadline_ns:
            self.earliest_ns = min(self.earliest_ns, pending.deadline_ns)

    def set_aside(self, pending: PendingRequest) -> None:
        """Keep what could not be sent just now."""
        del self.by_id[pending.id]
        self.unsent.append(pending)

    def has(self, boot: BootToken) -> bool:
        """Say whether a run has been asked what it has not answered."""
        return any(pending.boot == boot for pending in self.by_id.values())

    def expire(self, now: int) -> None:
        """End what is past its deadline, and find the earliest of the rest."""
        if now < self.earliest_ns:
            return
        all_posted = [*self.by_id.values(), *self.unsent]
        late = [p for p in all_posted if p.expires and p.deadline_ns <= now]
        left = (p.deadline_ns for p in all_posted if p.expires and p.deadline_ns > now)
        self.earliest_ns = min(left, default=NEVER_NS)
        for pending in late:
            # A late reply is handed on by what is still there.
            if pending.late is None:
                self.by_id.pop(pending.id, None)
            pending.fail(DeadlineExceeded("no answer before the deadline"))

    def fail(self, error: KVError, boot: BootToken | None = None) -> None:
        """End what one run was asked, or all of them: it can write no more."""
        all_posted = [*self.by_id.values(), *self.unsent]
        ended = [p for p in all_posted if boot is None or p.boot == boot]
        for pending in ended:
            self.by_id.pop(pending.id, None)
        self.unsent = deque(p for p in self.unsent if p not in ended)
        for pending in ended:
            pending.fail(error)
