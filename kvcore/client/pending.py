"""A request under way, from the first send to its one answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kvcore.errors import KVError
from kvcore.protocol import NO_BOOT, Lane, Request

Retry = Callable[[KVError], Request[Any] | None]
"""Given an error, returns the request to send in its place, or None to let it be."""
Late = Callable[[Any], None]
"""Given a reply that came when nobody waited any more; must not wait for others."""


class Pending:
    """A request on its way, and its answer when that has come.

    Only a request that somebody submitted has a future: for a call, whose thread
    itself waits at the socket, making and waking one would cost 4 us.
    """

    __slots__ = (
        "boot", "deadline_ns", "error", "future", "id", "is_done", "is_restoring",
        "late", "num_sends", "reply", "request", "retry",
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
