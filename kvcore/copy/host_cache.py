"""Copies between a paged cache in host memory and the arena.

Two methods, both a few large numpy calls that release the GIL:

- by rows: one `take` (or indexed assignment) over the cache as rows of a block's bytes,
  for all planes of a part at once;
- by runs: one strided copy for each run of consecutive blocks and each group of evenly
  spaced planes. It copies any range, cut blocks included, and is faster where all of
  a chunk's blocks are consecutive.

One thread does not saturate the memory bandwidth: the parts of a large call are shared
among several threads. Checksums are computed while a part is filled, when its bytes are
in the CPU's caches.

tests/benchmarks/test_copies.py measures these copies against a plain copy.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.copy.block_arrays import (
    BlockArray,
    ChunkSpans,
    block_units,
    breaks,
    coalesce,
)
from kvcore.copy.copy_threads import CALLING_THREAD, CopyThreads
from kvcore.extents import NO_CHECKSUM, Checksum, Extent, checksum_of
from kvcore.layout import KVLayout
from kvcore.protocol import NULL_BLOCK
from kvcore.shm import Bytes

CHECKSUM_STEP = 2 << 20
"""Bytes per checksum update: few enough for the CPU's caches, and for few calls."""
_SHARED_RUN = 1 << 20
"""Bytes. Calls whose parts have at least this size and are one run each, as a blend
buffer's, use several threads: a view is copied without the GIL in both directions."""
_NUM_FREE_ROWS = 500
_MIN_ROW = 4096
"""Bytes. An assignment of smaller rows holds the GIL only shortly."""

Rows = npt.NDArray[np.void]
Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Direction:
    """Functions of one copy direction; both take the cache's side first."""

    view: Callable[[Bytes, Bytes], None]
    rows: Callable[[Rows, Index, Rows], None]
    shared_bytes: int
    """Parts of at least this size are copied mostly without the GIL, so that several
    threads are faster; with smaller ones the threads contend for it."""


def _take_rows(cache: Rows, index: Index, part: Rows) -> None:
    # "clip" is the only mode that writes to `out` without an intermediate buffer.
    np.take(cache, index, out=part, mode="clip")


