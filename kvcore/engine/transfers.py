"""Transfers between instances and L1: plan, reserve or hold, copy, commit or release.

`store` and `retrieve` run the whole transfer on an instance's lanes. For a worker that
copies its own cache, `kvcore.worker.ticket_service` calls the steps around the copy.
Every reservation is committed or aborted and every hold released, whatever fails
between.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress
from time import monotonic_ns
from typing import TypeVar

from kvcore.copy.block_arrays import (
    BlockArray,
    TokenRange,
    check_targets,
    read_blocks,
    storable_chunks,
    target_chunks,
)
from kvcore.copy.paged_cache import ChunkCopier, PagedCache
from kvcore.engine.counters import EngineCounters
from kvcore.engine.leases import LeaseNumber, LeaseTable
from kvcore.engine.registrations import GONE_MEANWHILE, Group, Instance, Registry
from kvcore.engine.request_context import RequestContext
from kvcore.engine.sessions import Session, SessionTable
from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    DeadlineExceeded,
    UnknownInstance,
)
from kvcore.extents import Checksum, PartLocation
from kvcore.keys import ChunkHash, SessionKey
from kvcore.protocol import Retrieve, RetrieveReply, Store, StoreReply
from kvcore.storage.arena import Arena
from kvcore.storage.l1 import L1, Chunk, Reservation, Reserved

Places = tuple[tuple[PartLocation, ...], ...]
AfterScatter = Callable[[Sequence[PagedCache]], None]
"""Work on an instance's caches between a retrieve's copies and its event."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What a request copies, and the use of its session until that has ended."""

    instance: Instance
    session: Session
    tokens: TokenRange
    blocks: tuple[BlockArray, ...]
    lease: LeaseNumber | None
    """The session's lease when the transfer began."""
    session_use: ExitStack
    """Closed once, when the transfer has ended."""

    @property
    def hashes(self) -> list[ChunkHash]:
        """Hashes of the chunks that are copied."""
        chain = self.session.chain.hashes
        return chain[self.tokens.first_chunk : self.tokens.end_chunk]

    @property
    def prefix(self) -> list[ChunkHash]:
        """Hashes of the chunks before them."""
        return self.session.chain.hashes[: self.tokens.first_chunk]


Planning = Generator[None, None, TransferPlan | None]
"""Steps to a plan; None where there is nothing to copy."""


@dataclass(slots=True)
class StoreCounts:
    """Counts of a store's parts, by outcome."""

    num_stored: int = 0
    num_present: int = 0
    num_dropped: int = 0
    num_bytes: int = 0

    def count(self, got: Reserved, num_null: int, part_bytes: int) -> None:
        """Add one group's parts; those with a null block are not stored."""
        self.num_stored += len(got.reservations)
        self.num_present += got.num_present
        self.num_dropped += got.num_dropped + num_null
        self.num_bytes += len(got.reservations) * part_bytes


@dataclass(slots=True)
class PendingStore:
    """Reserved parts that are filled from an instance, then committed or aborted."""

    instance: Instance
    deadline_ns: int
    groups: list[list[Reservation]] = field(default_factory=list)
    stored: StoreCounts = field(default_factory=StoreCounts)

    @property
    def places(self) -> Places:
        """Locations of the parts, one tuple per cache group."""
        return tuple(
            tuple(PartLocation(one.index, one.extents) for one in reservations)
            for reservations in self.groups
        )

    @property
    def reservations(self) -> list[Reservation]:
        """All reservations, group after group: the order of checksums."""
        return [one for reservations in self.groups for one in reservations]


@dataclass(frozen=True, slots=True)
class HeldChunks:
    """Held chunks that are copied to an instance, then released."""

    instance: Instance
    chunks: Sequence[Chunk | None]
    places: Places


