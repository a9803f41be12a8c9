"""L1: which chunks are in the arena, who writes them, who reads them.

A part is reserved, written outside the lock by whoever reserved it, and then
committed or aborted. A chunk is there for a reader when every part that the reader
needs is committed. Parts of a chunk are evicted together, never while the chunk is
held or written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from kvcore.errors import Internal
from kvcore.keys import ChunkHash, SessionKey
from kvcore.storage.arena import Allocation, Arena
from kvcore.storage.chunk import (
    Chunk,
    DropReason,
    Gone,
    L1Stats,
    Part,
    PartId,
    PartName,
    Reservation,
    Reserved,
    check_chunk,
    used_extents,
)
from kvcore.storage.eviction import EvictionPolicy

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
"""Chunks for which room is made in one go."""


class L1:
    """The index of chunks, and the only one who touches the arena's bookkeeping.

    Threads call it as they like; one lock guards all state and nothing slow happens
    under it. The cost of a call grows with the chunks named in it (and those it
    evicts), not with the chunks held.
    """

    def __init__(self, arena: Arena, policy: EvictionPolicy) -> None:
        self._arena = arena
        self._policy = policy
        self._lock = threading.Lock()
        self._index: dict[ChunkHash, Chunk] = {}
        self._dropped: set[Chunk] = set()
        self._watchers: list[Gone] = []
        self._closed = False
        self._num_parts = 0
        self._num_held = 0
        self._num_reserved = 0
        self._num_evicted = 0

    def watch(self, gone: Gone) -> None:
        """Have `gone` told of every chunk that leaves, from now on."""
        with self._lock:
            self._watchers.append(gone)

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
        """Make room to write one part of each chunk that lacks it.

        Evicts others for it, but none of `hashes` nor of their `prefix`, the chunks
        before them: a suffix without its prefix is no use. For the same reason, once
        one finds no room, the later ones are dropped too. Every reservation must be
        committed or aborted, once.
        """
        reservations: list[Reservation] = []
        num_present = 0
        with self._lock:
            room = len(hashes) * self._arena.num_pages_for(num_bytes)
            crowded = room * self._arena.page_bytes > self._arena.free_bytes
            held = self._hold_known(prefix) if crowded else []
            held += self._hold_known(hashes)
            full = self._closed
        for first in range(0, len(hashes), RESERVE_CHUNKS):
            # Making room takes 5 us a chunk: let lookups have the lock in between.
            with self._lock:
                for index in range(first, min(first + RESERVE_CHUNKS, len(hashes))):
                    if self._has(hashes[index], part):
                        num_present += 1
                        continue
                    extents = None if full else self._make_room(num_bytes, owner)
                    if extents is None:
                        full = True
                        continue
                    place = Part(extents, num_bytes, name)
                    chunk = self._begin(hashes[index], part, place)
                    reservations.append(Reservation(index, chunk, part, extents))
        self.release(held)
        num_dropped = len(hashes) - num_present - len(reservations)
        return Reserved(reservations, num_present, num_dropped)

    def commit(self, reservations: Sequence[Reservation], *, hold: bool = False) -> int:
        """Make written parts readable; return how many.

        Less than all only when some were settled before, their chunk was found
        corrupt meanwhile, or L1 was closed. With `hold`, each reservation's chunk is
        held once and must be given to `release`.
        """
        num_committed = 0
        with self._lock:
            if hold:
                self._hold([reservation.chunk for reservation in reservations])
            for reservation in reversed(reservations):
                if self._settle(reservation):
                    chunk = reservation.chunk
                    self._note_checksum(reservation)
                    chunk.ready |= 1 << reservation.part
                    self._touch(chunk)
                    num_committed += 1
            self._num_parts += num_committed
        return num_committed

    def abort(self, reservations: Sequence[Reservation]) -> None:
        """Give parts back that were not written; nobody has seen them."""
        with self._lock:
            for reservation in reversed(reservations):
                if self._settle(reservation):
                    chunk = reservation.chunk
                    self._arena.free(chunk.parts.pop(reservation.part).extents)
                    if not chunk.parts:
                        del self._index[chunk.hash]
                    elif not (chunk.listed or chunk.reserved or chunk.holds):
                        self._touch(chunk)

    # -- reading ----------------------------------------------------------------------

    def present(self, hashes: Sequence[ChunkHash], needs: int) -> list[Chunk]:
        """Return the leading chunks that have all parts of the mask `needs`.

        They may be gone by the time the caller looks: `acquire_leading` holds them.
        """
        with self._lock:
            return self._leading(hashes, needs)

    def peek(self, hashes: Sequence[ChunkHash]) -> list[Chunk | None]:
        """Return what is known of each chunk, for callers with rules of their own.

        None for an unknown one. `ready` may be 0, and may change: `acquire` decides.
        """
        with self._lock:
            return [*map(self._index.get, hashes)]

    def acquire_leading(self, hashes: Sequence[ChunkHash], needs: int) -> list[Chunk]:
        """Hold and return the leading chunks that have all parts of `needs`.

        Each must be given to `release` once.
        """
        with self._lock:
            chunks = self._leading(hashes, needs)
            self._hold(chunks)
        return chunks

    def acquire(
        self, hashes: Sequence[ChunkHash], needs: Sequence[int]
    ) -> list[Chunk | None] | None:
        """Hold every chunk i with all parts of `needs[i]`, or none at all (None).

        Where `needs[i]` is 0 the chunk is not wanted: that entry is None and nothing
        is held. The list as it is can be given to `release`, once.
        """
        chunks: list[Chunk | None] = []
        with self._lock:
            get = self._index.get
            for key, need in zip(hashes, needs, strict=True):
                chunk = get(key) if need else None
                if need and (chunk is None or chunk.ready & need != need):
                    return None
                chunks.append(chunk)
            self._hold(chunks)
        return chunks

    def hold(self, hashes: Sequence[ChunkHash]) -> list[Chunk | None]:
        """Hold what is known of each chunk, whatever parts it has; see `release`."""
        with self._lock:
            chunks = [*map(self._index.get, hashes)]
            self._hold(chunks)
        return chunks

    def release(self, chunks: Sequence[Chunk | None]) -> None:
        """End one hold on each chunk."""
        with self._lock:
            self._release(chunks)

    def touch(self, hashes: Sequence[ChunkHash]) -> None:
        """Note the use of a request's chunks, from its start on, at its end.

        Tail to head, so that leaves are evicted first. Unknown ones are passed over.
        """
        with self._lock:
            touch = self._policy.touch
            for chunk in map(self._index.get, reversed(hashes)):
                if chunk is not None and chunk.ready:
                    touch(chunk.hash)
                    if not chunk.listed:
                        chunk.listed = True

    def mark_saved(self, chunk: Chunk, parts: int) -> None:
        """Note that some tier has these parts of a chunk, a mask."""
        with self._lock:
            chunk.saved |= parts

    def coming(self, count: int) -> list[Chunk]:
        """Return about `count` chunks that will be evicted next."""
        with self._lock:
            known = map(self._index.get, self._policy.coming(count))
            return [chunk for chunk in known if chunk is not None]

    # -- the whole --------------------------------------------------------------------

    def hashes(self) -> list[ChunkHash]:
        """Return a copy of the index's keys, 10 ns each."""
        with self._lock:
            return list(self._index)

    def drop(self, hashes: Sequence[ChunkHash]) -> int:
        """Drop the chunks among these that nobody holds or writes; return how many.

        2.5 us a chunk under the lock: callers cut long lists.
        """
        num_dropped = 0
        with self._lock:
            for chunk in map(self._index.get, hashes):
                if chunk is not None and not (chunk.holds or chunk.reserved):
                    self._drop(chunk, DropReason.CLEARED)
                    num_dropped += 1
        return num_dropped

    def condemn(self, chunk: Chunk) -> bool:
        """Take out a chunk whose bytes are wrong, though it may be held or written.

        Nobody finds it from here on, and what is being written to it will not be
        kept; its memory is freed with the last hold. False when it was out before.
        """
        with self._lock:
            known = self._index.get(chunk.hash) is chunk
            if known:
                self._drop(chunk, DropReason.CORRUPT)
        return known

    def stats(self) -> L1Stats:
        """Return the counts, all kept as they change."""
        with self._lock:
            return L1Stats(
                num_chunks=len(self._index),
                num_parts=self._num_parts,
                num_held=self._num_held,
                num_reserved=self._num_reserved,
                num_evicted=self._num_evicted,
                used_bytes=self._arena.used_bytes,
                total_bytes=self._arena.total_bytes,
                page_bytes=self._arena.page_bytes,
            )

    def close(self) -> None:
        """Forget everything. What comes later is harmless and finds nothing.

        The arena stays open and is its owner's to close, after the last copy.
        """
        with self._lock:
            self._closed = True
            self._index.clear()
            self._num_parts = 0

    # -- under the lock ---------------------------------------------------------------

    def _leading(self, hashes: Sequence[ChunkHash], needs: int) -> list[Chunk]:
        chunks = []
        get = self._index.get
        for key in hashes:
            chunk = get(key)
            if chunk is None or chunk.ready & needs != needs:
                break
            chunks.append(chunk)
        return chunks

    def _has(self, key: ChunkHash, part: PartId) -> bool:
        chunk = self._index.get(key)
        return chunk is not None and bool((chunk.ready | chunk.reserved) >> part & 1)

    def _hold_known(self, hashes: Iterable[ChunkHash]) -> list[Chunk]:
        chunks = [chunk for chunk in map(self._index.get, hashes) if chunk is not None]
        self._hold(chunks)
        return chunks

    def _hold(self, chunks: Iterable[Chunk | None]) -> None:
        num_new = 0
        for chunk in chunks:
            if chunk is not None:
                if not chunk.holds:
                    num_new += 1
                chunk.holds += 1
        self._num_held += num_new

    def _release(self, chunks: Sequence[Chunk | None]) -> None:
        num_idle = 0
        for chunk in reversed(chunks):
            if chunk is not None:
                chunk.holds = holds = chunk.holds - 1
                if not holds:
                    num_idle += 1
                    if chunk.dropped:
                        self._free(chunk)
                    elif not (chunk.listed or chunk.reserved):
                        self._touch(chunk)
        self._num_held -= num_idle

    def _touch(self, chunk: Chunk) -> None:
        if not self._closed:
            chunk.listed = True
            self._policy.touch(chunk.hash)

    def _begin(self, key: ChunkHash, part: PartId, place: Part) -> Chunk:
        chunk = self._index.get(key)
        if chunk is None:
            chunk = self._index[key] = Chunk(key, {})
        chunk.parts[part] = place
        chunk.reserved |= 1 << part
        self._num_reserved += 1
        return chunk

    def _settle(self, reservation: Reservation) -> bool:
        """End a reservation; False when there is nothing left to do for it."""
        if reservation.settled:
            return False
        reservation.settled = True
        chunk = reservation.chunk
        chunk.reserved &= ~(1 << reservation.part)
        self._num_reserved -= 1
        if chunk.dropped:
            self._free(chunk)
        return not (self._closed or chunk.dropped)

    def _note_checksum(self, reservation: Reservation) -> None:
        if reservation.checksum:
            parts, part = reservation.chunk.parts, reservation.part
            place = parts[part]
            parts[part] = Part(
                place.extents, place.num_bytes, place.name, reservation.checksum
            )

    def _make_room(self, num_bytes: int, owner: SessionKey | None) -> Allocation | None:
        if num_bytes > self._arena.total_bytes:
            return None  # Evicting everything would not help.
        extents = self._arena.allocate(num_bytes)
        while extents is None:
            victim = self._policy.evict(self._evictable)
            if victim is None:
                return None
            self._drop(self._index[victim], DropReason.EVICTED, owner)
            self._num_evicted += 1
            extents = self._arena.allocate(num_bytes)
        return extents

    def _evictable(self, key: ChunkHash) -> bool:
        chunk = self._index[key]
        # The policy forgets it either way; the end of what stands in the way
        # (release, commit, abort) puts it back.
        chunk.listed = False
        return not (chunk.holds or chunk.reserved)

    def _drop(
        self, chunk: Chunk, reason: DropReason, owner: SessionKey | None = None
    ) -> None:
        """Take a chunk out; the policy may know it or not."""
        if chunk.listed:
            self._policy.discard(chunk.hash)
            chunk.listed = False
        for gone in self._watchers:
            gone(chunk, reason, owner)
        del self._index[chunk.hash]
        self._num_parts -= chunk.ready.bit_count()
        chunk.dropped = True
        self._dropped.add(chunk)
        self._free(chunk)

    def _free(self, chunk: Chunk) -> None:
        """Free a dropped chunk's memory, unless somebody still reads or writes it."""
        if chunk.holds or chunk.reserved or self._closed:
            return
        self._dropped.discard(chunk)
        for part in chunk.parts.values():
            self._arena.free(part.extents)

    # -- for tests --------------------------------------------------------------------

    def check(self) -> None:
        """Raise `Internal` when the state contradicts itself. Walks over everything."""
        with self._lock:
            for key, chunk in self._index.items():
                check_chunk(key, chunk)
            chunks = [*self._index.values(), *self._dropped]
            pages = sum(
                self._arena.num_pages_for(extent.length)
                for extent in used_extents(chunks)
            )
            kept = (self._num_parts, self._num_reserved, self._num_held)
            counted = (
                sum(chunk.ready.bit_count() for chunk in self._index.values()),
                sum(chunk.reserved.bit_count() for chunk in chunks),
                sum(chunk.holds > 0 for chunk in chunks),
            )
            if (*kept, self._arena.used_bytes) != (
                *counted,
                pages * self._arena.page_bytes,
            ):
                raise Internal(f"kept {kept}, counted {counted}, in {pages} pages")
