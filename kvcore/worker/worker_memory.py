"""How a worker that copies itself reaches its own memory, and the arena it mapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvcore.copy.host_cache import HostCache
from kvcore.copy.paged_cache import PagedCache
from kvcore.layout import KVLayout
from kvcore.shm import Bytes


class WorkerMemory(Protocol):
    """One instance's memory beside one run's arena."""

    @property
    def caches(self) -> tuple[PagedCache, ...]:
        """A cache for each group, in order."""

    def close(self) -> None:
        """Let go of what the copies needed, once all have ended. May block."""


OpenWorkerMemory = Callable[[Sequence[KVLayout], Sequence[Any], Bytes], WorkerMemory]
"""Makes it, of layouts, memory and arena. May take its time: not in a thread that
serves requests. What it raises, the copies that wait for it raise."""


class HostWorkerMemory:
    """Memory of this process, flat and writable; see `WorkerMemory`."""

    def __init__(
        self, layouts: Sequence[KVLayout], memory: Sequence[Bytes], arena: Bytes
    ) -> None:
        del arena  # Copied to and from as it is.
        self.caches = tuple(HostCache(layout, memory) for layout in layouts)

    def close(self) -> None:
        """End the threads that help to copy."""
        for cache in self.caches:
            cache.close()
