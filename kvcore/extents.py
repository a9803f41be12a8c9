"""Locations of parts in the arena, and checksums of their bytes.

Shared by both sides of a copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NewType

import msgspec
import xxhash


class Extent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Adjacent bytes of the arena."""

    offset: int
    length: int


Allocation = tuple[Extent, ...]
"""A part's bytes in order. Extents begin on pages; lengths sum to the part's size."""

Buffers = tuple[memoryview, ...]
"""A part's bytes in order; contiguous, of single bytes."""

Checksum = NewType("Checksum", bytes)
"""16 bytes: xxh3-128."""

CHECKSUM_BYTES = 16
NO_CHECKSUM = Checksum(b"")
"""No checksum was requested for the part."""


def buffers_of(memory: memoryview, extents: Allocation) -> Buffers:
    """Return views of a part's bytes in the arena, in order."""
    return tuple(
        memory[extent.offset : extent.offset + extent.length] for extent in extents
    )


def checksum_of(buffers: Iterable[memoryview]) -> Checksum:
    """Return xxh3-128 over the buffers in order, computed without the GIL."""
    state = xxhash.xxh3_128()
    for buffer in buffers:
        state.update(buffer)
    return Checksum(state.digest())


class PartLocation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One part to copy: its index among the request's chunks, and its location.

    `checksum`, if set, is that of the expected bytes.
    """

    index: int
    extents: Allocation
    checksum: Checksum = NO_CHECKSUM
