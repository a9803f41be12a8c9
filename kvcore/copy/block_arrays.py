"""What a copy is about: a range of a session's tokens, and the blocks they belong to.

Made from a request by the server and from the same request by a worker that copies
itself, so that both mean the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from kvcore.copy.paged_cache import ChunkSpan, check_blocks, check_range
from kvcore.errors import BadRequest
from kvcore.extents import PartLocation
from kvcore.layout import KVLayout
from kvcore.protocol import NULL_BLOCK

BlockArray = npt.NDArray[np.int32]
"""Block ids of one group, `[chunks, blocks a chunk]`; NULL_BLOCK for none."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens [start, end) of a session of which [first_token, end) are moved."""

    start: int
    end: int
    first_token: int
    chunk_size: int

    @classmethod
    def to_store(cls, start: int, end: int, chunk_size: int) -> Self:
        """Return the whole chunks of [start, end); raises `BadRequest`."""
        whole = end - end % chunk_size
        if start <= end:
            whole = max(whole, start)
        return cls.to_retrieve(start, whole, 0, chunk_size)

    @classmethod
    def to_retrieve(cls, start: int, end: int, skip: int, chunk_size: int) -> Self:
        """Return [start, end) without its first `skip` tokens.

        Raises:
            BadRequest: it begins within a chunk, or is shorter than what it skips.
        """
        if start % chunk_size or start > end or skip > end - start:
            raise BadRequest(
                f"range {start} to {end}, skipping {skip}: must begin at a multiple of "
                f"the chunk size {chunk_size} and be no shorter than what it skips"
            )
        return cls(start, end, start + skip, chunk_size)

    @property
    def first_chunk(self) -> int:
        """Chunk that holds `start`."""
        return self.start // self.chunk_size

    @property
    def end_chunk(self) -> int:
        """One past the chunk that holds the last token."""
        return -(-self.end // self.chunk_size)

    @property
    def is_empty(self) -> bool:
        """Nothing is moved."""
        return self.first_token == self.end


def read_blocks(
    layouts: Sequence[KVLayout], packed: Sequence[memoryview], tokens: TokenRange
) -> tuple[BlockArray, ...]:
    """Unpack and check a request's block ids, a row a chunk, short rows filled up.

    Raises:
        BadRequest: not one list a cache group, too few blocks, or an id out of range.
    """
    if len(packed) != len(layouts):
        raise BadRequest(f"blocks: {len(packed)} lists for {len(layouts)} cache groups")
    return tuple(
        _rows(index, layout, raw, tokens)
        for index, (layout, raw) in enumerate(zip(layouts, packed, strict=True))
    )


def _rows(
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
    """Refuse a retrieve that could only write a part of what it names.

    Raises:
        BadRequest: a null block in a group that attends to every token, or a token
            range that cuts a block of opaque pages.
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
    """Return which chunks of a group can be stored: those without a null block."""
    whole: list[int] = np.flatnonzero((rows != NULL_BLOCK).all(axis=1)).tolist()
    return whole


def target_chunks(rows: BlockArray, tokens: TokenRange) -> list[bool]:
    """Say of each chunk of a group whether it has somewhere to be written."""
    target_chunks = (rows != NULL_BLOCK).any(axis=1)
    target_chunks[: tokens.first_token // tokens.chunk_size - tokens.first_chunk] = (
        False
    )
    listed: list[bool] = target_chunks.tolist()
    return listed


def whole_spans(
    rows: BlockArray, places: Sequence[PartLocation], chunk_size: int
) -> list[ChunkSpan]:
    """Return what to copy when whole chunks are moved."""
    return [ChunkSpan(p.extents, rows[p.index], 0, chunk_size) for p in places]


def spans_in(
    rows: BlockArray, places: Sequence[PartLocation], tokens: TokenRange
) -> list[ChunkSpan]:
    """Return what to copy when a range is moved."""
    spans = []
    for place in places:
        base = (tokens.first_chunk + place.index) * tokens.chunk_size
        first = max(tokens.first_token - base, 0)
        end = min(tokens.end - base, tokens.chunk_size)
        spans.append(ChunkSpan(place.extents, rows[place.index], first, end))
    return spans