class Transfers:
    """Stores into and retrieves from one L1.

    Plans, results and counts belong to the loop thread; the steps between run on any.
    """

    def __init__(
        self,
        l1: L1,
        arena: Arena,
        registry: Registry,
        sessions: SessionTable,
        leases: LeaseTable,
        counters: EngineCounters,
        clock_ns: Callable[[], int] = monotonic_ns,
        on_stored: Callable[[Sequence[Chunk]], None] | None = None,
        *,
        checksums: bool = False,
        verify: bool = False,
    ) -> None:
        self._l1 = l1
        self.arena_name = arena.name
        self._registry = registry
        self._sessions = sessions
        self._leases = leases
        self._counters = counters
        self._chunk_size = registry.chunk_size
        self._clock_ns = clock_ns
        self._on_stored = on_stored
        self.checksums = checksums or on_stored is not None
        self._verify = verify
        self._copier = ChunkCopier(
            arena.array, self._chunk_size, checksums=self.checksums
        )

    # -- plans ------------------------------------------------------------------------

    def instance(
        self, instance_id: str, context: RequestContext, *, private: bool = False
    ) -> Instance:
        """Return a client's instance whose cache the server copies, or its worker.

        Raises:
            UnknownInstance: no such instance, or another client's.
            BadRequest: the other side copies this instance's cache.
        """
        instance = self._registry.get(context.client, instance_id)
        if instance.is_private and not private:
            raise BadRequest(
                f"instance {instance_id!r} is private: its worker copies, by RESERVE "
                "and HOLD"
            )
        if private and not instance.is_private:
            raise BadRequest(
                f"instance {instance_id!r} is not private: the server copies, by "
                "STORE and RETRIEVE"
            )
        return instance

    def check_registered(self, instance: Instance) -> None:
        """Raise `UnknownInstance` if an instance was unregistered meanwhile."""
        self._registry.check_registered(instance)

    def plan_store(self, request: Store, instance: Instance) -> Planning:
        """Plan to copy whole chunks from blocks."""
        tokens = TokenRange.to_store(request.start, request.end, self._chunk_size)
        blocks = read_blocks(instance.layouts, request.blocks, tokens)
        if tokens.is_empty:
            return None
        return (yield from self._plan(request, instance, tokens, blocks, tokens.end))

    def plan_retrieve(self, request: Retrieve, instance: Instance) -> Planning:
        """Plan to copy a token range into blocks."""
        skip = request.skip_first_n_tokens
        tokens = TokenRange.to_retrieve(
            request.start, request.end, skip, self._chunk_size
        )
        blocks = read_blocks(instance.layouts, request.blocks, tokens)
        if tokens.is_empty:
            return None
        check_targets(instance.layouts, blocks, tokens)
        whole = tokens.end_chunk * self._chunk_size
        return (yield from self._plan(request, instance, tokens, blocks, whole))

    def _plan(
        self,
        request: Store | Retrieve,
        instance: Instance,
        tokens: TokenRange,
        blocks: tuple[BlockArray, ...],
        end: int,
    ) -> Generator[None, None, TransferPlan]:
        session = self._sessions.open(request.session, instance.space, instance.client)
        with ExitStack() as use:
            use.enter_context(self._sessions.use(session))
            yield from self._sessions.extend(
                session, request.tokens, request.token_offset, request.extras, end
            )
            self.check_registered(instance)
            lease = None if session.ended else self._leases.number(session.key)
            return TransferPlan(instance, session, tokens, blocks, lease, use.pop_all())

    # -- results ----------------------------------------------------------------------

    def result(self, future: Future[T]) -> T:
        """Return a lane's result; count and raise its errors."""
        try:
            return future.result()
        except CancelledError:
            raise UnknownInstance(GONE_MEANWHILE) from None
        except DeadlineExceeded:
            self._counters.deadlines_exceeded += 1
            raise
        except ChunksMissing:
            self._counters.retrieves_missing += 1
            raise

    def count_store(self, stored: StoreCounts) -> StoreReply:
        """Count a store of a prompt's chunks and return its reply."""
        self._counters.stores += 1
        return self.count_parts(stored)

    def count_parts(self, stored: StoreCounts) -> StoreReply:
        """Count the parts of a store and return its reply."""
        self._counters.parts_stored += stored.num_stored
        self._counters.parts_present += stored.num_present
        self._counters.parts_dropped += stored.num_dropped
        self._counters.bytes_stored += stored.num_bytes
        return StoreReply(stored.num_stored, stored.num_present, stored.num_dropped)

    def count_retrieve(self, plan: TransferPlan, num_bytes: int) -> RetrieveReply:
        """Count a retrieve, remove its rank from the lease, and return the reply.

        The session may have another lease by now, from a later lookup: that one waits
        for a read of its own.
        """
        tokens, key = plan.tokens, plan.session.key
        self._counters.retrieves += 1
        self._counters.bytes_retrieved += num_bytes
        if plan.lease is not None and plan.lease == self._leases.number(key):
            self._leases.read(
                key, tokens.first_chunk, tokens.end_chunk, plan.instance.rank
            )
        num_tokens = tokens.end - tokens.first_token
        return RetrieveReply(num_tokens, plan.instance.memory.result().event)

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

        Raises as `reserve` and `commit` do.
        """
        self._wait(instance, event, deadline_ns)
        write = self.reserve(instance, hashes, blocks, deadline_ns, owner, prefix)
        try:
            checksums = self._copier.gather(instance.caches, blocks, write.places)
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
        """Reserve a part for every whole chunk that L1 lacks.

        Room is made at the expense of `owner`'s quota; no chunk of `prefix`, those
        before, is evicted for it.

        Raises:
            DeadlineExceeded: it has passed already.
        """
        self._check_deadline(deadline_ns)
        instance.space.is_used = True
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
        """Make the written parts readable, or abort all of them.

        `checksums` has one for each reservation, or is empty.

        Raises:
            DeadlineExceeded: the blocks may have been reused before the copy ended;
                nothing is kept.
            UnknownInstance: the client has ended meanwhile; nothing is kept.
        """
        reserved = write.reservations
        try:
            self._check_deadline(write.deadline_ns)
            if write.instance.is_abandoned:
                raise UnknownInstance("its client ended while it was copied from")
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
        """Give the reserved parts back; no reader has seen them."""
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
        `after_scatter` runs between the copies and that record, if given. Raises as
        `hold` does.
        """
        self._wait(instance, event, deadline_ns)
        read = self.hold(instance, hashes, blocks, tokens, deadline_ns)
        try:
            wrong = self._copier.find_wrong(read.places)
            if wrong:
                self.condemn(read, wrong)
                raise ChunksMissing("a chunk's bytes were found wrong")
            num_bytes = self._copier.scatter(
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
        """Hold every chunk that has blocks to be written to, or none.

        With `l1.verify` the places carry checksums.

        Raises:
            ChunksMissing: L1 lacks a part of a chunk, or has another layout's.
            DeadlineExceeded: it has passed already.
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
        try:
            places = tuple(
                tuple(
                    self._place(i, chunk, group)
                    for i, chunk in enumerate(chunks)
                    if want[i] and chunk is not None
                )
                for group, want in zip(instance.groups, wants, strict=True)
            )
        except ChunksMissing:
            self._l1.release(chunks)
            raise
        return HeldChunks(instance, chunks, places)

    def _place(self, index: int, chunk: Chunk, group: Group) -> PartLocation:
        place = chunk.parts[group.part]
        # A part id has this meaning in its keyspace only. The hold is what makes the
        # check valid until the copy.
        if place.name != group.name:
            raise ChunksMissing(f"chunk {index} is of another model or layout")
        if not self._verify:
            return PartLocation(index, place.extents)
        return PartLocation(index, place.extents, place.checksum)

    def release(self, read: HeldChunks) -> None:
        """End the hold."""
        self._l1.release(read.chunks)

    def condemn(self, read: HeldChunks, wrong: Sequence[int]) -> None:
        """Remove held chunks whose bytes do not match their checksums."""
        for index in wrong:
            chunk = read.chunks[index]
            if chunk is not None:
                self._l1.condemn(chunk)

    def report_corrupt(self, read: HeldChunks, wrong: Sequence[int]) -> None:
        """Remove held chunks that a worker found corrupt; count its retrieve.

        Raises:
            BadRequest: an index is not that of a held chunk.
        """
        if max(wrong) >= len(read.chunks):
            raise BadRequest(f"wrong: there are only {len(read.chunks)} chunks")
        self._counters.retrieves_missing += 1
        self.condemn(read, wrong)

    def _wait(self, instance: Instance, event: bytes, deadline_ns: int) -> None:
        """Wait for the worker's event and for its memory to be attached."""
        memory = instance.memory.result()
        memory.wait(event, lambda: self._check_deadline(deadline_ns))

    def _check_deadline(self, deadline_ns: int) -> None:
        if deadline_ns and self._clock_ns() > deadline_ns:
            raise DeadlineExceeded("the deadline passed; nothing was kept or written")
