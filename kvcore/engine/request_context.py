"""Who asks, and work whose answer comes later."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class RequestContext:
    """The client that a request came from, and how long it waits."""

    client: Hashable
    pid: int
    deadline_ns: int = 0
    """On the host's monotonic clock; 0 waits for ever."""
    is_watched: bool = False
    """Its process's end cannot be missed."""


@dataclass(frozen=True, slots=True)
class DeferredReply:
    """Work on another thread.

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
