"""What a played worker's cache is, wherever its memory lies, and how it is laid out.

The views are made here from the registered tensors, with strides of their own and
without the transport that the server copies with, so that one checks the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvcore.layout import DTYPE_BYTES, CacheGroup, KVLayout
from kvcore.protocol import MemoryHandle
from kvcore.shm import Bytes
from kvcore.worker.worker_memory import WorkerMemory
from kvctl.lab.model_geometry import RankCache

POISON = 0xA5
"""What blocks hold before a retrieve, so that one that writes nothing shows."""

LOGICAL_AXES = "NLKSHD"
"""Layers before K and V, as in every known engine: numpy keeps memory's order."""

Words = npt.NDArray[np.uint64] | npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32]
Seeds = npt.NDArray[np.uint64]

WARM_COPY_BYTES = 16 << 20
"""Plain copies of so many bytes find their host memory touched."""


class Pattern(Protocol):
    """Writes and checks one group's blocks; see `kvctl.lab.rank.byte_patterns`."""

    def write(self, seeds: Seeds, blocks: Indices) -> None:
        """Write the chunks' bytes into blocks; null ones (-1) are left out."""

    def count_wrong_bytes(self, seeds: Seeds, blocks: Indices) -> int:
        """Compare blocks with the chunks' bytes; null ones (-1) are left out."""


class RankCacheMemory(Protocol):
    """One rank's cache, in whatever memory its engine would have it.

    What is written, poisoned or copied is done when the call returns.
    """

    groups: tuple[CacheGroup, ...]
    handles: tuple[MemoryHandle, ...]
    memory: tuple[Any, ...]
    """Of each handle, for a client that copies itself."""
    num_bytes: int

    def open(
        self, layouts: Sequence[KVLayout], memory: Sequence[Any], arena: Bytes
    ) -> WorkerMemory:
        """Reach the memory for such a client."""

    def ways(self) -> dict[str, int]:
        """Count what this process has copied on a GPU, by way and direction."""

    def num_blocks(self, group: int) -> int:
        """Blocks of a group."""

    def block_bytes(self, group: int) -> int:
        """Bytes of a block in all layers of a group."""

    def pattern(self, group: int, rank: int | None, chunk_blocks: int) -> Pattern:
        """Return what fills and checks a group; `rank` is None where all are alike."""

    def poison(self, group: int, blocks: Indices) -> None:
        """Overwrite blocks; null ones (-1) are left out."""

    def copy_out(self, number: int, num_bytes: int) -> None:
        """Copy plainly to memory that stands for the server's.

        Each number has places of its own, as far as there are, as calls have blocks.
        """

    def copy_in(self, number: int, num_bytes: int) -> None:
        """Copy as many bytes the other way, to no block of the cache."""

    def copy_both(self, number: int, num_bytes: int) -> None:
        """Copy as many bytes each way at the same time."""

    def close(self) -> None:
        """Let go of the memory."""


def handle_starts(cache: RankCache) -> list[int]:
    """Return where each handle begins when they lie one behind the other."""
    starts: list[int] = np.cumsum((0, *cache.handle_bytes[:-1])).tolist()
    return starts


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """A group as `[N, L, K, S, H, words]`, whatever order its memory has.

    Offset and strides are in bytes. Axes that the group lacks have size one; an opaque
    page is one row of words. Words are eight bytes where a row of D allows it, else
    one.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    word: int

    @classmethod
    def of(cls, group: CacheGroup, starts: Sequence[int]) -> BlockGrid:
        """Lay out a group whose handles begin at `starts` of one memory."""
        first = group.tensors[0]
        sizes = dict(zip(group.axes.replace("P", "D"), first.shape, strict=True))
        strides = dict(zip(group.axes.replace("P", "D"), first.strides, strict=True))
        row_bytes = sizes["D"] * DTYPE_BYTES[group.dtype]
        word = 8 if row_bytes % 8 == 0 else 1
        sizes["D"], strides["D"] = row_bytes // word, word
        offsets = [starts[tensor.handle] + tensor.offset for tensor in group.tensors]
        if "L" not in sizes:
            sizes["L"] = len(offsets)
            strides["L"] = offsets[1] - offsets[0] if len(offsets) > 1 else row_bytes
        return cls(
            tuple(sizes.get(axis, 1) for axis in LOGICAL_AXES),
            tuple(strides.get(axis, word) for axis in LOGICAL_AXES),
            offsets[0],
            word,
        )
