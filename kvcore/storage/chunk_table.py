"""The index of chunks and its changes: L1 without its lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from kvcore.errors import Internal
from kvcore.extents import Allocation
from kvcore.keys import ChunkHash, SessionKey
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import (
    Chunk,
    DropReason,
    L1Stats,
    Part,
    PartId,
    PartName,
    Removal,
    Reservation,
    check_chunk,
    used_extents,
)
from kvcore.storage.eviction import EvictionPolicy
from kvcore.storage.journal import Journal
from kvcore.storage.quotas import QuotaAccount, Quotas


class ChunkTable:
    """Index, arena and eviction policy, kept consistent. Not thread-safe."""

    def __init__(
        self,
        arena: Arena,
        policy: EvictionPolicy,
        watermark: float = 1.0,
        journal: Journal | None = None,
    ) -> None:
        self.arena = arena
        self.policy = policy
        self._journal = journal
        self.quotas = policy if isinstance(policy, Quotas) else None
        self._high_bytes = int(arena.total_bytes * watermark)
        self.index: dict[ChunkHash, Chunk] = {}
        if self.quotas is not None:
            self.quotas.index = self.index
        self.removals: deque[Removal] = deque()
        """Removed chunks that no callback has been called for."""
        self.closed = False
        self._dropped: set[Chunk] = set()
        """Chunks that left the index and are still read or written."""
        self._num_parts = 0
        self._num_held = 0
        self._num_reserved = 0
        self._num_evicted = 0
        self._num_corrupt = 0

    # -- finding and holding ----------------------------------------------------------

    def leading(self, hashes: Sequence[ChunkHash], needs: int) -> list[Chunk]:
        """Return the leading chunks that have all parts of `needs`."""
        chunks = []
        get = self.index.get
        for key in hashes:
            chunk = get(key)
            if chunk is None or chunk.ready & needs != needs:
                break
            chunks.append(chunk)
        return chunks

    def has(self, key: ChunkHash, part: PartId) -> bool:
        """Return whether a part is committed or being written."""
        chunk = self.index.get(key)
        return chunk is not None and bool((chunk.ready | chunk.reserved) >> part & 1)

    def hold_known(self, hashes: Iterable[ChunkHash]) -> list[Chunk]:
        """Hold and return the chunks that are in the index."""
        chunks = [chunk for chunk in map(self.index.get, hashes) if chunk is not None]
        self.hold(chunks)
        return chunks

    def hold(self, chunks: Iterable[Chunk | None]) -> None:
        """Add one hold to each chunk."""
        num_new = 0
        for chunk in chunks:
            if chunk is not None:
                if not chunk.holds:
                    num_new += 1
                chunk.holds += 1
        self._num_held += num_new

    def release(self, chunks: Sequence[Chunk | None]) -> None:
        """End one hold on each chunk, tail to head."""
        num_idle = 0
        for chunk in reversed(chunks):
            if chunk is not None:
                chunk.holds = holds = chunk.holds - 1
                if not holds:
                    num_idle += 1
                    if chunk.dropped:
                        self._free(chunk)
                    elif not (chunk.listed or chunk.reserved):
                        self.admit(chunk)
        self._num_held -= num_idle

    def admit(self, chunk: Chunk) -> None:
        """Give a chunk of the index to the eviction policy."""
        if not self.closed:
            chunk.listed = True
            self.policy.admit(chunk.hash)

    # -- writing ----------------------------------------------------------------------

    def account(
        self, name: PartName | None, owner: SessionKey | None
    ) -> QuotaAccount | None:
        """Return the account of a session's stores; None without a quota."""
        if self.quotas is None or name is None:
            return None
        return self.quotas.account(name.model, owner)

    def begin(
        self,
        key: ChunkHash,
        part: PartId,
        place: Part,
        account: QuotaAccount | None = None,
    ) -> Chunk:
        """Add a part that is being written; a new chunk is on `account`."""
        chunk = self.index.get(key)
        if chunk is None:
            chunk = self.index[key] = Chunk(key, {}, account=account)
        self.place(chunk, part, place)
        chunk.reserved |= 1 << part
        self._num_reserved += 1
        return chunk

    def place(self, chunk: Chunk, part: PartId, place: Part) -> None:
        """Set a part's location and charge its chunk's account."""
        chunk.parts[part] = place
        if chunk.account is not None:
            chunk.account.used_bytes += place.num_bytes

    def commit(self, reservation: Reservation) -> bool:
        """Make a written part readable; return False if it was dropped or settled."""
        if not self._settle(reservation):
            return False
        chunk, part = reservation.chunk, reservation.part
        if reservation.checksum:
            place = chunk.parts[part]
            chunk.parts[part] = Part(
                place.extents, place.num_bytes, place.name, reservation.checksum
            )
        self.enter(chunk, part)
        return True

    def enter(self, chunk: Chunk, part: PartId) -> None:
        """Mark a part as readable."""
        chunk.ready |= 1 << part
        self._num_parts += 1
        self.admit(chunk)

    def abort(self, reservation: Reservation) -> None:
        """Free a part that was not written."""
        if not self._settle(reservation):
            return
        chunk = reservation.chunk
        self._free_part(chunk, chunk.parts.pop(reservation.part))
        if not chunk.parts:
            self._take_out(chunk)
        elif not (chunk.listed or chunk.reserved or chunk.holds):
            self.admit(chunk)

    def _settle(self, reservation: Reservation) -> bool:
        """End a reservation; return False if nothing is left to do for it."""
        if reservation.settled:
            return False
        reservation.settled = True
        chunk = reservation.chunk
        chunk.reserved &= ~(1 << reservation.part)
        self._num_reserved -= 1
        if chunk.dropped:
            self._free(chunk)
        return not (self.closed or chunk.dropped)

    # -- room -------------------------------------------------------------------------

    def is_crowded(self, count: int, num_bytes: int) -> bool:
        """Return whether `count` parts of this size cross the watermark."""
        room = count * self.arena.num_pages_for(num_bytes) * self.arena.page_bytes
        return self.arena.used_bytes + room > self._high_bytes

    def make_room(
        self,
        num_bytes: int,
        owner: SessionKey | None,
        account: QuotaAccount | None = None,
    ) -> Allocation | None:
        """Allocate, evicting as needed; return None if nothing more can be evicted."""
        if num_bytes > self.arena.total_bytes:
            return None  # Evicting everything would not help.
        extents = self.arena.allocate(num_bytes)
        while extents is None:
            if not self._evict(owner, num_bytes, account):
                return None
            extents = self.arena.allocate(num_bytes)
        return extents

    def evict_down(self, max_chunks: int, owner: SessionKey | None) -> bool:
        """Evict up to `max_chunks` above the watermark; return whether more remain."""
        for _ in range(max_chunks):
            if self.arena.used_bytes <= self._high_bytes or not self._evict(owner):
                return False
        return True

    def _evict(
        self,
        owner: SessionKey | None,
        num_bytes: int = 0,
        account: QuotaAccount | None = None,
    ) -> bool:
        """Evict one chunk for a store of `num_bytes` by an owner and its account."""
        victim = None
        if self.quotas and account is not None and account.is_over(num_bytes):
            victim = self.quotas.evict_from(account, self._evictable)
        victim = victim or self.policy.evict(self._evictable)
        if victim is not None:
            self.drop(self.index[victim], DropReason.EVICTED, owner)
        return victim is not None

    def _evictable(self, key: ChunkHash) -> bool:
        chunk = self.index[key]
        # The policy removes it in either case; the end of the hold or write
        # (release, commit, abort) admits it again.
        chunk.listed = False
        return not (chunk.holds or chunk.reserved)

    def drop(
        self, chunk: Chunk, reason: DropReason, owner: SessionKey | None = None
    ) -> None:
        """Remove a chunk; its memory is freed when it is neither held nor written."""
        self.removals.append(Removal(chunk, reason, owner))
        if self._journal is not None:
            self._journal.note_removed(chunk)
        self._num_evicted += reason is DropReason.EVICTED
        self._num_corrupt += reason is DropReason.CORRUPT
        self._num_parts -= chunk.ready.bit_count()
        self._take_out(chunk)

    def _take_out(self, chunk: Chunk) -> None:
        if chunk.listed:
            self.policy.discard(chunk.hash)
            chunk.listed = False
        del self.index[chunk.hash]
        chunk.dropped = True
        self._dropped.add(chunk)
        self._free(chunk)

    def _free(self, chunk: Chunk) -> None:
        if chunk.holds or chunk.reserved or self.closed:
            return
        self._dropped.discard(chunk)
        for part in chunk.parts.values():
            self._free_part(chunk, part)

    def _free_part(self, chunk: Chunk, part: Part) -> None:
        self.arena.free(part.extents)
        if chunk.account is not None:
            chunk.account.used_bytes -= part.num_bytes

    # -- the whole --------------------------------------------------------------------

    def stats(self) -> L1Stats:
        """Return the counts, which are updated with each change."""
        return L1Stats(
            num_chunks=len(self.index),
            num_parts=self._num_parts,
            num_held=self._num_held,
            num_reserved=self._num_reserved,
            num_evicted=self._num_evicted,
            num_corrupt=self._num_corrupt,
            used_bytes=self.arena.used_bytes,
            total_bytes=self.arena.total_bytes,
            page_bytes=self.arena.page_bytes,
        )

    def close(self) -> None:
        """Empty the index; later calls change nothing."""
        self.closed = True
        self.index.clear()
        self._num_parts = 0

    def check(self) -> None:
        """Raise `Internal` if the state is inconsistent. Visits every chunk."""
        for key, chunk in self.index.items():
            check_chunk(key, chunk)
        chunks = [*self.index.values(), *self._dropped]
        pages = sum(
            self.arena.num_pages_for(extent.length) for extent in used_extents(chunks)
        )
        kept = (self._num_parts, self._num_reserved, self._num_held)
        counted = (
            sum(chunk.ready.bit_count() for chunk in self.index.values()),
            sum(chunk.reserved.bit_count() for chunk in chunks),
            sum(chunk.holds > 0 for chunk in chunks),
        )
        in_use = pages * self.arena.page_bytes
        if (*kept, self.arena.used_bytes) != (*counted, in_use):
            raise Internal(f"kept {kept}, counted {counted}, in {pages} pages")
