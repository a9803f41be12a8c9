"""Block ids of a request, and the chunk spans that they name.

Built from a request by the server, and from the same request by a worker that copies
its own cache, so that both copy the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt

from kvcore.errors import BadRequest
from kvcore.extents import Allocation, PartLocation
from kvcore.layout import KVLayout, PartLayout
from kvcore.protocol import NULL_BLOCK

BlockArray = npt.NDArray[np.int32]
"""Block ids of one cache group, `[chunks, blocks per chunk]`; NULL_BLOCK for none."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens [start, end) of a session, of which [first_token, end) are copied."""

    start: int
    end: int
    first_token: int
    chunk_size: int

    @classmethod
    def to_store(cls, start: int, end: int, chunk_size: int) -> Self:
        """Return the whole chunks of [start, end).

        Raises:
            BadRequest: `start` is within a chunk, or after `end`.
        """
        whole = end - end % chunk_size
        if start <= end:
            whole = max(whole, start)
        return cls.to_retrieve(start, whole, 0, chunk_size)

    @classmethod
    def to_retrieve(cls, start: int, end: int, skip: int, chunk_size: int) -> Self:
        """Return [start, end) without its first `skip` tokens.

        Raises:
            BadRequest: `start` is within a chunk, or fewer than `skip` tokens.
        """
        if start % chunk_size or start > end or skip > end - start:
            raise BadRequest(
                f"range {start} to {end}, skipping {skip}: must begin at a multiple of "
                f"the chunk size {chunk_size} and be no shorter than what it skips"
            )
        return cls(start, end, start + skip, chunk_size)

    @property
    def first_chunk(self) -> int:
        """Index of the chunk that contains `start`."""
        return self.start // self.chunk_size

    @property
    def end_chunk(self) -> int:
        """One past the index of the chunk that contains the last token."""
        return -(-self.end // self.chunk_size)

    @property
    def is_empty(self) -> bool:
        """Whether no token is copied."""
        return self.first_token == self.end


def read_blocks(
    layouts: Sequence[KVLayout], packed: Sequence[memoryview], tokens: TokenRange
) -> tuple[BlockArray, ...]:
    """Return a request's block ids, one array per cache group, checked.

    `packed` are int32 ids, little-endian, for the blocks of [start, end). Missing ids
    at the end of the last chunk become null blocks.

    Raises:
        BadRequest: not one list per cache group, too few ids, or an id out of range.
    """
    if len(packed) != len(layouts):
        raise BadRequest(f"blocks: {len(packed)} lists for {len(layouts)} cache groups")
    return tuple(
        _read_rows(index, layout, raw, tokens)
        for index, (layout, raw) in enumerate(zip(layouts, packed, strict=True))
    )


def _read_rows(
    index: int, layout: KVLayout, raw: memoryview, tokens: TokenRange
) -> BlockArray:
    block_size = layout.block_size
    needed = -(-(tokens.end - tokens.start) // block_size)
    if len(raw) % 4 or len(raw) // 4 < needed:
        raise BadRequest(
            f"blocks[{index}]: {len(raw)} bytes, but {needed} int32 ids are needed for "
            f"tokens {tokens.start} to {tokens.end} in blocks of {block_size}"
        )
    ids = np.frombuffer(raw, dtype="<i4", count=needed)
    check_blocks(layout, ids)
    per_chunk = tokens.chunk_size // block_size
    rows = np.full(
        (tokens.end_chunk - tokens.first_chunk) * per_chunk, NULL_BLOCK, dtype=np.int32
    )
    rows[:needed] = ids
    return rows.reshape(-1, per_chunk)


def check_targets(
    layouts: Sequence[KVLayout], blocks: Sequence[BlockArray], tokens: TokenRange
) -> None:
    """Check that a retrieve can write every token of its range.

    Raises:
        BadRequest: a null block in a group that attends to every token, or a range
            that cuts a block of opaque pages.
    """
    for index, (layout, rows) in enumerate(zip(layouts, blocks, strict=True)):
        part = layout.part
        base = tokens.first_chunk * tokens.chunk_size
        check_range(part, tokens.first_token - base, tokens.end - base)
        if part.window is not None:
            continue
        first = (tokens.first_token - base) // layout.block_size
        end = -(-(tokens.end - base) // layout.block_size)
        if (rows.reshape(-1)[first:end] == NULL_BLOCK).any():
            raise BadRequest(f"blocks[{index}]: a null block where tokens are written")


def storable_chunks(rows: BlockArray) -> list[int]:
    """Return the indexes of the chunks of a group that have no null block."""
    whole: list[int] = np.flatnonzero((rows != NULL_BLOCK).all(axis=1)).tolist()
    return whole


def target_chunks(rows: BlockArray, tokens: TokenRange) -> list[bool]:
    """Return for each chunk of a group whether any block of it is written."""
    written = (rows != NULL_BLOCK).any(axis=1)
    written[: tokens.first_token // tokens.chunk_size - tokens.first_chunk] = False
    listed: list[bool] = written.tolist()
    return listed


@dataclass(frozen=True, slots=True, eq=False)
class ChunkSpans:
    """Token ranges of chunks: their parts in the arena, their blocks in a cache.

    `extents` hold each chunk's whole part in order, whatever range is copied.
    `blocks` are `[chunks, blocks per chunk]`. `tokens` `[chunks, 2]`, int64, are the
    first and end token of each range, counted from the chunk's start.
    """

    extents: Sequence[Allocation]
    blocks: BlockArray
    tokens: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, rows: BlockArray, parts: Sequence[PartLocation], tokens: TokenRange
    ) -> Self:
        """Return what `tokens` covers of each part; `rows` are one group's blocks."""
        indexes = np.array([part.index for part in parts], np.intp)
        base = (tokens.first_chunk + indexes) * tokens.chunk_size
        ranges = np.empty((len(parts), 2), np.int64)
        np.maximum(tokens.first_token - base, 0, out=ranges[:, 0])
        np.minimum(tokens.end - base, tokens.chunk_size, out=ranges[:, 1])
        return cls([part.extents for part in parts], rows[indexes], ranges)

    def __len__(self) -> int:
        return len(self.extents)

    def __getitem__(self, chosen: slice) -> ChunkSpans:
        return ChunkSpans(
            self.extents[chosen], self.blocks[chosen], self.tokens[chosen]
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all ranges."""
        return int((self.tokens[:, 1] - self.tokens[:, 0]).sum())

    def check(self, layout: KVLayout, *, nulls: bool) -> None:
        """Check that every span can be copied.

        Raises:
            BadRequest: see `check_blocks` and `check_range`; or a null block where
                `nulls` does not allow any, or a wrong number of blocks per chunk.
        """
        chunk_size = layout.part.chunk_size
        per_chunk = chunk_size // layout.block_size
        for first, end in set(map(tuple, self.tokens.tolist())):
            check_range(layout.part, first, end)
            if end > chunk_size:
                raise BadRequest(f"token {end} of a chunk of {chunk_size}")
        if self.blocks.shape[1] != per_chunk:
            raise BadRequest(
                f"{self.blocks.shape[1]} blocks for a chunk of {per_chunk}"
            )
        check_blocks(layout, self.blocks)
        if not nulls and (self.blocks == NULL_BLOCK).any():
            raise BadRequest("a null block holds nothing to copy")


@dataclass(frozen=True, slots=True)
class BlockRun:
    """`num_blocks` consecutive blocks from id `block` on, or some units of one block.

    `index` is the first block's position in the chunk; the run has units [first, end)
    of each block.
    """

    index: int
    block: int
    num_blocks: int
    first: int
    end: int


def check_blocks(layout: KVLayout, blocks: BlockArray) -> None:
    """Check that the cache has these blocks; NULL_BLOCK passes.

    Raises:
        BadRequest: an id out of range, with the range.
    """
    if blocks.size == 0:
        return
    if blocks.min() < NULL_BLOCK or blocks.max() >= layout.num_blocks:
        wrong = (blocks < NULL_BLOCK) | (blocks >= layout.num_blocks)
        raise BadRequest(
            f"block {blocks[wrong][0]}: the cache has blocks 0 to "
            f"{layout.num_blocks - 1}, and {NULL_BLOCK} for none"
        )


def check_range(part: PartLayout, first: int, end: int) -> None:
    """Check that a token range of a chunk ends on whole units.

    Raises:
        BadRequest: a range that cuts a unit, or ends before it starts.
    """
    if not 0 <= first <= end:
        raise BadRequest(f"tokens {first} to {end} are no range")
    if first % part.unit_tokens or end % part.unit_tokens:
        raise BadRequest(
            f"tokens {first} to {end}: this cache moves whole blocks of "
            f"{part.unit_tokens} tokens only ({part.order} order)"
        )


def block_units(layout: KVLayout) -> int:
    """Return the number of units, contiguous bytes of one plane, in a block."""
    return layout.block_size // layout.part.unit_tokens


def coalesce(
    layout: KVLayout, blocks: BlockArray, first_token: int, end_token: int
) -> Iterator[BlockRun]:
    """Yield the runs of one chunk's `blocks` in order, without null blocks.

    Consecutive whole blocks are one run; a block that the range cuts is a run of its
    own.
    """
    units = block_units(layout)
    first = first_token // layout.part.unit_tokens
    end = end_token // layout.part.unit_tokens
    begin, stop = first // units, -(-end // units)
    borders = {begin, stop}
    if first % units:
        borders.add(begin + 1)
    if end % units:
        borders.add(stop - 1)
    borders.update((np.flatnonzero(breaks(blocks[begin:stop])) + begin + 1).tolist())
    for index, following in pairwise(sorted(borders)):
        block = int(blocks[index])
        if block != NULL_BLOCK:
            inside = index * units
            yield BlockRun(
                index,
                block,
                following - index,
                max(first - inside, 0),
                min(end - inside, units),
            )


def breaks(blocks: BlockArray) -> npt.NDArray[np.bool_]:
    """Return whether a run ends between a block and the next, along the last axis."""
    before, after = blocks[..., :-1], blocks[..., 1:]
    broken: npt.NDArray[np.bool_] = (after - before != 1) | (before == NULL_BLOCK)
    return broken
