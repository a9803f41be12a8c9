"""A played worker's cache in host memory that the server can map."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcore.layout import CacheGroup, KVLayout
from kvcore.protocol import MemoryHandle, PosixShm
from kvcore.shm import Bytes, Segment
from kvcore.worker.worker_memory import HostWorkerMemory
from kvctl.lab.model_geometry import RankCache
from kvctl.lab.rank.byte_patterns import HostPattern
from kvctl.lab.rank.rank_cache import (
    POISON,
    WARM_COPY_BYTES,
    BlockGrid,
    Indices,
    Words,
    handle_starts,
)


class PagedCache:
    """One rank's cache in a segment that it owns."""

    def __init__(self, name: str, cache: RankCache) -> None:
        self.groups = cache.groups
        self.num_bytes = sum(cache.handle_bytes)
        self.segment = Segment.create(name, self.num_bytes, touch=True)
        starts = handle_starts(cache)
        self.handles: tuple[MemoryHandle, ...] = tuple(
            PosixShm(name, start, length)
            for start, length in zip(starts, cache.handle_bytes, strict=True)
        )
        array = self.segment.array
        self.memory = tuple(
            array[start : start + length]
            for start, length in zip(starts, cache.handle_bytes, strict=True)
        )
        self.views = tuple(logical_view(array, group, starts) for group in self.groups)
        # Of two places, so that a copy finds neither in a processor's cache.
        self._scratch = np.ones(2 * min(self.num_bytes, WARM_COPY_BYTES), np.uint8)

    def open(
        self, layouts: Sequence[KVLayout], memory: Sequence[Bytes], arena: Bytes
    ) -> HostWorkerMemory:
        """Reach the memory for a client that copies itself."""
        return HostWorkerMemory(layouts, memory, arena)

    def ways(self) -> dict[str, int]:
        """Count nothing: this is host memory."""
        return {}

    def num_blocks(self, group: int) -> int:
        """Blocks of a group."""
        return len(self.views[group])

    def block_bytes(self, group: int) -> int:
        """Bytes of a block in all layers of a group."""
        return int(self.views[group][0].nbytes)

    def pattern(self, group: int, rank: int | None, chunk_blocks: int) -> HostPattern:
        """Return what fills and checks a group; see `Cache`."""
        return HostPattern(self.views[group], group, rank, chunk_blocks)

    def poison(self, group: int, blocks: Indices) -> None:
        """Overwrite blocks; null ones (-1) are left out."""
        view = self.views[group]
        view[blocks[blocks >= 0]] = int.from_bytes([POISON] * view.itemsize, "little")

    def copy_out(self, number: int, num_bytes: int) -> None:
        """Copy plainly from the cache to memory of the process's own."""
        np.copyto(*self._plain(number, num_bytes))

    # In host memory one direction is as good as the other, and the blocks keep their
    # bytes.
    copy_in = copy_out

    def copy_both(self, number: int, num_bytes: int) -> None:
        """Make two plain copies, each in a thread of its own."""
        places = [self._plain(2 * number + which, num_bytes) for which in (0, 1)]
        other = threading.Thread(target=np.copyto, args=places[1])
        other.start()
        np.copyto(*places[0])
        other.join()

    def _plain(self, number: int, num_bytes: int) -> tuple[Bytes, Bytes]:
        """Return target and source of a plain copy."""
        if 2 * num_bytes > self._scratch.size:
            self._scratch = np.ones(2 * num_bytes, np.uint8)
        return (
            _part(self._scratch, number, num_bytes),
            _part(self.segment.array, number, num_bytes),
        )

    def close(self) -> None:
        """Let go of the memory and remove its name."""
        self.views = self.memory = ()
        self.segment.unlink()
        self.segment.close()


def _part(array: Bytes, number: int, num_bytes: int) -> Bytes:
    """Return one of the array's parts, another for every number while there are.

    Into the same bytes again a processor's cache would take it, and not memory.
    """
    start = number % (array.size // num_bytes) * num_bytes
    return array[start : start + num_bytes]


def logical_view(
    memory: npt.NDArray[np.uint8], group: CacheGroup, starts: Sequence[int]
) -> Words:
    """View a group in host memory as its `BlockGrid` says."""
    grid = BlockGrid.of(group, starts)
    dtype = np.uint64 if grid.word == 8 else np.uint8
    return np.ndarray(grid.shape, dtype, memory.data, grid.offset, grid.strides)
