"""Handlers of the requests that register, store, look up and retrieve KV.

The loop thread calls them; copies run on lanes. A handler returns its reply or a
`DeferredReply`, or is a generator that yields wherever other requests may be served and
returns either.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import msgspec

from kvcore.config import ServerConfig
from kvcore.copy.block_arrays import BlockArray, TokenRange
from kvcore.copy.memory_transports import TransportTable
from kvcore.engine.counters import EngineCounters
from kvcore.engine.explain import MissHistory
from kvcore.engine.keyspace import Keyspace
from kvcore.engine.leases import LeaseTable
from kvcore.engine.lookups import Lookups, PendingLookup
from kvcore.engine.registrations import Instance, Registry, derive_layouts, is_private
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.sessions import Session, SessionTable
from kvcore.engine.tiering import OpenTiering, no_tiering
from kvcore.engine.transfers import AfterScatter, Transfers
from kvcore.errors import BadRequest, HandleError
from kvcore.keys import ChunkHash, SessionKey
from kvcore.protocol import (
    ArenaHandle,
    Clear,
    Cleared,
    Done,
    EndSession,
    FreeLookupLocks,
    Lookup,
    LookupReply,
    PosixShm,
    RegisterKVCache,
    RegisterReply,
    Request,
    Retrieve,
    RetrieveReply,
    Store,
    StoreReply,
    UnregisterKVCache,
    Why,
    WhyReply,
)
from kvcore.status import InstanceStatus
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import Chunk, RemovalCallback
from kvcore.storage.l1 import L1
from kvcore.storage.quotas import make_order
from kvcore.storage.recovery import RecoveredArena
from kvcore.storage.required_parts import RequiredParts

__all__ = ["Engine"]

Handler = Callable[[Any, RequestContext], Any]
"""Takes a request and its context; returns as the module describes."""

CLEAR_CHUNKS = 32
"""Chunks dropped in one step of a clear, about 80 us."""


@dataclass(frozen=True, slots=True)
class EngineHooks:
    """Functions that the engine calls on the loop thread, in order of registration."""

    lookup: list[Callable[[Lookup, Sequence[ChunkHash]], None]] = field(
        default_factory=list
    )
    """With each lookup and its chunks, before they are looked for."""
    session_end: list[Callable[[SessionKey], None]] = field(default_factory=list)
    """At END_SESSION, or when a session expires."""
    client_end: list[Callable[[Hashable], None]] = field(default_factory=list)
    """When a client's process ends, it says goodbye, or it falls silent."""


