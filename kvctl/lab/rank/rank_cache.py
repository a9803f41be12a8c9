"""The paged KV cache of a simulated rank: its interface, and one in host memory."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcore.layout import KVLayout
from kvcore.protocol import MemoryHandle, PosixShm
from kvcore.shm import Bytes, Segment
from kvcore.worker.mapped_arena import HostWorkerMemory, WorkerMemory
from kvctl.lab.config.model_geometry import (
    BlockGrid,
    Indices,
    RankCache,
    handle_starts,
)
from kvctl.lab.rank.byte_patterns import POISON, BlockPattern, HostPattern

SEGMENT_PREFIX = "kvlab-"
"""Of the shared memory of every simulated cache."""
WARM_COPY_BYTES = 16 << 20
"""Plain copies up to this size find their host memory touched."""


class RankCacheMemory(ABC):
    """The cache of one rank. Every write or copy has finished when its call returns."""

    handles: tuple[MemoryHandle, ...]
    memory: tuple[Any, ...]
    """Memory of each handle, for a client that copies in its own process."""
    views: tuple[Any, ...]
    """Blocks of each group, `[N, L, K, S, H, words]`."""

    def __init__(self, layout: RankCache) -> None:
        self.groups = layout.groups
        self.num_bytes = sum(layout.handle_bytes)

    @abstractmethod
    def open(
        self, layouts: Sequence[KVLayout], memory: Sequence[Any], arena: Bytes
    ) -> WorkerMemory:
        """Return access to the memory for a client that copies in its own process."""

    def copy_counts(self) -> dict[str, int]:
        """Return this process's copies on a GPU, by method and direction."""
        return {}

    def num_blocks(self, group: int) -> int:
        """Return the blocks of a group."""
        return len(self.views[group])

    def block_bytes(self, group: int) -> int:
        """Return the bytes of a block in all layers of a group."""
        return int(self.views[group][0].nbytes)

    @abstractmethod
    def pattern(self, group: int, rank: int | None, chunk_blocks: int) -> BlockPattern:
        """Return the pattern of a group; `rank` is None if all ranks are equal."""

    @abstractmethod
    def poison(self, group: int, blocks: Indices) -> None:
        """Overwrite blocks, except null blocks (-1)."""

    @abstractmethod
    def copy_out(self, number: int, num_bytes: int) -> None:
        """Make a plain copy to memory that stands for the server's.

        Different numbers use different places, as calls use different blocks.
        """

    @abstractmethod
    def copy_in(self, number: int, num_bytes: int) -> None:
        """Make a plain copy in the other direction; no block changes."""

    @abstractmethod
    def copy_both(self, number: int, num_bytes: int) -> None:
        """Make a plain copy in each direction, concurrently."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory."""


class HostCache(RankCacheMemory):
    """A cache in a shared-memory segment, which the server can map."""

    def __init__(self, name: str, layout: RankCache) -> None:
        super().__init__(layout)
        self.segment = Segment.create(name, self.num_bytes, touch=True)
        array = self.segment.array
        starts = handle_starts(layout)
        spans = list(zip(starts, layout.handle_bytes, strict=True))
        self.handles = tuple(PosixShm(name, start, length) for start, length in spans)
        self.memory = tuple(array[start : start + length] for start, length in spans)
        self.views = tuple(
            BlockGrid.of(group, starts).view(array) for group in self.groups
        )
        # Two places, so that a copy finds neither in a processor's cache.
        self._scratch = np.ones(2 * min(self.num_bytes, WARM_COPY_BYTES), np.uint8)

    def open(
        self, layouts: Sequence[KVLayout], memory: Sequence[Bytes], arena: Bytes
    ) -> HostWorkerMemory:
        """Return access to the memory for a client that copies in its own process."""
        return HostWorkerMemory(layouts, memory, arena)

    def pattern(self, group: int, rank: int | None, chunk_blocks: int) -> HostPattern:
        """Return the pattern of a group; see `RankCacheMemory`."""
        return HostPattern(self.views[group], group, rank, chunk_blocks)

    def poison(self, group: int, blocks: Indices) -> None:
        """Overwrite blocks, except null blocks (-1)."""
        view = self.views[group]
        view[blocks[blocks >= 0]] = int.from_bytes([POISON] * view.itemsize, "little")

    def copy_out(self, number: int, num_bytes: int) -> None:
        """Make a plain copy from the cache to private memory."""
        np.copyto(*self._copy_operands(number, num_bytes))

    def copy_in(self, number: int, num_bytes: int) -> None:
        """Do the same: in host memory both directions cost the same."""
        self.copy_out(number, num_bytes)

    def copy_both(self, number: int, num_bytes: int) -> None:
        """Make two plain copies, each in a thread."""
        first, second = (
            self._copy_operands(2 * number + which, num_bytes) for which in (0, 1)
        )
        thread = threading.Thread(target=np.copyto, args=second)
        thread.start()
        np.copyto(*first)
        thread.join()

    def _copy_operands(self, number: int, num_bytes: int) -> tuple[Bytes, Bytes]:
        """Return target and source of a plain copy."""
        if 2 * num_bytes > self._scratch.size:
            self._scratch = np.ones(2 * num_bytes, np.uint8)
        return (
            _rotating_slice(self._scratch, number, num_bytes),
            _rotating_slice(self.segment.array, number, num_bytes),
        )

    def close(self) -> None:
        """Unmap the memory and remove its name."""
        self.views = self.memory = ()
        self.segment.unlink()
        self.segment.close()


def _rotating_slice(array: Bytes, number: int, num_bytes: int) -> Bytes:
    """Return a different slice for every number, as far as the array has room.

    Repeated copies to the same bytes would measure a processor's cache.
    """
    start = number % (array.size // num_bytes) * num_bytes
    return array[start : start + num_bytes]
