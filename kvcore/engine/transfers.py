"""Copies of an instance: reserve or hold, move, then commit or let go.

Who moves is a choice: `store` and `retrieve` do it here, on an instance's lanes; a
worker that copies itself is given the two other legs (`kvcore.worker.tickets`). Every
failure leg is here: what was reserved is committed or aborted, what was held is
released, whatever happens between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from time import monotonic_ns

from kvcore.copy.block_arrays import (
    BlockArray,
    TokenRange,
    storable_chunks,
    target_chunks,
)
from kvcore.copy.chunk_copier import ChunkCopier
from kvcore.copy.paged_cache import PagedCache
from kvcore.engine.instance import Instance
from kvcore.errors import ChunksMissing, DeadlineExceeded, UnknownInstance
from kvcore.extents import Checksum, PartLocation
from kvcore.keys import ChunkHash, SessionKey
from kvcore.storage.arena import Arena
from kvcore.storage.l1 import L1, Chunk, PartId, Reservation, Reserved

Places = tuple[tuple[PartLocation, ...], ...]
AfterScatter = Callable[[Sequence[PagedCache]], None]
"""Work on an instance's caches between a retrieve's copies and its event."""


@dataclass(slots=True)
class StoreCounts:
    """What became of the parts of a store."""

    num_stored: int = 0
    num_present: int = 0
    num_dropped: int = 0
    num_bytes: int = 0

    def count(self, got: Reserved, num_null: int, part_bytes: int) -> None:
        """Count one group's parts in; one with a null block is not stored."""
        self.num_stored += len(got.reservations)
        self.num_present += got.num_present
        self.num_dropped += got.num_dropped + num_null
        self.num_bytes += len(got.reservations) * part_bytes


@dataclass(slots=True)
class PendingStore:
    """Parts that somebody fills from an instance, and then commits or aborts, once."""

    instance: Instance
    deadline_ns: int
    groups: list[list[Reservation]] = field(default_factory=list)
    stored: StoreCounts = field(default_factory=StoreCounts)

    @property
    def places(self) -> Places:
        """Where the parts lie, one tuple a cache group."""
        return tuple(
            tuple(PartLocation(one.index, one.extents) for one in reservations)
            for reservations in self.groups
        )

    @property
    def reservations(self) -> list[Reservation]:
        """All of them, group after group: the order of checksums."""
        return [one for reservations in self.groups for one in reservations]


@dataclass(frozen=True, slots=True)
class HeldChunks:
    """Chunks that somebody copies to an instance, and then releases, once."""

    instance: Instance
    chunks: Sequence[Chunk | None]
    places: Places