class Engine:
    """Instances, sessions, leases and transfers over one L1."""

    def __init__(
        self,
        config: ServerConfig,
        arena: Arena,
        clock: Callable[[], float] = monotonic,
        open_tiering: OpenTiering = no_tiering,
        recovered: RecoveredArena | None = None,
        transports: TransportTable | None = None,
    ) -> None:
        self.chunk_size = config.chunk_size
        self.arena = arena
        self._is_kept = recovered is not None
        journal = recovered.journal if recovered else None
        policy = make_order(config.l1.eviction, config.l1.quotas)
        self.l1 = L1(arena, policy, journal, watermark=config.l1.watermark)
        self.tiering = open_tiering(self.l1, arena)
        self.counters = EngineCounters()
        self.registry = Registry(config.chunk_size)
        if recovered is not None:
            self.l1.restore(recovered.parts)
            for part in recovered.parts:
                self.registry.restore(part.name, part.part)
        self.history = MissHistory(clock)
        self.l1.on_removed(self.history.note_removal)
        self.leases = LeaseTable(
            self.l1,
            config.sessions.lease_s,
            clock,
            self.history.note_expired,
            config.l1.engine_share,
        )
        self.hooks = EngineHooks()
        self.sessions = SessionTable(
            config.chunk_size,
            config.wire.slice_chunks,
            config.sessions.idle_s,
            config.sessions.max_sessions,
            self._on_session_end,
            clock,
        )
        self.lookups = Lookups(
            self.l1,
            self.leases,
            self.sessions,
            self.tiering,
            config.chunk_size,
            config.prefetch.deadline_s,
        )
        self.hooks.session_end.append(self.lookups.end)
        self.hooks.client_end.append(self.lookups.cancel_client)
        self.transfers = Transfers(
            self.l1,
            arena,
            self.registry,
            self.sessions,
            self.leases,
            self.counters,
            on_stored=self.tiering.stored if self.tiering.has_tiers else None,
            checksums=config.l1.verify or recovered is not None,
            verify=config.l1.verify,
        )
        # Closing an instance waits for its running copies; the loop must not.
        self._closer = ThreadPoolExecutor(1, "closer")
        # Starts its thread: later the process may have no more threads to start, and
        # the loop must still end a client.
        self._closer.submit(int)
        self._transports = transports or TransportTable()

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handler of each request type that the engine serves."""
        return {
            RegisterKVCache: self.register_kv_cache,
            UnregisterKVCache: self.unregister_kv_cache,
            Store: self.store,
            Retrieve: self.retrieve,
            Lookup: self.lookup,
            FreeLookupLocks: self.free_lookup_locks,
            EndSession: self.end_session,
            Clear: self.clear,
            Why: self.why,
        }

    # -- registration -------------------------------------------------------------

    def register_kv_cache(
        self, request: RegisterKVCache, context: RequestContext
    ) -> DeferredReply | RegisterReply:
        """Register a worker's memory, replacing its earlier registration.

        It is registered before its memory is attached: requests sent directly after
        this one find it.

        Raises:
            BadRequest, LayoutError, LayoutConflict, InstanceExists, HandleError.
        """
        layouts = derive_layouts(request, self.chunk_size)
        parts = tuple(layout.part for layout in layouts)
        space = self.registry.space(request.model, request.world_size)
        self.registry.check(context, request.instance_id, space, request.rank, parts)
        if is_private(request):
            self._check_private(request.instance_id, context)
        for handle in request.handles:
            if isinstance(handle, PosixShm) and handle.name == self.arena.name:
                raise HandleError(f"{handle.name!r} is the server's own memory")
        memory = self._transports.attach(request.handles, layouts)
        instance = Instance(context, request, space, layouts, memory)
        earlier = self.registry.find(context.client, request.instance_id)
        if earlier is not None:
            self._remove(earlier)
        self.registry.add(instance)

        def finish() -> RegisterReply:
            if memory.exception() is not None and self.registry.has(instance):
                self._remove(instance)
            memory.result()
            names = tuple(part.fingerprint for part in parts)
            arena = self._arena_handle() if instance.is_private else None
            return RegisterReply(names, instance.chunk_bytes, arena)

        return finish() if memory.done() else DeferredReply(memory, finish)

    def _check_private(self, instance_id: str, context: RequestContext) -> None:
        """Refuse a worker that could write to pages after the server reuses them."""
        if not context.is_watched:
            raise BadRequest(
                f"instance {instance_id!r}: a worker that copies itself must "
                "live in the server's pid namespace, which watches its process"
            )
        if self._is_kept:
            raise BadRequest(
                f"instance {instance_id!r}: with l1.keep the server copies; a "
                "worker could outlive this run and write into what the next one keeps"
            )

    def _arena_handle(self) -> ArenaHandle:
        memory = PosixShm(self.arena.name, 0, self.arena.total_bytes)
        return ArenaHandle(memory, self.transfers.checksums)

    def unregister_kv_cache(
        self, request: UnregisterKVCache, context: RequestContext
    ) -> DeferredReply:
        """Unregister an instance; the reply comes when its memory is unmapped."""
        instance = self.registry.get(context.client, request.instance_id)
        return DeferredReply(self._remove(instance), Done)

    def _remove(self, instance: Instance) -> Future[None]:
        self.registry.remove(instance)
        return self._closer.submit(instance.close)

    def end_client(self, client: Hashable) -> None:
        """End the instances, leases and pending reads of a client that ended."""
        self.counters.clients_gone += 1
        for instance in self.registry.of_client(client):
            instance.abandon()
            self._remove(instance)
            self.leases.drop_reader(instance.scope, instance.engine_id, instance.rank)
        for hook in self.hooks.client_end:
            hook(client)
        self.leases.end_client(client)
        for key in self.sessions.remove_client(client):
            self._end_session(key)

    def run_after_close(self, call: Callable[[], object]) -> None:
        """Run a call on the closer thread, after the closes that are queued now."""
        self._closer.submit(call)

    # -- for optional parts; see `ExtensionInterface` -----------------------------

    @property
    def has_tiers(self) -> bool:
        """Whether chunks that L1 lacks may be in a tier."""
        return self.tiering.has_tiers

    def on_chunk_removed(self, callback: RemovalCallback) -> None:
        """Call a function for each chunk that is removed from L1, on any thread."""
        self.l1.on_removed(callback)

    def on_session_end(self, callback: Callable[[SessionKey], None]) -> None:
        """Call a function with the key of each session that ends."""
        self.hooks.session_end.append(callback)

    def instance(self, instance_id: str, context: RequestContext) -> Instance:
        """Return a client's instance whose cache the server copies."""
        return self.transfers.instance(instance_id, context)

    def peek(self, hashes: Sequence[ChunkHash]) -> list[Chunk | None]:
        """Return the chunks of L1, not held: they may be evicted at any time."""
        return self.l1.peek(hashes)

    # -- copies -------------------------------------------------------------------

    def store(
        self, request: Store, context: RequestContext
    ) -> Generator[None, None, DeferredReply | StoreReply]:
        """Copy the whole chunks of a token range from an instance's blocks to L1."""
        instance = self.instance(request.instance_id, context)
        plan = yield from self.transfers.plan_store(request, instance)
        if plan is None:
            return StoreReply(0, 0, 0)
        future = self.store_chunks(
            instance,
            plan.hashes,
            plan.blocks,
            context,
            plan.session.owner,
            plan.prefix,
            request.event,
        ).future

        def make_reply() -> StoreReply:
            return self.transfers.count_store(self.transfers.result(future))

        return DeferredReply(future, make_reply, plan.session_use)

    def retrieve(
        self, request: Retrieve, context: RequestContext
    ) -> Generator[None, None, DeferredReply | RetrieveReply]:
        """Copy a token range's chunks into an instance's blocks, all or none."""
        instance = self.instance(request.instance_id, context)
        plan = yield from self.transfers.plan_retrieve(request, instance)
        if plan is None:
            return RetrieveReply(0)
        future = self.retrieve_chunks(
            instance,
            plan.hashes,
            plan.blocks,
            plan.tokens,
            context,
            event=request.event,
        ).future

        def make_reply() -> RetrieveReply:
            return self.transfers.count_retrieve(plan, self.transfers.result(future))

        return DeferredReply(future, make_reply, plan.session_use)

    def store_chunks(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[BlockArray],
        context: RequestContext,
        owner: SessionKey,
        prefix: Sequence[ChunkHash] = (),
        event: bytes = b"",
    ) -> DeferredReply:
        """Copy whole chunks to L1 on the store lane; see `Transfers.store`.

        Raises:
            UnknownInstance: the instance was unregistered meanwhile.
        """
        self.registry.check_registered(instance)
        future = instance.store_lane.submit(
            self.transfers.store,
            instance,
            hashes,
            blocks,
            context.deadline_ns,
            owner,
            prefix,
            event,
        )

        def make_reply() -> StoreReply:
            return self.transfers.count_parts(self.transfers.result(future))

        return DeferredReply(future, make_reply)

    def retrieve_chunks(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[BlockArray],
        tokens: TokenRange,
        context: RequestContext,
        after_scatter: AfterScatter | None = None,
        event: bytes = b"",
    ) -> DeferredReply:
        """Copy chunks to blocks on the retrieve lane; see `Transfers.retrieve`.

        Raises:
            UnknownInstance: the instance was unregistered meanwhile.
        """
        self.registry.check_registered(instance)
        future = instance.retrieve_lane.submit(
            self.transfers.retrieve,
            instance,
            hashes,
            blocks,
            tokens,
            context.deadline_ns,
            after_scatter,
            event,
        )

        def make_reply() -> RetrieveReply:
            self.counters.bytes_retrieved += self.transfers.result(future)
            num_tokens = tokens.end - tokens.first_token
            return RetrieveReply(num_tokens, instance.memory.result().event)

        return DeferredReply(future, make_reply)

    # -- lookups and sessions -----------------------------------------------------

    def lookup(
        self, request: Lookup, context: RequestContext
    ) -> Generator[None, None, msgspec.Struct | DeferredReply]:
        """Count and lease the leading chunks that all ranks have stored."""
        session, needs = self.open_lookup(
            request.session, request.model, request.world_size, context
        )
        num_chunks = request.end // self.chunk_size
        with self.sessions.use(session):
            yield from self.sessions.extend(
                session,
                request.tokens,
                request.token_offset,
                request.extras,
                num_chunks * self.chunk_size,
            )
            hashes = session.chain.hashes[:num_chunks]
            for hook in self.hooks.lookup:
                hook(request, hashes)
            lookup = PendingLookup(session, session.key, session.owner, needs, context)
            lookup.runs = [hashes]
            return (yield from self.lookups.run(lookup, self._lookup_reply))

    def _lookup_reply(self, lookup: PendingLookup) -> LookupReply:
        """Count a lookup of a prompt, and record its first miss."""
        [hashes], hit = lookup.runs, sum(map(len, lookup.held))
        self.counters.lookups += 1
        self.counters.lookup_chunks += len(hashes)
        self.counters.lookup_chunks_hit += hit
        outcome = "".join(task.outcome for task in lookup.tasks)
        if hit < len(hashes) and not lookup.cancelled:
            [first] = self.l1.peek([hashes[hit]])
            self.history.note_miss(
                lookup.session.key, hashes, hit, first, lookup.needs, outcome
            )
        loaded = max(0, hit - lookup.num_in_l1) if lookup.tasks else 0
        return LookupReply(hit, hit * self.chunk_size, loaded)

    def open_lookup(
        self, key: SessionKey, model: str, world_size: int, context: RequestContext
    ) -> tuple[Session, RequiredParts]:
        """Return a session, and the parts that a lookup of its engine requires."""
        space, needs = self.registry.lookup(model, world_size, context.scope)
        return self.open_session(key, space, context), needs

    def open_session(
        self, key: SessionKey, space: Keyspace, context: RequestContext
    ) -> Session:
        """Return a session of a keyspace, a new one if the key is unknown."""
        return self.sessions.open(key, space, context.client)

    def free_lookup_locks(
        self, request: FreeLookupLocks, context: RequestContext
    ) -> Done:
        """End a session's lease on a token range, for all readers."""
        first = request.start // self.chunk_size
        self.leases.free(request.session, first, -(-request.end // self.chunk_size))
        return Done()

    def end_session(self, request: EndSession, context: RequestContext) -> Done:
        """End a session's leases now, and the session after its running work."""
        self._end_session(request.session)
        return Done()

    def _end_session(self, key: SessionKey) -> None:
        for hook in self.hooks.session_end:
            hook(key)
        session = self.sessions.find(key)
        if session is not None:
            self.sessions.end(session)

    def _on_session_end(self, session: Session) -> None:
        self.counters.sessions_ended += 1
        if not session.ended:
            for hook in self.hooks.session_end:
                hook(session.key)
        # Once per request, tail to head: leaves are evicted first.
        self.l1.touch(session.chain.hashes)

    def clear(
        self, request: Clear, context: RequestContext
    ) -> Generator[None, None, Cleared]:
        """Drop every chunk that is neither held nor being written."""
        hashes = self.l1.hashes()
        num_dropped = 0
        for first in range(0, len(hashes), CLEAR_CHUNKS):
            num_dropped += self.l1.drop(hashes[first : first + CLEAR_CHUNKS])
            yield
        return Cleared(num_dropped, len(hashes) - num_dropped)

    def why(self, request: Why, context: RequestContext) -> WhyReply:
        """Explain a missed lookup or a chunk."""
        return WhyReply(self.history.explain(request.about, self.l1))

    # -- upkeep -------------------------------------------------------------------

    def expire(self) -> float | None:
        """End expired leases and sessions; return the next deadline."""
        self.leases.expire()
        self.sessions.expire()
        deadlines = (self.leases.next_deadline(), self.sessions.next_deadline())
        return min((d for d in deadlines if d is not None), default=None)

    def instances(self) -> tuple[InstanceStatus, ...]:
        """Describe the registered instances."""
        return tuple(
            InstanceStatus(
                instance_id=instance.instance_id,
                engine_id=instance.engine_id,
                model=instance.space.model,
                world_size=instance.space.world_size,
                rank=instance.rank,
                pid=instance.pid,
                groups=tuple(map(str, instance.part_layouts)),
                group_fingerprints=tuple(
                    part.fingerprint for part in instance.part_layouts
                ),
                group_descriptions=instance.request.groups,
                registered_bytes=instance.registered_bytes,
                chunk_bytes=instance.chunk_bytes,
                copied_by="worker" if instance.is_private else "server",
            )
            for instance in self.registry.all()
        )

    def close(self) -> None:
        """Cancel queued copies, wait for running ones, unmap every instance."""
        for instance in self.registry.all():
            self._remove(instance)
        self._closer.shutdown(wait=True)
        self.tiering.close()
        self.l1.close()
