"""The one path on which KV moves: make a plan of spans, reserve or hold, copy.

Runs on an instance's lanes. Every failure leg is here: what was reserved is
committed or aborted, what was held is released, whatever happens between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic_ns

import numpy as np
import numpy.typing as npt

from kvcore.engine.instance import Group, Instance
from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    DeadlineExceeded,
    UnknownInstance,
)
from kvcore.keys import ChunkHash, SessionKey
from kvcore.parts import Allocation, buffers_of, checksum_of
from kvcore.protocol import NULL_BLOCK
from kvcore.rope import Rope
from kvcore.storage.arena import Arena
from kvcore.storage.l1 import L1, Chunk, Reservation, Reserved
from kvcore.transport.paged import Span, check_blocks, check_range
from kvcore.transport.rotation import Turn

Blocks = npt.NDArray[np.int32]
"""Block ids of one group, `[chunks, blocks a chunk]`; NULL_BLOCK for none."""
CHECKSUM_BYTES = 1 << 20
"""Gathered before their checksums are made: they fit in a core's own cache."""


@dataclass(frozen=True, slots=True)
class Range:
    """Tokens [start, end) of a session of which [first_token, end) are moved."""

    start: int
    end: int
    first_token: int
    chunk_size: int

    @property
    def first_chunk(self) -> int:
        """Chunk that holds `start`."""
        return self.start // self.chunk_size

    @property
    def end_chunk(self) -> int:
        """One past the chunk that holds the last token."""
        return -(-self.end // self.chunk_size)


def read_blocks(
    instance: Instance, packed: Sequence[memoryview], tokens: Range
) -> tuple[Blocks, ...]:
    """Unpack and check a request's block ids, a row a chunk, short rows filled up.

    Raises:
        BadRequest: not one list a cache group, too few blocks, or an id out of range.
    """
    if len(packed) != len(instance.groups):
        raise BadRequest(
            f"blocks: {len(packed)} lists for {len(instance.groups)} cache groups"
        )
    return tuple(
        _rows(index, group, raw, tokens)
        for index, (group, raw) in enumerate(zip(instance.groups, packed, strict=True))
    )


def _rows(index: int, group: Group, raw: memoryview, tokens: Range) -> Blocks:
    block_size = group.layout.block_size
    needed = -(-(tokens.end - tokens.start) // block_size)
    if len(raw) % 4 or len(raw) // 4 < needed:
        raise BadRequest(
            f"blocks[{index}]: {len(raw)} bytes, but {needed} int32 ids are needed for "
            f"tokens {tokens.start} to {tokens.end} in blocks of {block_size}"
        )
    ids = np.frombuffer(raw, dtype="<i4", count=needed)
    check_blocks(group.layout, ids)
    per_chunk = tokens.chunk_size // block_size
    rows = np.full(
        (tokens.end_chunk - tokens.first_chunk) * per_chunk, NULL_BLOCK, dtype=np.int32
    )
    rows[:needed] = ids
    return rows.reshape(-1, per_chunk)


@dataclass(slots=True)
class Stored:
    """What became of the parts of a store."""

    num_stored: int = 0
    num_present: int = 0
    num_dropped: int = 0
    num_bytes: int = 0

    def count(self, got: Reserved, num_null: int, part_bytes: int) -> None:
        """Count one group's parts in; one with a null block is not stored."""
        self.num_stored += len(got.reservations)
        self.num_present += got.num_present
        self.num_dropped += got.num_dropped + num_null
        self.num_bytes += len(got.reservations) * part_bytes


@dataclass(frozen=True, slots=True)
class Turning:
    """How keys turn once they are copied."""

    rope: Rope
    turns: Sequence[Turn]


class Copier:
    """Stores into and retrieves from one L1."""

    def __init__(
        self,
        l1: L1,
        arena: Arena,
        chunk_size: int,
        clock_ns: Callable[[], int] = monotonic_ns,
        on_stored: Callable[[Sequence[Chunk]], None] | None = None,
        *,
        checksums: bool = False,
        verify: bool = False,
    ) -> None:
        self._l1 = l1
        self._arena = arena
        self._chunk_size = chunk_size
        self._clock_ns = clock_ns
        self._on_stored = on_stored
        self._checksums = checksums or on_stored is not None
        self._verify = verify

    def store(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[Blocks],
        deadline_ns: int,
        owner: SessionKey | None = None,
        prefix: Sequence[ChunkHash] = (),
    ) -> Stored:
        """Copy whole chunks into L1 and make them readable.

        Room is made for `owner`, and none of `prefix`, the chunks before, goes for it.

        Raises:
            DeadlineExceeded: by the end of the copy its blocks may have been reused;
                nothing of it is kept.
            UnknownInstance: its client has gone meanwhile; nothing is kept either.
        """
        stored = Stored()
        reserved: list[Reservation] = []
        try:
            self._check_deadline(deadline_ns)
            for group, rows in zip(instance.groups, blocks, strict=True):
                whole = np.flatnonzero((rows != NULL_BLOCK).all(axis=1)).tolist()
                got = self._l1.reserve(
                    [hashes[i] for i in whole],
                    group.part,
                    group.part_bytes,
                    name=group.name,
                    owner=owner,
                    prefix=prefix,
                )
                reserved += got.reservations
                stored.count(got, len(rows) - len(whole), group.part_bytes)
                self._gather(group, rows[whole], got.reservations)
            self._check_deadline(deadline_ns)
            if instance.is_abandoned:
                raise UnknownInstance("its client went while it was copied from")
        except BaseException:
            self._l1.abort(reserved)
            raise
        self._l1.commit(reserved)
        if self._on_stored is not None and reserved:
            self._on_stored([reservation.chunk for reservation in reserved])
        return stored

    def _gather(
        self, group: Group, rows: Blocks, reservations: Sequence[Reservation]
    ) -> None:
        """Fill one group's parts, `rows` being the blocks of what was asked for.

        With checksums in slices: a part is summed up while the CPU's caches have it.
        """
        spans = [
            Span(r.extents, rows[r.index], 0, self._chunk_size) for r in reservations
        ]
        arena = self._arena.array
        if not self._checksums:
            group.cache.gather(spans, arena)
            return
        memory = arena.data
        step = max(1, CHECKSUM_BYTES // group.part_bytes)
        for first in range(0, len(spans), step):
            group.cache.gather(spans[first : first + step], arena)
            for reservation in reservations[first : first + step]:
                buffers = buffers_of(memory, reservation.extents)
                reservation.checksum = checksum_of(buffers)

    def retrieve(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[Blocks],
        tokens: Range,
        deadline_ns: int,
        turning: Turning | None = None,
    ) -> int:
        """Copy chunks into the instance's blocks, all or none; return the bytes.

        Then turn the keys of every group, if asked to.

        Raises:
            ChunksMissing: a chunk is not there, or its bytes were found wrong.
            DeadlineExceeded: it passed before the first byte was written.
        """
        wanted = [self._wanted(rows, tokens) for rows in blocks]
        needs = [
            sum(
                1 << g.part
                for g, w in zip(instance.groups, wanted, strict=True)
                if w[i]
            )
            for i in range(len(hashes))
        ]
        chunks = self._l1.acquire(hashes, needs)
        if chunks is None:
            raise ChunksMissing(
                f"not every chunk of tokens {tokens.start} to {tokens.end} is present"
            )
        num_bytes = 0
        try:
            self._check_deadline(deadline_ns)
            if self._verify:
                self._check_bytes(chunks, needs)
            for group, rows, want in zip(instance.groups, blocks, wanted, strict=True):
                spans = [
                    self._span(chunk.parts[group.part].extents, row, i, tokens)
                    for i, (chunk, row) in enumerate(zip(chunks, rows, strict=True))
                    if want[i] and chunk is not None
                ]
                group.cache.scatter(spans, self._arena.array)
                if turning is not None:
                    group.cache.turn_keys(turning.rope, turning.turns)
                num_bytes += sum(
                    group.part_bytes * (span.end_token - span.first_token)
                    for span in spans
                )
        finally:
            self._l1.release([chunk for chunk in chunks if chunk is not None])
        return num_bytes // self._chunk_size

    def _check_bytes(
        self, chunks: Sequence[Chunk | None], needs: Sequence[int]
    ) -> None:
        """Raise `ChunksMissing` where bytes are not as they were stored."""
        memory = self._arena.array.data
        for chunk, need in zip(chunks, needs, strict=True):
            for number, part in [*chunk.parts.items()] if chunk else ():
                if not (chunk and need >> number & 1 and part.checksum):
                    continue
                if checksum_of(buffers_of(memory, part.extents)) != part.checksum:
                    self._l1.condemn(chunk)
                    raise ChunksMissing("a chunk's bytes were found wrong")

    def _wanted(self, rows: Blocks, tokens: Range) -> list[bool]:
        """Return which chunks of a group have somewhere to be written."""
        wanted = (rows != NULL_BLOCK).any(axis=1)
        wanted[: tokens.first_token // tokens.chunk_size - tokens.first_chunk] = False
        return [bool(want) for want in wanted]

    def _span(
        self, extents: Allocation, row: Blocks, index: int, tokens: Range
    ) -> Span:
        base = (tokens.first_chunk + index) * tokens.chunk_size
        first = max(tokens.first_token - base, 0)
        end = min(tokens.end - base, tokens.chunk_size)
        return Span(extents, row, first, end)

    def _check_deadline(self, deadline_ns: int) -> None:
        if deadline_ns and self._clock_ns() > deadline_ns:
            raise DeadlineExceeded("the deadline passed; nothing was kept or written")


def check_targets(instance: Instance, blocks: Sequence[Blocks], tokens: Range) -> None:
    """Refuse a retrieve that could only write a part of what it names.

    Raises:
        BadRequest: a null block in a group that attends to every token, or a token
            range that cuts a block of opaque pages.
    """
    for index, (group, rows) in enumerate(zip(instance.groups, blocks, strict=True)):
        part = group.layout.part
        base = tokens.first_chunk * tokens.chunk_size
        check_range(part, tokens.first_token - base, tokens.end - base)
        if part.window is not None:
            continue
        first = (tokens.first_token - base) // group.layout.block_size
        end = -(-(tokens.end - base) // group.layout.block_size)
        if (rows.reshape(-1)[first:end] == NULL_BLOCK).any():
            raise BadRequest(f"blocks[{index}]: a null block where tokens are written")
