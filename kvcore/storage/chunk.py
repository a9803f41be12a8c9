"""Chunks in L1: their parts, reservations, holds and removals."""

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
"""Bit of a part in its chunk's masks; a keyspace assigns one per (rank, group, layout
fingerprint)."""


class PartKey(msgspec.Struct, frozen=True, order=True):
    """Key of a part in every store: equal keys mean equal bytes."""

    chunk: ChunkHash
    rank: int
    group: int
    layout: Fingerprint

    def __str__(self) -> str:
        """Return the key as text: letters, digits and `-`."""
        return f"{self.chunk.hex()}-{self.rank}-{self.group}-{self.layout}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the result of `str`; raise `BadRequest` for anything else."""
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
    """Identity of a part except for its chunk's hash; shared by all chunks.

    Equal names and hashes mean equal bytes, on every server and in every run.
    """

    model: str
    world_size: int
    rank: int
    group: int
    layout: Fingerprint

    def key(self, chunk: ChunkHash) -> PartKey:
        """Return the key of this part of a chunk in tiers."""
        return PartKey(chunk, self.rank, self.group, self.layout)


class Part(msgspec.Struct, frozen=True, gc=False):
    """Location of a chunk's bytes of one rank and group."""

    extents: Allocation
    num_bytes: int
    name: PartName | None = None
    """None excludes it from tiers and the journal."""
    checksum: Checksum = NO_CHECKSUM


class Chunk(msgspec.Struct, eq=False, gc=False):
    """State of one chunk. Changed only by `L1`, under its lock.

    The holder of a chunk may read `parts[p]` for every p in `ready` without the lock:
    those do not change until the hold ends.

    A Struct because there may be a million of them: the garbage collector tracks
    neither these nor the dicts that hold them, so a full collection stays short.
    """

    hash: ChunkHash
    parts: dict[PartId, Part]
    """Committed parts and those being written."""
    ready: int = 0
    """Mask of committed parts."""
    reserved: int = 0
    """Mask of parts being written."""
    holds: int = 0
    """Leases and running copies that read it."""
    listed: bool = False
    """Whether the eviction policy has it."""
    saved: int = 0
    """Mask of parts that some tier has."""
    dropped: bool = False
    """Whether it left the index; its memory is freed with the last hold."""
    account: QuotaAccount | None = None
    """The account whose quota it counts for."""


class DropReason(Enum):
    """Why a chunk left L1."""

    EVICTED = "evicted"
    CLEARED = "cleared"
    CORRUPT = "corrupt"
    """Its bytes did not match their checksum."""


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
    """The right to write one part, and the duty to commit or abort it, once."""

    index: int
    """Index in the requested hashes."""
    chunk: Chunk
    part: PartId
    extents: Allocation
    checksum: Checksum = NO_CHECKSUM
    """Checksum of the written bytes, if there is to be one; set before commit."""
    settled: bool = False
    """Whether it was committed or aborted."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """Outcome of a reservation; the three counts add up to the requested chunks."""

    reservations: list[Reservation]
    """In the order of the hashes."""
    num_present: int
    """Chunks whose part is in L1 or being written."""
    num_dropped: int
    """Chunks without room."""


@dataclass(frozen=True, slots=True)
class L1Stats:
    """Use of L1 at one moment."""

    num_chunks: int
    """Chunks in the index, those being written included."""
    num_parts: int
    """Committed parts."""
    num_held: int
    """Chunks with a hold."""
    num_reserved: int
    """Parts being written."""
    num_evicted: int
    """Chunks evicted so far."""
    num_corrupt: int
    """Chunks found corrupt so far."""
    used_bytes: int
    total_bytes: int
    page_bytes: int


def used_extents(chunks: Iterable[Chunk]) -> list[Extent]:
    """Return the extents of chunks by offset; raise `Internal` on overlap."""
    parts = (part for chunk in chunks for part in chunk.parts.values())
    extents = [extent for part in parts for extent in part.extents]
    extents.sort(key=lambda extent: extent.offset)
    for extent, following in pairwise(extents):
        if extent.offset + extent.length > following.offset:
            raise Internal(f"{extent} overlaps {following}")
    return extents


def check_chunk(key: ChunkHash, chunk: Chunk) -> None:
    """Raise `Internal` if a chunk indexed under `key` is inconsistent."""
    known = sum(1 << part for part in chunk.parts)
    idle = not (chunk.holds or chunk.reserved)
    wrong = {
        "indexed under another hash": chunk.hash != key,
        "without a part": not chunk.parts,
        "with masks unlike its parts": chunk.ready | chunk.reserved != known,
        "with a part ready and reserved": bool(chunk.ready & chunk.reserved),
        "with a negative number of holds": chunk.holds < 0,
        "idle but unknown to the eviction policy": idle and not chunk.listed,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise Internal(f"a chunk {what}: {chunk}")
    for part in chunk.parts.values():
        if sum(extent.length for extent in part.extents) != part.num_bytes:
            raise Internal(f"a part's extents do not add up to its size: {part}")