def _put_rows(cache: Rows, index: Index, part: Rows) -> None:
    # numpy holds the GIL while it assigns fewer rows than this.
    split = 1 << max(0, (-(-_NUM_FREE_ROWS // len(index)) - 1).bit_length())
    size = cache.itemsize // split
    if split == 1 or size < _MIN_ROW or cache.itemsize % split:
        cache[index] = part
        return
    fine = index[:, np.newaxis] * split + np.arange(split)
    cache.view(f"V{size}")[fine.ravel()] = part.view(f"V{size}")


_GATHER = _Direction(lambda cache, part: np.copyto(part, cache), _take_rows, 1 << 20)
_SCATTER = _Direction(np.copyto, _put_rows, _NUM_FREE_ROWS * _MIN_ROW)


# Methods of copying a span. Plain integers: numpy takes 2 us to compare an enum member.
_ROWS = 0
_RUNS = 1
_ONE_RUN = 2
"""All blocks of the chunk are consecutive: the run need not be searched for."""


@dataclass(frozen=True, slots=True)
class _Planes:
    """Evenly spaced planes of one handle: `[planes, blocks, units, unit bytes]`."""

    first: int
    view: Bytes


@dataclass(frozen=True, slots=True)
class _RowPlanes:
    """Planes on one row grid: `base[p, 0] + block * step` is the row of a block."""

    first: int
    rows: Rows
    base: Index
    step: int

    def index(self, blocks: BlockArray) -> Index:
        """Return the rows of whole parts, `[spans, planes x blocks]`."""
        rows = blocks[:, np.newaxis].astype(np.intp) * self.step + self.base
        return rows.reshape(len(blocks), self.base.size * blocks.shape[1])


class HostCache:
    """A `PagedCache` in memory that this process has mapped.

    `handles` are flat writable arrays that stay mapped as long as this object is used.
    The constructor checks every view against their sizes. Large copies use
    `num_threads` threads, including the calling one.
    """

    def __init__(
        self,
        layout: KVLayout,
        handles: Sequence[Bytes],
        num_threads: int = 2,
    ) -> None:
        self.layout = layout
        self._threads = CopyThreads(num_threads)
        part = layout.part
        block_bytes = block_units(layout) * part.unit_bytes
        self._strides = (part.plane_bytes, block_bytes, part.unit_bytes, 1)
        self._planes = _even_planes(layout, handles)
        self._row_planes = _row_planes(layout, handles)

    def close(self) -> None:
        """Stop the copy threads; see `PagedCache`."""
        self._threads.close()

    def gather(
        self, spans: ChunkSpans, arena: Bytes, *, checksums: bool = False
    ) -> list[Checksum]:
        """Copy blocks into parts; see `PagedCache`."""
        spans.check(self.layout, nulls=False)
        return self._copy(spans, arena, _GATHER, checksums=checksums)

    def scatter(self, spans: ChunkSpans, arena: Bytes) -> None:
        """Copy parts into blocks; see `PagedCache`."""
        spans.check(self.layout, nulls=True)
        self._copy(spans, arena, _SCATTER)

    def key_views(self) -> Iterator[Bytes]:
        """Yield views of the keys, `[layers, blocks, units, unit bytes]` each.

        For caches in token order, whose first planes are those of K.
        """
        for planes in self._planes:
            keys = planes.view[: max(self.layout.part.num_layers - planes.first, 0)]
            if len(keys):
                yield keys

    def _copy(
        self,
        spans: ChunkSpans,
        arena: Bytes,
        direction: _Direction,
        *,
        checksums: bool = False,
    ) -> list[Checksum]:
        blocks, tokens = spans.blocks, spans.tokens.tolist()
        methods = self._methods(spans)
        method_of = methods.tolist()
        rows = self._rows(blocks, methods == _ROWS)
        step = CHECKSUM_STEP if checksums else sys.maxsize
        made = [NO_CHECKSUM] * len(spans) if checksums else []

        def copy(number: int) -> None:
            part = _PartWriter(arena, spans.extents[number], direction, self._strides)
            if method_of[number] == _ROWS:
                ends = self._copy_rows(rows[number], part, step)
            elif method_of[number] == _ONE_RUN:
                ends = self._copy_one_run(blocks[number], part, step)
            else:
                first, end = tokens[number]
                ends = self._copy_runs(blocks[number], first, end, part)
            if checksums:
                made[number] = checksum_of(part.filled(ends))
            else:
                deque(ends, maxlen=0)

        in_runs = (methods == _ONE_RUN).all()
        shared_bytes = _SHARED_RUN if in_runs else direction.shared_bytes
        is_shared = self.layout.part.num_bytes >= shared_bytes
        (self._threads if is_shared else CALLING_THREAD).each(copy, range(len(spans)))
        return made

    def _methods(self, spans: ChunkSpans) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Choose each span's method; whole parts without a null block are fast."""
        blocks = spans.blocks
        whole = (spans.tokens == (0, self.layout.part.chunk_size)).all(axis=1)
        whole &= blocks.min(axis=1) != NULL_BLOCK
        scattered = breaks(blocks).any(axis=1)
        methods = np.where(whole & ~scattered, _ONE_RUN, _RUNS).astype(np.uint8)
        if self._row_planes:
            apart = self._row_planes[0].step != 1
            methods[whole & (scattered | apart)] = _ROWS
        return methods

    def _rows(
        self, blocks: BlockArray, by_rows: npt.NDArray[np.bool_]
    ) -> list[tuple[Index, ...]]:
        """Return the row indexes of each span copied by rows, per `_row_planes`."""
        indexes = (planes.index(blocks[by_rows]) for planes in self._row_planes)
        found = zip(*indexes, strict=True)
        return [next(found) if by else () for by in by_rows.tolist()]

    def _copy_rows(
        self, indexes: Sequence[Index], part: _PartWriter, step_bytes: int
    ) -> Iterator[int]:
        """Copy a whole part in steps; yield the bytes filled after each."""
        for planes, index in zip(self._row_planes, indexes, strict=True):
            size = planes.rows.itemsize
            offset = planes.first * self._strides[0]
            step = max(1, step_bytes // size)
            for first in range(0, len(index), step):
                part.copy_rows(planes.rows, index[first : first + step], offset)
                offset += len(index[first : first + step]) * size
                yield offset

    def _copy_one_run(
        self, blocks: BlockArray, part: _PartWriter, step_bytes: int
    ) -> Iterator[int]:
        """Copy a whole part of consecutive blocks; yield as `_copy_rows` does."""
        plane_bytes = self._strides[0]
        step = max(1, step_bytes // plane_bytes)
        run = slice(int(blocks[0]), int(blocks[-1]) + 1)
        for planes in self._planes:
            for first in range(0, len(planes.view), step):
                view = planes.view[first : first + step, run]
                offset = (planes.first + first) * plane_bytes
                part.copy(view, offset)
                yield offset + len(view) * plane_bytes

    def _copy_runs(
        self, ids: BlockArray, first_token: int, end_token: int, part: _PartWriter
    ) -> Iterator[int]:
        """Copy any token range of a chunk; yield once, at the end."""
        plane_bytes, block_bytes, unit_bytes, _ = self._strides
        for run in coalesce(self.layout, ids, first_token, end_token):
            inside = run.index * block_bytes + run.first * unit_bytes
            blocks = slice(run.block, run.block + run.num_blocks)
            for planes in self._planes:
                view = planes.view[:, blocks, run.first : run.end]
                part.copy(view, planes.first * plane_bytes + inside)
        yield self.layout.part.num_bytes


class _PartWriter:
    """One part's bytes in its extents, and the direction of the copy.

    `strides` are those within a part: from plane to plane, block, unit and byte.
    """

    __slots__ = ("_arena", "_copy", "_extents", "_starts", "_strides")

    def __init__(
        self,
        arena: Bytes,
        extents: tuple[Extent, ...],
        copy: _Direction,
        strides: tuple[int, ...],
    ) -> None:
        self._arena = arena
        self._extents = extents
        self._starts = [0, *accumulate(e.length for e in extents[:-1])]
        self._copy = copy
        self._strides = strides

    def filled(self, ends: Iterable[int]) -> Iterator[memoryview]:
        """Yield the part's bytes in order, up to each of `ends` in turn."""
        start = 0
        for end in ends:
            while start < end:
                place = self._from(start)
                length = min(place.length, end - start)
                yield self._arena.data[place.offset : place.offset + length]
                start += length

    def copy(self, cache: Bytes, offset: int) -> None:
        """Copy a view whose axes are the last ones of `[planes, ..., bytes]`.

        A view that crosses a border between extents is split, axis by axis.
        """
        strides = self._strides[-cache.ndim :]
        if len(self._extents) == 1:
            self._place(cache, self._extents[0].offset + offset, strides)
            return
        inner = 1 + sum(
            (size - 1) * stride
            for size, stride in zip(cache.shape[1:], strides[1:], strict=True)
        )
        while len(cache):
            place = self._from(offset)
            fit = min(len(cache), (place.length - inner) // strides[0] + 1)
            if fit > 0:
                self._place(cache[:fit], place.offset, strides)
            else:
                fit = 1
                self.copy(cache[0], offset)
            cache = cache[fit:]
            offset += fit * strides[0]

    def _place(self, cache: Bytes, offset: int, strides: tuple[int, ...]) -> None:
        part: Bytes = np.ndarray(cache.shape, np.uint8, self._arena, offset, strides)
        self._copy.view(cache, part)

    def copy_rows(self, cache: Rows, index: Index, offset: int) -> None:
        """Copy the indexed rows, which are consecutive in the part."""
        size = cache.itemsize
        if len(self._extents) == 1:
            self._place_rows(cache, index, self._extents[0].offset + offset)
            return
        while len(index):
            place = self._from(offset)
            fit = min(len(index), place.length // size)
            if fit:
                self._place_rows(cache, index[:fit], place.offset)
            else:
                fit = 1
                row = int(index[0])
                self.copy(cache[row : row + 1].view(np.uint8), offset)
            index = index[fit:]
            offset += fit * size

    def _place_rows(self, cache: Rows, index: Index, offset: int) -> None:
        part = self._arena[offset : offset + len(index) * cache.itemsize]
        self._copy.rows(cache, index, part.view(cache.dtype))

    def _from(self, offset: int) -> Extent:
        """Return the extent from the part's byte `offset` to the extent's end."""
        number = bisect_right(self._starts, offset) - 1
        extent = self._extents[number]
        inside = offset - self._starts[number]
        return Extent(extent.offset + inside, extent.length - inside)


def _even_planes(layout: KVLayout, handles: Sequence[Bytes]) -> tuple[_Planes, ...]:
    """Group planes of one handle that are evenly spaced."""
    names, offsets = layout.plane_handles, layout.plane_offsets.tolist()
    inner = (layout.block_stride, layout.slot_stride, 1)
    shape = (layout.num_blocks, block_units(layout), layout.part.unit_bytes)
    groups = []
    first = 0
    while first < len(offsets):
        end = first + 1
        step = offsets[end] - offsets[first] if end < len(offsets) else 0
        while (
            end < len(offsets)
            and names[end] == names[first]
            and offsets[end] - offsets[end - 1] == step
        ):
            end += 1
        view: Bytes = np.ndarray(
            (end - first, *shape),
            np.uint8,
            handles[names[first]],
            offsets[first],
            (step, *inner),
        )
        groups.append(_Planes(first, view))
        first = end
    return tuple(groups)


def _row_planes(layout: KVLayout, handles: Sequence[Bytes]) -> tuple[_RowPlanes, ...]:
    """Group neighbouring planes by handle and row grid; () if blocks are not rows."""
    units = block_units(layout)
    unit_bytes = layout.part.unit_bytes
    size = units * unit_bytes
    if layout.block_stride % size or (units > 1 and layout.slot_stride != unit_bytes):
        return ()
    grids = list(
        zip(layout.plane_handles, (layout.plane_offsets % size).tolist(), strict=True)
    )
    changes = [p for p in range(1, len(grids)) if grids[p] != grids[p - 1]]
    groups = []
    for first, end in pairwise([0, *changes, len(grids)]):
        name, start = grids[first]
        num_rows = (handles[name].size - start) // size
        rows = handles[name][start : start + num_rows * size].view(f"V{size}")
        base = (layout.plane_offsets[first:end] // size).astype(np.intp)
        step = layout.block_stride // size
        groups.append(_RowPlanes(first, rows, base[:, np.newaxis], step))
    return tuple(groups)
