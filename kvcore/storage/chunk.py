"""A chunk as L1 knows it: its parts, who writes them, how many hold it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NewType

import msgspec

from kvcore.errors import Internal
from kvcore.keys import ChunkHash
from kvcore.storage.arena import Allocation, Extent

PartId = NewType("PartId", int)
"""Bit of a part in its chunk's masks; the registry deals them out, one a (rank,
group, layout fingerprint) of a (model, world size)."""


class Part(msgspec.Struct, frozen=True, gc=False):
    """A chunk's bytes of one rank and group: where they are."""

    extents: Allocation
    num_bytes: int


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


@dataclass(slots=True, eq=False)
class Reservation:
    """The right and the duty to write one part, and then to commit or abort it."""

    index: int
    """Place in the hashes that were asked for."""
    chunk: Chunk
    part: PartId
    extents: Allocation
    settled: bool = False
    """Committed or aborted."""


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
