"""What a kind of memory has to offer: a way to attach it, and what is attached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from kvcore.copy.paged_cache import PagedCache
from kvcore.layout import KVLayout
from kvcore.status import DeviceStatus


class AttachedMemory(Protocol):
    """One instance's memory. Copies of either direction come from one thread each."""

    @property
    def caches(self) -> tuple[PagedCache, ...]:
        """A cache for each group, in order."""

    @property
    def event(self) -> bytes:
        """Handle of the event that `record` records; empty where there is none."""

    def wait(self, event: bytes, check: Callable[[], None]) -> None:
        """Block until what the worker recorded has ended; now and then `check`.

        Raises:
            UnknownInstance: `abandon` was called.
            HandleError: no event of that handle; or what `check` raises.
        """

    def record(self) -> None:
        """Put our event behind all copies so far, for the worker to wait on."""

    def abandon(self) -> None:
        """The worker is gone: nothing waits for it any more. Any thread."""

    def close(self) -> None:
        """Let go of the memory, once all copies have ended. May block."""


class Transport(Protocol):
    """What reaches one kind of memory."""

    def attach(
        self, handles: Sequence[Any], layouts: Sequence[KVLayout]
    ) -> Future[AttachedMemory]:
        """Reach an instance's memory. Never blocks: what takes long, goes on behind.

        Raises:
            HandleError: at once or by the future.
        """

    def devices(self) -> tuple[DeviceStatus, ...]:
        """Describe the GPUs in use."""

    def close(self) -> None:
        """Let go of what all instances share, once all of them are closed."""