class Transfers:
    """Stores into and retrieves from one L1."""

    def __init__(
        self,
        l1: L1,
        arena: Arena,
        chunk_size: int,
        clock_ns: Callable[[], int] = monotonic_ns,
        on_stored: Callable[[Sequence[Chunk]], None] | None = None,
        *,
        checksums: bool = False,
        verify: bool = False,
    ) -> None:
        self._l1 = l1
        self._clock_ns = clock_ns
        self._on_stored = on_stored
        self.checksums = checksums or on_stored is not None
        self._verify = verify
        self._mover = ChunkCopier(arena.array, chunk_size, checksums=self.checksums)

    # -- stores -----------------------------------------------------------------------

    def store(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[BlockArray],
        deadline_ns: int,
        owner: SessionKey | None = None,
        prefix: Sequence[ChunkHash] = (),
        event: bytes = b"",
    ) -> StoreCounts:
        """Copy whole chunks into L1, after a worker's event; make them readable.

        Errors as of `reserve` and `commit`.
        """
        self._wait(instance, event, deadline_ns)
        write = self.reserve(instance, hashes, blocks, deadline_ns, owner, prefix)
        try:
            checksums = self._mover.gather(instance.caches, blocks, write.places)
        except BaseException:
            self.abort(write)
            raise
        return self.commit(write, checksums)

    def reserve(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[BlockArray],
        deadline_ns: int,
        owner: SessionKey | None = None,
        prefix: Sequence[ChunkHash] = (),
    ) -> PendingStore:
        """Reserve a part for every whole chunk that is not there.

        Room is made for `owner`, and none of `prefix`, the chunks before, goes for it.

        Raises:
            DeadlineExceeded: before anything began.
        """
        self._check_deadline(deadline_ns)
        write = PendingStore(instance, deadline_ns)
        try:
            for group, rows in zip(instance.groups, blocks, strict=True):
                whole = storable_chunks(rows)
                got = self._l1.reserve(
                    [hashes[i] for i in whole],
                    group.part,
                    group.part_bytes,
                    name=group.name,
                    owner=owner,
                    prefix=prefix,
                )
                write.groups.append(got.reservations)
                for reservation in got.reservations:
                    reservation.index = whole[reservation.index]
                write.stored.count(got, len(rows) - len(whole), group.part_bytes)
        except BaseException:
            self.abort(write)
            raise
        return write

    def commit(self, write: PendingStore, checksums: Sequence[Checksum]) -> StoreCounts:
        """Make what was written readable, or abort it where it may be wrong.

        `checksums` are those of the reservations, or none at all.

        Raises:
            DeadlineExceeded: by the end of the copy its blocks may have been reused;
                nothing of it is kept.
            UnknownInstance: its client has gone meanwhile; nothing is kept either.
        """
        reserved = write.reservations
        try:
            self._check_deadline(write.deadline_ns)
            if write.instance.is_abandoned:
                raise UnknownInstance("its client went while it was copied from")
        except BaseException:
            self.abort(write)
            raise
        for reservation, checksum in zip(reserved, checksums, strict=bool(checksums)):
            reservation.checksum = checksum
        self._l1.commit(reserved)
        if self._on_stored is not None and reserved:
            self._on_stored([reservation.chunk for reservation in reserved])
        return write.stored

    def abort(self, write: PendingStore) -> None:
        """Give back what was reserved; nobody has seen it."""
        self._l1.abort(write.reservations)

    # -- retrieves --------------------------------------------------------------------

    def retrieve(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[BlockArray],
        tokens: TokenRange,
        deadline_ns: int,
        after_scatter: AfterScatter | None = None,
        event: bytes = b"",
    ) -> int:
        """Copy chunks into the instance's blocks, all or none; return the bytes.

        Waits for the worker's event first and records the instance's event last;
        `after_scatter` runs between the copies and that record, if given. Errors as
        of `hold`.
        """
        self._wait(instance, event, deadline_ns)
        read = self.hold(instance, hashes, blocks, tokens, deadline_ns)
        try:
            wrong = self._mover.find_wrong(read.places)
            if wrong:
                self.condemn(read, wrong)
                raise ChunksMissing("a chunk's bytes were found wrong")
            num_bytes = self._mover.scatter(
                instance.caches, blocks, read.places, tokens
            )
            if after_scatter is not None:
                after_scatter(instance.caches)
            instance.memory.result().record()
        finally:
            self.release(read)
        return num_bytes

    def hold(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[BlockArray],
        tokens: TokenRange,
        deadline_ns: int,
    ) -> HeldChunks:
        """Hold every chunk that has somewhere to be written, or none.

        Where bytes are to be verified, the places carry the checksums.

        Raises:
            ChunksMissing: a chunk is not there, or its bytes were found wrong.
            DeadlineExceeded: it passed before the first byte was written.
        """
        self._check_deadline(deadline_ns)
        wants = [target_chunks(rows, tokens) for rows in blocks]
        bits = [1 << group.part for group in instance.groups]
        needs = [sum(compress(bits, want)) for want in zip(*wants, strict=True)]
        chunks = self._l1.acquire(hashes, needs)
        if chunks is None:
            raise ChunksMissing(
                f"not every chunk of tokens {tokens.start} to {tokens.end} is present"
            )
        places = tuple(
            tuple(
                self._place(i, chunk, group.part)
                for i, chunk in enumerate(chunks)
                if want[i] and chunk is not None
            )
            for group, want in zip(instance.groups, wants, strict=True)
        )
        return HeldChunks(instance, chunks, places)

    def _place(self, index: int, chunk: Chunk, part: PartId) -> PartLocation:
        place = chunk.parts[part]
        if not self._verify:
            return PartLocation(index, place.extents)
        return PartLocation(index, place.extents, place.checksum)

    def release(self, read: HeldChunks) -> None:
        """Let go of what was held."""
        self._l1.release(read.chunks)

    def condemn(self, read: HeldChunks, wrong: Sequence[int]) -> None:
        """Take out held chunks whose bytes are not as they were stored."""
        for index in wrong:
            chunk = read.chunks[index]
            if chunk is not None:
                self._l1.condemn(chunk)

    def _wait(self, instance: Instance, event: bytes, deadline_ns: int) -> None:
        """Wait for what the worker has recorded, and for its memory to be attached."""
        memory = instance.memory.result()
        memory.wait(event, lambda: self._check_deadline(deadline_ns))

    def _check_deadline(self, deadline_ns: int) -> None:
        if deadline_ns and self._clock_ns() > deadline_ns:
            raise DeadlineExceeded("the deadline passed; nothing was kept or written")
