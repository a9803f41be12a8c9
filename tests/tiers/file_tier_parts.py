"""Parts of one page in a file tier."""

from __future__ import annotations

import os
from pathlib import Path

from kvcore.shm import Segment
from kvcore.tiers.direct_io import PAGE as DISK_PAGE
from kvcore.tiers.direct_io import file_bytes
from kvcore.tiers.tier import LoadItem, LoadOutcome, StoreResult, Tier
from tests.tiers.part_factory import PAGE, key_of, store_item, view

RECORD = file_bytes(PAGE)
"""Bytes of each part's file on the disk."""
LOAD_OFFSET = 32 << 20
"""Offset in the arena that parts are loaded to."""


def store(tier: Tier, arena: Segment, *numbers: int) -> list[StoreResult]:
    """Store parts of one page."""
    blobs = [store_item(number, view(arena, number * PAGE, PAGE)) for number in numbers]
    return tier.store(blobs).result()


def contains(tier: Tier, *numbers: int) -> list[bool]:
    """Return which parts the tier contains."""
    return tier.contains([key_of(number) for number in numbers]).result()


def load(tier: Tier, arena: Segment, number: int) -> LoadOutcome:
    """Load a part of one page."""
    slot = LoadItem(key_of(number), (view(arena, LOAD_OFFSET, PAGE),))
    return tier.load([slot]).result()[0].outcome


def files_in(folder: Path) -> int:
    """Bytes of all parts on the disk."""
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def _cut(path: Path) -> None:
    os.truncate(path, max(0, path.stat().st_size - 1))


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _double(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    if place < len(data):
        data[place] ^= 4
    path.write_bytes(data)


FILE_DAMAGES = {
    "cut": _cut,
    "empty": _empty,
    "double": _double,
    "header": lambda path: _flip(path, 3),
    "payload": lambda path: _flip(path, DISK_PAGE),
    "put": _empty,
}
"""Damage by another process, applied to a part's file."""
