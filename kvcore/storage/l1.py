"""L1: the chunks in the arena, with reservations of writers and holds of readers.

A part is reserved, written outside the lock by the holder of the reservation, and then
committed or aborted. A reader finds a chunk when every part that it needs is committed.
Parts of a chunk are evicted together, never while the chunk is held or written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvcore.keys import ChunkHash, SessionKey
from kvcore.status import QuotaStatus
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import (
    Chunk,
    DropReason,
    L1Stats,
    Part,
    PartId,
    PartName,
    RemovalCallback,
    Reservation,
    Reserved,
)
from kvcore.storage.chunk_table import ChunkTable
from kvcore.storage.eviction import EvictionPolicy
from kvcore.storage.journal import Journal, PartCommitted

__all__ = [
    "L1",
    "Chunk",
    "DropReason",
    "L1Stats",
    "Part",
    "PartId",
    "PartName",
    "Reservation",
    "Reserved",
]

RESERVE_CHUNKS = 32
"""Chunks reserved under one hold of the lock."""
NOTE_CHUNKS = 128
"""Chunks rewritten to the journal under one hold of the lock."""


class L1:
    """The index of chunks, and the only user of the arena's allocator.

    Thread-safe: one lock guards all state, and nothing slow runs under it. The cost of
    a call grows with the chunks named in it and those it evicts, not with the chunks in
    L1. With a journal, the commits and removals of a call are in it when it returns.
    """

    def __init__(
        self,
        arena: Arena,
        policy: EvictionPolicy,
        journal: Journal | None = None,
        *,
        watermark: float = 1.0,
    ) -> None:
        self._table = ChunkTable(arena, policy, watermark, journal)
        self._lock = threading.Lock()
        self._callbacks: list[RemovalCallback] = []
        # Serialises the callbacks and keeps their order; L1's own lock is free then.
        self._callback_lock = threading.Lock()
        self._journal = journal

    def on_removed(self, callback: RemovalCallback) -> None:
        """Call `callback` for every chunk that leaves from now on."""
        self._callbacks.append(callback)

    # -- writing ----------------------------------------------------------------------

    def reserve(
        self,
        hashes: Sequence[ChunkHash],
        part: PartId,
        num_bytes: int,
        *,
        name: PartName | None = None,
        owner: SessionKey | None = None,
        prefix: Sequence[ChunkHash] = (),
    ) -> Reserved:
        """Reserve `num_bytes` for one part of each chunk that lacks it.

        Evicts other chunks as needed, but none of `hashes` or their `prefix`, the
        chunks before them: a suffix without its prefix is useless. For the same reason,
        once one chunk finds no room, all later ones are dropped. Every reservation must
        be committed or aborted, once. Above the watermark, evicts down to it.
        """
        reservations: list[Reservation] = []
        num_present = 0
        table = self._table
        with self._lock:
            crowded = table.is_crowded(len(hashes), num_bytes)
            held = table.hold_known(prefix) if crowded else []
            held += table.hold_known(hashes)
            account = table.account(name, owner)
            full = table.closed
        for first in range(0, len(hashes), RESERVE_CHUNKS):
            # Making room takes 5 us per chunk: lookups take the lock in between.
            with self._lock:
                for index in range(first, min(first + RESERVE_CHUNKS, len(hashes))):
                    if table.has(hashes[index], part):
                        num_present += 1
                        continue
                    extents = (
                        None if full else table.make_room(num_bytes, owner, account)
                    )
                    if extents is None:
                        full = True
                        continue
                    place = Part(extents, num_bytes, name)
                    chunk = table.begin(hashes[index], part, place, account)
                    reservations.append(Reservation(index, chunk, part, extents))
        while crowded and self._evict_down(owner):
            pass
        self.release(held)
        self._after_changes()
        num_dropped = len(hashes) - num_present - len(reservations)
        return Reserved(reservations, num_present, num_dropped)

    def _evict_down(self, owner: SessionKey | None) -> bool:
        with self._lock:
            return self._table.evict_down(RESERVE_CHUNKS, owner)

    def commit(self, reservations: Sequence[Reservation], *, hold: bool = False) -> int:
        """Make written parts readable; return their number.

        Fewer than all only if some were settled before, their chunk was found corrupt
        meanwhile, or L1 was closed. With `hold`, each reservation's chunk is held once
        and must be given to `release`.
        """
        num_committed = 0
        with self._lock:
            if hold:
                self._table.hold([reservation.chunk for reservation in reservations])
            for reservation in reversed(reservations):
                if self._table.commit(reservation):
                    num_committed += 1
                    if self._journal is not None:
                        self._journal.note(reservation.chunk, reservation.part)
        self._after_changes()
        return num_committed

    def abort(self, reservations: Sequence[Reservation]) -> None:
        """Free parts that were not written; no reader has seen them."""
        with self._lock:
            for reservation in reversed(reservations):
                self._table.abort(reservation)

    def restore(self, found: Sequence[PartCommitted]) -> None:
        """Add parts whose bytes lie in the arena from an earlier run.

        Called once, for an empty L1 with a journal. The parts were checked, do not
        overlap, and are ordered oldest first.
        """
        with self._lock:
            self._table.arena.claim(part.extents for part in found)
            for part in found:
                place = Part(part.extents, part.num_bytes, part.name, part.checksum)
                chunk = self._table.index.setdefault(
                    part.chunk,
                    Chunk(part.chunk, {}, account=self._table.account(part.name, None)),
                )
                self._table.place(chunk, part.part, place)
                self._table.enter(chunk, part.part)
                if self._journal is not None:
                    self._journal.note(chunk, part.part)
        if self._journal is not None:
            self._journal.begin()

    # -- reading ----------------------------------------------------------------------

    def present(self, hashes: Sequence[ChunkHash], needs: int) -> list[Chunk]:
        """Return the leading chunks that have all parts of the mask `needs`.

        They may be removed at any time: `acquire_leading` holds them.
        """
        with self._lock:
            return self._table.leading(hashes, needs)

    def peek(self, hashes: Sequence[ChunkHash]) -> list[Chunk | None]:
        """Return each chunk of the index, None for an unknown one; holds nothing.

        `ready` may be 0 and may change at any time.
        """
        with self._lock:
            return [*map(self._table.index.get, hashes)]

    def acquire_leading(self, hashes: Sequence[ChunkHash], needs: int) -> list[Chunk]:
        """Hold and return the leading chunks that have all parts of `needs`.

        Each must be given to `release` once.
        """
        with self._lock:
            chunks = self._table.leading(hashes, needs)
            self._table.hold(chunks)
        return chunks

    def acquire(
        self, hashes: Sequence[ChunkHash], needs: Sequence[int]
    ) -> list[Chunk | None] | None:
        """Hold every chunk i with all parts of `needs[i]`, or none at all (None).

        Where `needs[i]` is 0 the chunk is not needed: its entry is None and it is not
        held. The list can be given to `release`, once.
        """
        chunks: list[Chunk | None] = []
        with self._lock:
            get = self._table.index.get
            for key, need in zip(hashes, needs, strict=True):
                chunk = get(key) if need else None
                if need and (chunk is None or chunk.ready & need != need):
                    return None
                chunks.append(chunk)
            self._table.hold(chunks)
        return chunks

    def hold(self, hashes: Sequence[ChunkHash]) -> list[Chunk | None]:
        """Hold and return each chunk of the index, with any parts; see `release`."""
        with self._lock:
            chunks = [*map(self._table.index.get, hashes)]
            self._table.hold(chunks)
        return chunks

    def release(self, chunks: Sequence[Chunk | None]) -> None:
        """End one hold on each chunk."""
        with self._lock:
            self._table.release(chunks)

    def touch(self, hashes: Sequence[ChunkHash]) -> None:
        """Count a request's use of its chunks; called when the request ends.

        Tail to head, so that leaves are evicted first. Unknown chunks are skipped.
        """
        with self._lock:
            touch = self._table.policy.touch
            for chunk in map(self._table.index.get, reversed(hashes)):
                if chunk is not None and chunk.ready:
                    touch(chunk.hash)
                    if not chunk.listed:
                        chunk.listed = True

    def mark_saved(self, chunk: Chunk, parts: int) -> None:
        """Record that some tier has a mask of parts of a chunk."""
        with self._lock:
            chunk.saved |= parts

    def coming(self, count: int) -> list[Chunk]:
        """Return about `count` chunks that will be evicted next."""
        with self._lock:
            known = map(self._table.index.get, self._table.policy.coming(count))
            return [chunk for chunk in known if chunk is not None]

    # -- the whole --------------------------------------------------------------------

    def hashes(self) -> list[ChunkHash]:
        """Return a copy of the index's keys, at 10 ns each."""
        with self._lock:
            return list(self._table.index)

    def drop(self, hashes: Sequence[ChunkHash]) -> int:
        """Drop those chunks that are neither held nor written; return their number.

        Takes 2.5 us per chunk under the lock: callers split long lists.
        """
        num_dropped = 0
        with self._lock:
            for chunk in map(self._table.index.get, hashes):
                if chunk is not None and not (chunk.holds or chunk.reserved):
                    self._table.drop(chunk, DropReason.CLEARED)
                    num_dropped += 1
        self._after_changes()
        return num_dropped

    def condemn(self, chunk: Chunk) -> bool:
        """Remove a corrupt chunk, even if it is held or written.

        No reader finds it from now on, and parts being written to it are not kept; its
        memory is freed with the last hold. Returns False if it was removed before.
        """
        with self._lock:
            known = self._table.index.get(chunk.hash) is chunk
            if known:
                self._table.drop(chunk, DropReason.CORRUPT)
        self._after_changes()
        return known

    def stats(self) -> L1Stats:
        """Return the counts, which are updated with each change."""
        with self._lock:
            return self._table.stats()

    def quotas(self) -> tuple[QuotaStatus, ...]:
        """Describe each account with a quota."""
        with self._lock:
            order = self._table.quotas
            return order.status() if order is not None else ()

    def close(self) -> None:
        """Empty the index. Later calls find and change nothing.

        The arena stays open; its owner closes it after the last copy.
        """
        with self._lock:
            self._table.close()

    def check(self) -> None:
        """Raise `Internal` if the state is inconsistent. Visits every chunk."""
        with self._lock:
            self._table.check()

    # -- the journal ------------------------------------------------------------------

    def _after_changes(self) -> None:
        """Write the journal and call the callbacks, without the lock."""
        if self._table.removals:
            with self._callback_lock:
                while self._table.removals:
                    removal = self._table.removals.popleft()
                    for callback in self._callbacks:
                        callback(removal)
        journal = self._journal
        if journal is not None and journal.write():
            journal.compact(self._note_all)

    def _note_all(self) -> None:
        """Note every readable part again, a few chunks at a time."""
        hashes = self.hashes()
        journal = self._journal
        for first in range(0, len(hashes) if journal else 0, NOTE_CHUNKS):
            with self._lock:
                for key in hashes[first : first + NOTE_CHUNKS]:
                    chunk = self._table.index.get(key)
                    for part in chunk.parts if chunk and journal else ():
                        if chunk and journal and chunk.ready >> part & 1:
                            journal.note(chunk, part)
            if journal is not None:
                journal.write()
