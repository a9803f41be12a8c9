"""A played worker's paged cache: its memory, and views of its own into it.

The views are made here from the registered tensors, with numpy's strides and without
the transport that the server copies with, so that one checks the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcore.layout import DTYPE_BYTES, CacheGroup
from kvcore.protocol import PosixShm
from kvcore.shm import Segment
from kvctl.lab.geometry import RankCache

POISON = 0xA5
"""What blocks hold before a retrieve, so that one that writes nothing shows."""

LOGICAL_AXES = "NLKSHD"
"""Layers before K and V, as in every known engine: numpy keeps memory's order."""

Words = npt.NDArray[np.uint64] | npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32]


class PagedCache:
    """One rank's cache in a segment that it owns."""

    def __init__(self, name: str, cache: RankCache) -> None:
        self.groups = cache.groups
        self.segment = Segment.create(name, sum(cache.handle_bytes), touch=True)
        starts = np.cumsum((0, *cache.handle_bytes[:-1])).tolist()
        self.handles = tuple(
            PosixShm(name, start, length)
            for start, length in zip(starts, cache.handle_bytes, strict=True)
        )
        array = self.segment.array
        self.memory = tuple(
            array[start : start + length]
            for start, length in zip(starts, cache.handle_bytes, strict=True)
        )
        self.views = tuple(logical_view(array, group, starts) for group in self.groups)

    def poison(self, group: int, blocks: Indices) -> None:
        """Overwrite blocks; null ones (-1) are left out."""
        view = self.views[group]
        view[blocks[blocks >= 0]] = int.from_bytes([POISON] * view.itemsize, "little")

    def close(self) -> None:
        """Let go of the memory and remove its name."""
        self.views = self.memory = ()
        self.segment.unlink()
        self.segment.close()


def logical_view(
    memory: npt.NDArray[np.uint8], group: CacheGroup, starts: Sequence[int]
) -> Words:
    """View a group as `[N, L, K, S, H, words]`, whatever order its memory has.

    `starts` are the handles' offsets in `memory`. Axes that the group lacks have size
    one; an opaque page is one row of words. Words are eight bytes where a row of D
    allows it, else one.
    """
    first = group.tensors[0]
    sizes = dict(zip(group.axes.replace("P", "D"), first.shape, strict=True))
    strides = dict(zip(group.axes.replace("P", "D"), first.strides, strict=True))
    item = DTYPE_BYTES[group.dtype]
    row_bytes = sizes["D"] * item
    word = 8 if row_bytes % 8 == 0 else 1
    sizes["D"], strides["D"] = row_bytes // word, word
    offsets = [starts[tensor.handle] + tensor.offset for tensor in group.tensors]
    if "L" not in sizes:
        sizes["L"] = len(offsets)
        strides["L"] = offsets[1] - offsets[0] if len(offsets) > 1 else row_bytes
    return np.ndarray(
        tuple(sizes.get(axis, 1) for axis in LOGICAL_AXES),
        np.uint64 if word == 8 else np.uint8,
        memory.data,
        offsets[0],
        tuple(strides.get(axis, word) for axis in LOGICAL_AXES),
    )
