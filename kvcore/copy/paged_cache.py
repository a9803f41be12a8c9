"""A worker's paged cache seen from the server: what to copy, and who can copy it.

A plan is a list of spans, each one chunk's part in the arena and the blocks that it
belongs to. Prefix and blend differ only in how they make that list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvcore.errors import BadRequest
from kvcore.extents import Checksum, Extent
from kvcore.layout import KVLayout, PartLayout
from kvcore.protocol import NULL_BLOCK
from kvcore.shm import Bytes

BlockIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkSpan:
    """Some tokens of one chunk: its part in the arena and its blocks in the cache.

    `extents` hold the whole part in order, whatever range is moved. `blocks` has the
    chunk's `chunk_size // block_size` ids, -1 for a null block. `first_token` and
    `end_token` count from the chunk's start.
    """

    extents: tuple[Extent, ...]
    blocks: BlockIds
    first_token: int
    end_token: int


class PagedCache(Protocol):
    """One cache group of one instance, wherever its memory is.

    An implementation MUST check every span before the first byte moves, MUST write
    no byte outside the spans' extents (gather) or outside the units of the named
    blocks and tokens (scatter), and MUST allow one gather and one scatter at a time
    from different threads. Bytes are in their place when a call returns. Two spans
    of one call never share bytes.
    """

    layout: KVLayout

    def gather(
        self, spans: Sequence[ChunkSpan], arena: Bytes, *, checksums: bool = False
    ) -> list[Checksum]:
        """Copy blocks into parts; return their checksums, if wanted, in order.

        Raises:
            BadRequest: a block id or range that cannot be, or a null block.
        """

    def scatter(self, spans: Sequence[ChunkSpan], arena: Bytes) -> None:
        """Copy parts into blocks, leaving out null blocks.

        Raises:
            BadRequest: a block id or range that cannot be.
        """

    def close(self) -> None:
        """Let go of what the copies needed, once all have ended; not of the memory."""


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks, or units of one block: `num_blocks` from id `block` on.

    `index` is the first one's place in the chunk; units `first` to `end` of each
    block are meant.
    """

    index: int
    block: int
    num_blocks: int
    first: int
    end: int


def check_blocks(layout: KVLayout, blocks: BlockIds) -> None:
    """Refuse block ids that the cache does not have; -1 is the null block.

    Raises:
        BadRequest: naming the first such id and the limit.
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
    """Refuse a token range whose ends cut through a unit.

    Raises:
        BadRequest: naming the range and the unit.
    """
    if not 0 <= first <= end:
        raise BadRequest(f"tokens {first} to {end} are no range")
    if first % part.unit_tokens or end % part.unit_tokens:
        raise BadRequest(
            f"tokens {first} to {end}: this cache moves whole blocks of "
            f"{part.unit_tokens} tokens only ({part.order} order)"
        )


def checked_blocks(
    layout: KVLayout, spans: Sequence[ChunkSpan], *, nulls: bool
) -> BlockIds:
    """Return the block ids `[spans, blocks a chunk]`, once every span can be moved.

    Raises:
        BadRequest: see `check_blocks` and `check_range`; or a null block where
            `nulls` does not allow any, or a wrong number of blocks.
    """
    chunk_size = layout.part.chunk_size
    per_chunk = chunk_size // layout.block_size
    for first, end in {(span.first_token, span.end_token) for span in spans}:
        check_range(layout.part, first, end)
        if end > chunk_size:
            raise BadRequest(f"token {end} of a chunk of {chunk_size}")
    for span in spans:
        if len(span.blocks) != per_chunk:
            raise BadRequest(f"{len(span.blocks)} blocks for a chunk of {per_chunk}")
    blocks = np.array([span.blocks for span in spans], np.int32)
    blocks = blocks.reshape(len(spans), per_chunk)
    check_blocks(layout, blocks)
    if not nulls and (blocks == NULL_BLOCK).any():
        raise BadRequest("a null block holds nothing to copy")
    return blocks


def block_units(layout: KVLayout) -> int:
    """Return how many units, contiguous bytes of one plane, a block has."""
    return layout.block_size // layout.part.unit_tokens


def coalesce(layout: KVLayout, span: ChunkSpan) -> Iterator[BlockRun]:
    """Yield a span's runs in order: whole blocks together, cut blocks alone.

    Null blocks are left out.
    """
    units = block_units(layout)
    first = span.first_token // layout.part.unit_tokens
    end = span.end_token // layout.part.unit_tokens
    lead, tail = -(-first // units), end // units
    if lead > tail:
        yield from _cut(span, tail, first % units, end % units)
        return
    if first % units:
        yield from _cut(span, lead - 1, first % units, units)
    yield from _whole(span.blocks, lead, tail, units)
    if end % units:
        yield from _cut(span, tail, 0, end % units)


def _cut(span: ChunkSpan, index: int, first: int, end: int) -> Iterator[BlockRun]:
    block = int(span.blocks[index])
    if block != NULL_BLOCK:
        yield BlockRun(index, block, 1, first, end)


def _whole(blocks: BlockIds, lead: int, tail: int, units: int) -> Iterator[BlockRun]:
    if lead == tail:
        return
    cuts = [
        lead,
        *(np.flatnonzero(breaks(blocks[lead:tail])) + lead + 1).tolist(),
        tail,
    ]
    for index, following in pairwise(cuts):
        block = int(blocks[index])
        if block != NULL_BLOCK:
            yield BlockRun(index, block, following - index, 0, units)


def breaks(blocks: BlockIds) -> npt.NDArray[np.bool_]:
    """Tell, along the last axis, whether a run ends between a block and the next."""
    before, after = blocks[..., :-1], blocks[..., 1:]
    broken: npt.NDArray[np.bool_] = (after - before != 1) | (before == NULL_BLOCK)
    return broken
