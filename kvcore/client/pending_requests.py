"""Pending requests, from the first send to the reply, error or deadline."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kvcore.errors import DeadlineExceeded, KVError
from kvcore.protocol import NO_BOOT, BootToken, Lane, Request

NEVER_NS = 2**63 - 1

Retry = Callable[[KVError], Request[Any] | None]
"""Takes an error; returns the request to send again, or None if the error is final."""
OnLateReply = Callable[[Any], None]
"""Called with a reply that arrived after the deadline; must not block."""


class PendingRequest:
    """A request and its outcome: a reply or an error.

    Only a submitted request has a future. The thread of a call serves the socket
    instead; creating and waking a future would cost 4 us per call.
    """

    __slots__ = (
        "boot", "deadline_ns", "error", "future", "id", "is_done", "is_restoring",
        "num_sends", "on_late_reply", "on_reply", "reply", "request", "retry",
    )  # fmt: skip

    def __init__(
        self,
        request: Request[Any],
        deadline_ns: int,
        retry: Retry | None = None,
        on_late_reply: OnLateReply | None = None,
    ) -> None:
        self.request = request
        self.deadline_ns = deadline_ns
        self.retry = retry
        self.on_late_reply = on_late_reply
        self.id = 0
        self.boot = NO_BOOT
        self.num_sends = 0
        self.is_done = False
        # A repeated registration: not sent again when the server restarts, since the
        # next handshake repeats all registrations.
        self.is_restoring = False
        # Called with the reply before the next frame is read; its exception fails
        # the request.
        self.on_reply: Callable[[Any], None] | None = None
        self.reply: Any = None
        self.error: BaseException | None = None
        self.future: Future[Any] | None = None

    @property
    def can_expire(self) -> bool:
        """Whether the deadline fails the request once it is sent.

        False for a retrieve: the server may write its blocks until it replies or its
        process ends.
        """
        if self.is_done or not self.deadline_ns:
            return False
        return self.request.lane is not Lane.RETRIEVE

    def create_future(self) -> Future[Any]:
        """Attach a future. It cannot be cancelled: the request may be executing."""
        self.future = Future()
        self.future.set_running_or_notify_cancel()
        return self.future

    def succeed(self, reply: Any) -> None:
        """Complete with the reply; pass a late one to `on_late_reply`."""
        if self.is_done:
            if self.on_late_reply is not None:
                self.on_late_reply(reply)
            return
        try:
            if self.on_reply is not None:
                self.on_reply(reply)
        except Exception as error:  # noqa: BLE001 - raised to the caller
            self.fail(error)
            return
        self.is_done = True
        self.reply = reply
        if self.future is not None:
            self.future.set_result(reply)

    def fail(self, error: BaseException) -> None:
        """Complete with an error, unless already complete."""
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
    """Requests that were sent and have no reply. Not thread-safe."""

    def __init__(self) -> None:
        self.by_id: dict[int, PendingRequest] = {}
        self.unsent: deque[PendingRequest] = deque()
        """Requests that wait until the socket and the server have room."""
        self.next_deadline_ns = NEVER_NS
        """A lower bound of all deadlines; replies do not raise it."""

    def __len__(self) -> int:
        return len(self.by_id) + len(self.unsent)

    def add(self, pending: PendingRequest) -> None:
        """Add a request that is about to be sent."""
        self.by_id[pending.id] = pending
        if pending.deadline_ns:
            self.next_deadline_ns = min(self.next_deadline_ns, pending.deadline_ns)

    def wait(self, pending: PendingRequest) -> None:
        """Add a request to `unsent`."""
        self.unsent.append(pending)
        if pending.deadline_ns:
            self.next_deadline_ns = min(self.next_deadline_ns, pending.deadline_ns)

    def defer(self, pending: PendingRequest) -> None:
        """Move a request that could not be sent to the head of `unsent`."""
        del self.by_id[pending.id]
        self.unsent.appendleft(pending)

    def has_boot(self, boot: BootToken) -> bool:
        """Return whether the server with this boot token has pending requests."""
        return any(pending.boot == boot for pending in self.by_id.values())

    def expire(self, now: int) -> None:
        """Fail requests past their deadline and update `next_deadline_ns`."""
        if now < self.next_deadline_ns:
            return
        all_pending = [*self.by_id.values(), *self.unsent]
        expired = [p for p in all_pending if p.can_expire and p.deadline_ns <= now]
        remaining = (
            p.deadline_ns for p in all_pending if p.can_expire and p.deadline_ns > now
        )
        self.next_deadline_ns = min(remaining, default=NEVER_NS)
        for pending in expired:
            # With `on_late_reply` the entry stays, to receive the late reply.
            if pending.on_late_reply is None:
                self.by_id.pop(pending.id, None)
            pending.fail(DeadlineExceeded("no answer before the deadline"))

    def fail(self, error: KVError, boot: BootToken | None = None) -> None:
        """Fail all requests, or those of the server with this boot token."""
        all_pending = [*self.by_id.values(), *self.unsent]
        ended = [p for p in all_pending if boot is None or p.boot == boot]
        for pending in ended:
            self.by_id.pop(pending.id, None)
        gone = set(ended)
        self.unsent = deque(p for p in self.unsent if p not in gone)
        for pending in ended:
            pending.fail(error)
