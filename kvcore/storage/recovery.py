"""Recovery of a kept arena: parts found by its journal and checked."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from kvcore.config import L1Config
from kvcore.extents import Allocation, buffers_of, checksum_of
from kvcore.keys import ChunkHash
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import PartId
from kvcore.storage.journal import (
    VERSION,
    Journal,
    JournalOpened,
    PartCommitted,
    PartFreed,
    read,
)

log = logging.getLogger(__name__)

KEPT_PREFIX = "kvkept-"
"""Prefix of the names of kept arenas; no server removes them as orphans."""
CHECK_THREADS = 4
MAX_PART_ID = 1 << 16
"""A bit of every chunk's masks: 16 parts of each of the most ranks that a model has."""


@dataclass(frozen=True, slots=True)
class RecoveredArena:
    """A new journal, and the parts to restore in L1, oldest first."""

    journal: Journal
    parts: list[PartCommitted]
    num_lost: int
    """Committed parts whose bytes do not match their checksum."""


def open_arena(l1: L1Config) -> Arena:
    """Create the configured arena, or open a kept one.

    Raises:
        SetupError: there is not enough memory, or another server uses the arena.
    """
    size, page = int(l1.size), int(l1.page)
    if l1.keep is None:
        return Arena(size, page)
    return Arena(size, page, arena_name(Path(l1.keep)), kept=True)


def arena_name(path: Path) -> str:
    """Return the name of the segment of a journal at `path`."""
    return KEPT_PREFIX + sha256(str(path.absolute()).encode()).hexdigest()[:16]


def recover(path: Path, arena: Arena) -> RecoveredArena:
    """Read the journal at `path`, check every part's bytes, and open a new one.

    Raises:
        SetupError: the journal cannot be written.
    """
    opened = JournalOpened(VERSION, arena.total_bytes, arena.page_bytes)
    claimed = list(replay(read(path, opened), arena)) if arena.was_found else []
    memory = arena.array.data
    with ThreadPoolExecutor(CHECK_THREADS, "check") as pool:
        right = pool.map(lambda part: _is_right(part, memory), claimed)
        parts = [part for part, good in zip(claimed, right, strict=True) if good]
    return RecoveredArena(Journal(path, opened), parts, len(claimed) - len(parts))


def replay(
    records: Iterable[PartCommitted | PartFreed], arena: Arena
) -> Iterable[PartCommitted]:
    """Return the parts that the journal names, oldest first; no two share a page.

    If two claim a page, the removal of the earlier one was not recorded. Records that
    no server writes are skipped with a warning.
    """
    num_wrong = 0
    live: dict[tuple[ChunkHash, PartId], PartCommitted] = {}
    by_chunk: dict[ChunkHash, set[PartId]] = {}
    owners: dict[int, PartCommitted] = {}
    """The last part that claimed each page; it may have been removed since."""
    for record in records:
        if isinstance(record, PartFreed):
            for part in by_chunk.pop(record.chunk, ()):
                live.pop((record.chunk, part), None)
            continue
        if not _fits(record, arena):
            num_wrong += 1
            continue
        key = (record.chunk, record.part)
        for page in _pages(record.extents, arena):
            owner = owners.get(page)
            if owner is not None and live.get((owner.chunk, owner.part)) is owner:
                del live[owner.chunk, owner.part]
            owners[page] = record
        live.pop(key, None)
        live[key] = record
        by_chunk.setdefault(record.chunk, set()).add(record.part)
    if num_wrong:
        log.warning("skipped %d wrong record(s) of the journal of L1", num_wrong)
    return live.values()


def _pages(extents: Allocation, arena: Arena) -> Iterable[int]:
    for extent in extents:
        first = extent.offset // arena.page_bytes
        yield from range(first, first + arena.num_pages_for(extent.length))


def _fits(part: PartCommitted, arena: Arena) -> bool:
    """Return whether a record's part number and extents can be right.

    The extents are within the arena, disjoint and add up.
    """
    within = sum(e.length for e in part.extents) == part.num_bytes and all(
        e.offset >= 0
        and e.length > 0
        and e.offset % arena.page_bytes == 0
        and e.offset + e.length <= arena.total_bytes
        for e in part.extents
    )
    if not within or not 0 <= part.part < MAX_PART_ID:
        return False
    pages = [*_pages(part.extents, arena)]
    return len(set(pages)) == len(pages)


def _is_right(part: PartCommitted, memory: memoryview) -> bool:
    return checksum_of(buffers_of(memory, part.extents)) == part.checksum
