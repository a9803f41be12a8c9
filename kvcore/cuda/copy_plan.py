"""Plan of a copy: where its bytes lie, as arrays, computed in a few numpy calls.

The parts of a call's spans, one after the other, form one line of bytes. `x` is an
offset on it: byte b of plane p of part s is at `(s * num_planes + p) * plane_bytes +
b`. Staging holds a section of that line unchanged; the arena holds it in extents; a
cache holds it in rows, each of them contiguous bytes of a plane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any, Self

import numpy as np

from kvcore.copy.block_arrays import ChunkSpans, block_units
from kvcore.layout import KVLayout
from kvcore.protocol import NULL_BLOCK

I64 = np.ndarray[Any, np.dtype[np.int64]]

WORDS = (16, 4, 1)
"""Bytes that a kernel loads at once, the widest first."""


@dataclass(frozen=True, slots=True)
class PartRows:
    """The rows of a cache: `block_rows` per block and plane, of `row_bytes` each.

    Block b starts `b * block_stride` bytes after its plane, and row r of a block `r *
    row_stride` bytes after the block. `word` divides every address, stride and range.
    """

    num_planes: int
    plane_bytes: int
    num_blocks: int
    block_rows: int
    row_bytes: int
    block_stride: int
    row_stride: int
    word: int

    @classmethod
    def of(cls, layout: KVLayout, planes: I64) -> Self:
        """Return the rows of a layout; `planes` are addresses, `[planes]`."""
        part = layout.part
        units, size = block_units(layout), part.unit_bytes
        is_row = units == 1 or layout.slot_stride == size
        row_stride = 0 if is_row else layout.slot_stride
        common = gcd(size, layout.block_stride, row_stride, *planes.tolist())
        return cls(
            num_planes=part.num_planes,
            plane_bytes=part.plane_bytes,
            num_blocks=part.chunk_size // layout.block_size,
            block_rows=1 if is_row else units,
            row_bytes=units * size if is_row else size,
            block_stride=layout.block_stride,
            row_stride=row_stride,
            word=next(word for word in WORDS if common % word == 0),
        )

    @property
    def part_bytes(self) -> int:
        """Bytes of a whole part."""
        return self.num_planes * self.plane_bytes


@dataclass(frozen=True, slots=True)
class ByteRanges:
    """Disjoint ranges of the line in order, each contiguous in memory.

    `starts` and `ends` are offsets on the line, `at` the addresses of the first bytes:
    all `[ranges]`.
    """

    starts: I64
    ends: I64
    at: I64

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def sizes(self) -> I64:
        """Bytes of each range."""
        return self.ends - self.starts

    @property
    def num_bytes(self) -> int:
        """Bytes of all ranges."""
        return int(self.sizes.sum())

    def joined(self) -> ByteRanges:
        """Return the ranges; those adjacent on the line and in memory are merged."""
        if len(self) < 2:
            return self
        on = self.starts[1:] == self.ends[:-1]
        on &= self.at[1:] - self.at[:-1] == self.starts[1:] - self.starts[:-1]
        if not on.any():
            return self
        first = np.flatnonzero(np.concatenate(([True], ~on)))
        last = np.append(first[1:], len(self)) - 1
        return ByteRanges(self.starts[first], self.ends[last], self.at[first])

    def cut(self, begin: int, end: int) -> ByteRanges:
        """Return the ranges within [begin, end), clipped to it."""
        chosen = slice(
            int(np.searchsorted(self.ends, begin, "right")),
            int(np.searchsorted(self.starts, end, "left")),
        )
        starts: I64 = np.maximum(self.starts[chosen], begin)
        at = self.at[chosen] + (starts - self.starts[chosen])
        return ByteRanges(starts, np.minimum(self.ends[chosen], end), at)


@dataclass(frozen=True, slots=True)
class CopyPieces:
    """Addresses on both sides of a copy and sizes of its pieces, `[pieces]` each."""

    here: I64
    there: I64
    sizes: I64


def both(a: ByteRanges, b: ByteRanges) -> CopyPieces:
    """Return the bytes that are in both, with their addresses in `a` and in `b`."""
    first = np.searchsorted(b.ends, a.starts, "right")
    count = np.searchsorted(b.starts, a.ends, "left") - first
    in_a = np.repeat(np.arange(len(a)), count)
    before = np.cumsum(count) - count
    in_b = np.arange(len(in_a)) + (first - before)[in_a]
    starts = np.maximum(a.starts[in_a], b.starts[in_b])
    ends = np.minimum(a.ends[in_a], b.ends[in_b])
    return CopyPieces(
        a.at[in_a] + (starts - a.starts[in_a]),
        b.at[in_b] + (starts - b.starts[in_b]),
        ends - starts,
    )


@dataclass(frozen=True, eq=False)
class CopyPlan:
    """One gather or scatter of checked spans.

    `ranges` `[spans, 2]` are the first and end byte in every plane of a span's part.
    """

    rows: PartRows
    planes: I64
    ranges: I64
    spans: ChunkSpans
    arena: int
    """Address of the arena."""

    @classmethod
    def of(
        cls,
        layout: KVLayout,
        rows: PartRows,
        planes: I64,
        spans: ChunkSpans,
        arena: int,
    ) -> Self:
        """Return the plan of a copy; `arena` is the arena's address."""
        ranges = spans.tokens // layout.part.unit_tokens * layout.part.unit_bytes
        return cls(rows, planes, ranges, spans, arena)

    def split(self, max_spans: int) -> Iterator[CopyPlan]:
        """Yield plans of at most `max_spans` spans each."""
        for first in range(0, len(self.spans), max_spans):
            some = slice(first, first + max_spans)
            yield replace(self, ranges=self.ranges[some], spans=self.spans[some])

    @property
    def line_bytes(self) -> int:
        """Length of the line: all bytes of all parts."""
        return len(self.spans) * self.rows.part_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes to copy, without null blocks."""
        return self._runs.num_bytes * self.rows.num_planes

    @property
    def num_pieces(self) -> int:
        """Pieces on the cache's side, adjacent ones merged."""
        return len(self._runs) * self.rows.num_planes

    @cached_property
    def extents(self) -> ByteRanges:
        """The arena's ranges of the bytes in `ranges`."""
        whole = self._whole_extents
        size, plane_bytes = self.rows.part_bytes, self.rows.plane_bytes
        if (self.ranges == (0, plane_bytes)).all():
            return whole
        x = np.arange(len(self.spans))[:, np.newaxis] * size
        x = x + np.arange(self.rows.num_planes) * plane_bytes
        starts = (x + self.ranges[:, :1]).ravel()
        ends = (x + self.ranges[:, 1:]).ravel()
        some = starts < ends
        wanted = ByteRanges(starts[some], ends[some], starts[some])
        pieces = both(wanted, whole)
        return ByteRanges(
            pieces.here, pieces.here + pieces.sizes, pieces.there
        ).joined()

    @property
    def pieces(self) -> CopyPieces:
        """Copies without staging: `here` in the cache, `there` in the arena."""
        rows, runs = self.rows, self._runs
        part, starts = np.divmod(runs.starts, rows.plane_bytes + 1)
        plane = np.arange(rows.num_planes)[:, np.newaxis]
        x = (part * rows.num_planes + plane) * rows.plane_bytes + starts
        at = self.planes[:, np.newaxis] + runs.at
        order = np.argsort(x, axis=None, kind="stable")
        ends, at = (x + runs.sizes).ravel()[order], at.ravel()[order]
        cached = ByteRanges(x.ravel()[order], ends, at).joined()
        return both(cached, self._whole_extents)

    @cached_property
    def _whole_extents(self) -> ByteRanges:
        pairs = [(e.offset, e.length) for part in self.spans.extents for e in part]
        extents = np.array(pairs, np.int64).reshape(-1, 2)
        extents = extents[extents[:, 1] > 0]
        ends = np.cumsum(extents[:, 1])
        at = extents[:, 0] + self.arena
        return ByteRanges(ends - extents[:, 1], ends, at).joined()

    @cached_property
    def _runs(self) -> ByteRanges:
        """Contiguous runs in one plane; `at` counts from the plane's address.

        The line here consists of the parts' first planes only, with a gap of one byte
        between two parts, so that no run crosses from one part to the next.
        """
        rows = self.rows
        row = np.arange(rows.num_blocks * rows.block_rows)
        block = np.repeat(self.spans.blocks, rows.block_rows, axis=1).astype(np.int64)
        begins = row * rows.row_bytes
        starts = np.maximum(self.ranges[:, :1], begins)
        ends = np.minimum(self.ranges[:, 1:], begins + rows.row_bytes)
        at = block * rows.block_stride + row % rows.block_rows * rows.row_stride
        at += starts - begins
        live = (block != NULL_BLOCK) & (starts < ends)
        x = np.arange(len(block))[:, np.newaxis] * (rows.plane_bytes + 1)
        return ByteRanges((x + starts)[live], (x + ends)[live], at[live]).joined()
