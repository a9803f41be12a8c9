"""The context of a request, and replies that come later."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class RequestContext:
    """The client that sent a request, and its deadline."""

    client: Hashable
    pid: int
    deadline_ns: int = 0
    """On the host's monotonic clock, in ns; 0 for none."""
    is_watched: bool = False
    """Whether a pidfd reports the end of its process."""
    scope: bytes = b""
    """Digest of the client's engine key."""


@dataclass(frozen=True, slots=True)
class DeferredReply:
    """A reply that waits for work on another thread.

    When the future is done, however it ended, the loop thread calls `finish` once:
    it returns the reply or raises. What the work needs until then is in `resources`,
    which `finish` releases.
    """

    future: Future[Any]
    make_reply: Callable[[], msgspec.Struct]
    resources: ExitStack = field(default_factory=ExitStack)

    def finish(self) -> msgspec.Struct:
        """Return the reply or raise; the resources are released after either."""
        with self.resources:
            return self.make_reply()
