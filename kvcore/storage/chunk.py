"""A chunk as L1 knows it: its parts, who writes them, how many hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NewType, Self

import msgspec

from kvcore.errors import BadRequest, Internal
from kvcore.extents import NO_CHECKSUM, Allocation, Checksum, Extent
from kvcore.keys import ChunkHash, SessionKey
from kvcore.layout import Fingerprint
from kvcore.storage.quotas import QuotaAccount

PartId = NewType("PartId", int)
"""Bit of a part in its chunk's masks; the registry deals them out, one a (rank,
group, layout fingerprint) of a (model, world size)."""


class PartKey(msgspec.Struct, frozen=True, order=True):
    """What a part is called, in every store: equal keys mean equal bytes."""

    chunk: ChunkHash
    rank: int
    group: int
    layout: Fingerprint

    def __str__(self) -> str:
        """Render as every store names it; letters, digits and `-`."""
        return f"{self.chunk.hex()}-{self.rank}-{self.group}-{self.layout}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` renders; raises `BadRequest` for anything else."""
        try:
            chunk, rank, group, layout = text.split("-")
            key = cls(
                ChunkHash(bytes.fromhex(chunk)),
                int(rank),
                int(group),
                Fingerprint(layout),
            )
        except ValueError:
            raise BadRequest(f"{text!r} is not the name of a part") from None
        if str(key) != text:
            raise BadRequest(f"{text!r} is not the name of a part")
        return key


class PartName(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a part is beside its chunk's hash; one value for all chunks' parts of it.

    Equal names and hashes mean equal bytes on every server that ever runs.
    """

    model: str
    world_size: int
    rank: int
    group: int
    layout: Fingerprint

    def key(self, chunk: ChunkHash) -> PartKey:
        """Return what tiers call this part of a chunk."""
        return PartKey(chunk, self.rank, self.group, self.layout)


class Part(msgspec.Struct, frozen=True, gc=False):
    """A chunk's bytes of one rank and group: where they are."""

    extents: Allocation
    num_bytes: int
    name: PartName | None = None
    """None keeps it out of tiers and of the journal."""
    checksum: Checksum = NO_CHECKSUM


class Chunk(msgspec.Struct, eq=False, gc=False):
    """What L1 knows of one chunk. Changed by `L1` alone, under its lock.

    Who holds a chunk may read `parts[p]` for every p in `ready` without the lock:
    those stay as they are until the hold ends.

    A Struct, since there may be a million of them: the garbage collector does not
    see these, nor the dicts that hold them, and a full collection stays short.
    """

    hash: ChunkHash
    parts: dict[PartId, Part]
    """Committed ones and those being written."""
    ready: int = 0
    """Mask of committed parts."""
    reserved: int = 0
    """Mask of parts being written."""
    holds: int = 0
    """Leases and running copies that read it."""
    listed: bool = False
    """The eviction policy knows it."""
    saved: int = 0
    """Mask of parts that some tier has."""
    dropped: bool = False
    """Out of the index; its memory is freed with the last hold."""
    account: QuotaAccount | None = None
    """Of the space whose quota it counts for."""


class DropReason(Enum):
    """Why a chunk left L1."""

    EVICTED = "evicted"
    CLEARED = "cleared"
    CORRUPT = "corrupt"
    """Its bytes were not those of its checksum."""


@dataclass(frozen=True, slots=True)
class Removal:
    """A chunk that left L1; `owner` is the session whose store evicted it."""

    chunk: Chunk
    reason: DropReason
    owner: SessionKey | None


RemovalCallback = Callable[[Removal], None]
"""Called once per removed chunk, in order, before the L1 call that removed it returns.

Never under L1's lock, and by one thread at a time. It must be short and not raise.
"""


@dataclass(slots=True, eq=False)
class Reservation:
    """The right and the duty to write one part, and then to commit or abort it."""

    index: int
    """Place in the hashes that were asked for."""
    chunk: Chunk
    part: PartId
    extents: Allocation
    checksum: Checksum = NO_CHECKSUM
    """Of what was written, where it is wanted; set before commit."""
    settled: bool = False
    """Committed or aborted."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """What became of each chunk that should be written; the three counts add up."""

    reservations: list[Reservation]
    """In the order of the hashes."""
    num_present: int
    """There already, or being written by another."""
    num_dropped: int
    """No room."""


@dataclass(frozen=True, slots=True)
class L1Stats:
    """Use of L1 at one moment."""

    num_chunks: int
    """Known chunks, those still being written included."""
    num_parts: int
    """Committed parts."""
    num_held: int
    """Chunks with a hold."""
    num_reserved: int
    """Parts being written."""
    num_evicted: int
    """Chunks evicted so far."""
    num_corrupt: int
    """Chunks whose bytes were found wrong so far."""
    used_bytes: int
    total_bytes: int
    page_bytes: int


def used_extents(chunks: Iterable[Chunk]) -> list[Extent]:
    """Return where the parts of chunks lie, by place; raises `Internal` on overlap."""
    parts = (part for chunk in chunks for part in chunk.parts.values())
    extents = [extent for part in parts for extent in part.extents]
    extents.sort(key=lambda extent: extent.offset)
    for extent, following in pairwise(extents):
        if extent.offset + extent.length > following.offset:
            raise Internal(f"{extent} overlaps {following}")
    return extents


def check_chunk(key: ChunkHash, chunk: Chunk) -> None:
    """Raise `Internal` when a chunk indexed under `key` contradicts itself."""
    known = sum(1 << part for part in chunk.parts)
    idle = not (chunk.holds or chunk.reserved)
    wrong = {
        "indexed under another hash": chunk.hash != key,
        "without a part": not chunk.parts,
        "with masks unlike its parts": chunk.ready | chunk.reserved != known,
        "with a part ready and reserved": bool(chunk.ready & chunk.reserved),
        "with fewer than no holds": chunk.holds < 0,
        "idle but out of eviction's sight": idle and not chunk.listed,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise Internal(f"a chunk {what}: {chunk}")
    for part in chunk.parts.values():
        if sum(extent.length for extent in part.extents) != part.num_bytes:
            raise Internal(f"a part's extents are not its size: {part}")
