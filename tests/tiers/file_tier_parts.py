"""Parts of one page in a file tier."""

from __future__ import annotations

import os
from pathlib import Path

from kvcore.shm import Segment
from kvcore.tiers.direct_io import PAGE as DISK_PAGE
from kvcore.tiers.direct_io import file_bytes
from kvcore.tiers.tier import LoadItem, LoadOutcome, StoreResult, Tier
from tests.tiers.part_factory import PAGE, blob_of, key_of, view

RECORD = file_bytes(PAGE)
"""Bytes of each on the disk."""
ROOMY = 32 << 20
"""Where in the arena they are loaded to."""


def store(tier: Tier, arena: Segment, *numbers: int) -> list[StoreResult]:
    """Store parts of one page."""
    blobs = [blob_of(number, view(arena, number * PAGE, PAGE)) for number in numbers]
    return tier.store(blobs).result()


def there(tier: Tier, *numbers: int) -> list[bool]:
    """Say which parts are there."""
    return tier.contains([key_of(number) for number in numbers]).result()


def load(tier: Tier, arena: Segment, number: int) -> LoadOutcome:
    """Load a part of one page."""
    slot = LoadItem(key_of(number), (view(arena, ROOMY, PAGE),))
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


SPOILERS = {
    "cut": _cut,
    "empty": _empty,
    "double": _double,
    "header": lambda path: _flip(path, 3),
    "payload": lambda path: _flip(path, DISK_PAGE),
    "put": _empty,
}
"""What somebody else did to a file."""
