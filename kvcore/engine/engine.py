"""The requests that move and find KV. The loop thread calls it; copies run on lanes.

A handler returns its reply, or `DeferredReply` work whose reply comes later, or is a
generator that yields wherever others may be served and returns either.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from kvcore.config import ServerConfig
from kvcore.copy.host_transport import TransportTable
from kvcore.engine.counters import EngineCounters
from kvcore.engine.instance import Instance, derive_layouts, is_private
from kvcore.engine.leases import LeaseTable
from kvcore.engine.lookups import Lookups
from kvcore.engine.miss_history import HASH_DIGITS, MIN_KEY_DIGITS, MissHistory
from kvcore.engine.registry import Registry
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.sessions import Session, SessionTable
from kvcore.engine.tiering import OpenTiering, no_tiering
from kvcore.engine.transfers import Transfers
from kvcore.errors import (
    BadRequest,
)
from kvcore.keys import ChunkHash, SessionKey
from kvcore.protocol import (
    ArenaHandle,
    Clear,
    Cleared,
    Done,
    EndSession,
    Finding,
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
from kvcore.storage.l1 import L1, Chunk
from kvcore.storage.quotas import make_order
from kvcore.storage.recovery import RecoveredArena
from kvcore.storage.required_parts import RequiredParts

__all__ = ["Engine"]

T = TypeVar("T")

Handler = Callable[[Any, RequestContext], Any]
"""Takes a request and its context; returns as the module says."""

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
    """Instances, sessions and leases over one L1."""

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
                space = self.registry.space(part.name.model, part.name.world_size)
                space.restore(part.name, part.part)
        self.history = MissHistory(clock)
        self.l1.on_removed(self.history.note_removal)
        self.leases = LeaseTable(
            self.l1, config.sessions.lease_s, clock, self.history.note_expired
        )
        self.hooks = EngineHooks()
        self.sessions = SessionTable(
            config.chunk_size,
            config.wire.slice_chunks,
            config.sessions.idle_s,
            config.sessions.max_sessions,
            self._session_ended,
            clock,
        )
        self.lookups = Lookups(
            self.l1,
            self.leases,
            self.counters,
            config.chunk_size,
            self.tiering,
            self.history,
            config.prefetch.deadline_s,
        )
        self.hooks.session_end.append(self.leases.end)
        self.hooks.session_end.append(self.lookups.cancel)
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
        # Closing an instance waits for its running copies, which nobody else should.
        self._closer = ThreadPoolExecutor(1, "closer")
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
        self, request: RegisterKVCache, caller: RequestContext
    ) -> DeferredReply | RegisterReply:
        """Attach a worker's memory and enter it, in place of its earlier self.

        It is entered at once: requests that were sent right behind find it.
        """
        layouts = derive_layouts(request, self.chunk_size)
        parts = tuple(layout.part for layout in layouts)
        space = self.registry.space(request.model, request.world_size)
        self.registry.check(
            caller.client, request.instance_id, space, request.rank, parts
        )
        if is_private(request):
            self._check_trusted(request.instance_id, caller)
        memory = self._transports.attach(request.handles, layouts)
        instance = Instance(caller.client, caller.pid, request, space, layouts, memory)
        earlier = self.registry.instances.get(request.instance_id)
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

    def _check_trusted(self, instance_id: str, caller: RequestContext) -> None:
        """Let nobody write to the arena whose end might be missed, or come too late."""
        if not caller.is_watched:
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
        self, request: UnregisterKVCache, caller: RequestContext
    ) -> DeferredReply:
        """Forget an instance; the reply comes when its memory is unmapped."""
        instance = self.registry.get(caller.client, request.instance_id)
        return DeferredReply(self._remove(instance), Done)

    def _remove(self, instance: Instance) -> Future[None]:
        self.registry.remove(instance)
        return self._closer.submit(instance.close)

    def client_gone(self, client: Hashable) -> None:
        """Undo what a dead client leaves: instances, leases, its reads to come."""
        self.counters.clients_gone += 1
        for instance in self.registry.of_client(client):
            instance.abandon()
            self._remove(instance)
            self.leases.drop_reader(instance.engine_id, instance.rank)
        for hook in self.hooks.client_end:
            hook(client)
        self.leases.end_client(client)

    def do_behind(self, call: Callable[[], object]) -> None:
        """Have the closer do something once all is closed that now is to be."""
        self._closer.submit(call)

    # -- copies -------------------------------------------------------------------

    def store(
        self, request: Store, context: RequestContext
    ) -> Generator[None, None, DeferredReply | StoreReply]:
        """Copy the whole chunks of a token range from an instance's blocks to L1."""
        instance = self.transfers.instance(request.instance_id, context)
        plan = yield from self.transfers.plan_store(request, instance)
        if plan is None:
            return StoreReply(0, 0, 0)
        future = instance.store_lane.submit(
            self.transfers.store,
            instance,
            plan.hashes,
            plan.blocks,
            context.deadline_ns,
            plan.session.owner,
            plan.prefix,
            request.event,
        )

        def make_reply() -> StoreReply:
            return self.transfers.count_store(self.transfers.result(future))

        return DeferredReply(future, make_reply, plan.session_use)

    def retrieve(
        self, request: Retrieve, context: RequestContext
    ) -> Generator[None, None, DeferredReply | RetrieveReply]:
        """Copy a token range's chunks into an instance's blocks, all or none."""
        instance = self.transfers.instance(request.instance_id, context)
        plan = yield from self.transfers.plan_retrieve(request, instance)
        if plan is None:
            return RetrieveReply(0)
        future = instance.retrieve_lane.submit(
            self.transfers.retrieve,
            instance,
            plan.hashes,
            plan.blocks,
            plan.tokens,
            context.deadline_ns,
            event=request.event,
        )

        def make_reply() -> RetrieveReply:
            return self.transfers.count_retrieve(plan, self.transfers.result(future))

        return DeferredReply(future, make_reply, plan.session_use)

    # -- lookups and sessions -----------------------------------------------------

    def lookup(
        self, request: Lookup, caller: RequestContext
    ) -> Generator[None, None, LookupReply | DeferredReply]:
        """Count and lease the leading chunks that are there for all ranks."""
        space, needs = self.registry.lookup(request.model, request.world_size)
        num_chunks = request.end // self.chunk_size
        session = self.sessions.open(request.session, space)
        with ExitStack() as session_use:
            session_use.enter_context(self.sessions.use(session))
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
            find = self.lookups.find(session, needs, hashes, caller, wait=request.wait)
            reply = yield from find
            if isinstance(reply, DeferredReply):
                reply.resources.push(session_use.pop_all())
            return reply

    def acquire(
        self, hashes: list[ChunkHash], needs: RequiredParts
    ) -> Generator[None, None, list[Chunk]]:
        """Hold the leading chunks that make a hit, in steps."""
        chunks = yield from self.lookups.acquire(hashes, needs)
        hit = self.lookups.count(chunks, needs)
        self.l1.release(chunks[hit:])
        return chunks[:hit]

    def free_lookup_locks(
        self, request: FreeLookupLocks, caller: RequestContext
    ) -> Done:
        """End a session's lease on a range, for all readers."""
        first = request.start // self.chunk_size
        self.leases.free(request.session, first, -(-request.end // self.chunk_size))
        return Done()

    def end_session(self, request: EndSession, caller: RequestContext) -> Done:
        """End leases at once, the session when its running work has ended."""
        for hook in self.hooks.session_end:
            hook(request.session)
        session = self.sessions.find(request.session)
        if session is not None:
            self.sessions.end(session)
        return Done()

    def _session_ended(self, session: Session) -> None:
        self.counters.sessions_ended += 1
        if not session.ended:
            for hook in self.hooks.session_end:
                hook(session.key)
        # Once a request, tail to head: its leaves are the first to be evicted.
        self.l1.touch(session.chain.hashes)

    def clear(
        self, request: Clear, caller: RequestContext
    ) -> Generator[None, None, Cleared]:
        """Drop every chunk that nobody reads or writes."""
        hashes = self.l1.hashes()
        num_dropped = 0
        for first in range(0, len(hashes), CLEAR_CHUNKS):
            num_dropped += self.l1.drop(hashes[first : first + CLEAR_CHUNKS])
            yield
        return Cleared(num_dropped, len(hashes) - num_dropped)

    def why(self, request: Why, caller: RequestContext) -> WhyReply:
        """Tell what is known about a missed lookup or a chunk."""
        about = request.about
        findings = [*self.history.why_request(about)]
        if len(about) >= MIN_KEY_DIGITS and not set(about) - set("0123456789abcdef"):
            findings += self.history.why_chunk(about)
            if len(about) == HASH_DIGITS:
                findings += _presence(self.l1.peek([ChunkHash(bytes.fromhex(about))]))
        if not findings:
            findings = [
                Finding(
                    "unknown",
                    "no missed lookup and no chunk that left is known by that name",
                )
            ]
        return WhyReply(tuple(findings))

    # -- upkeep -------------------------------------------------------------------

    def expire(self) -> float | None:
        """End what is past its time; return when to look again."""
        self.leases.expire()
        self.sessions.expire()
        deadlines = (self.leases.next_deadline(), self.sessions.next_deadline())
        return min((d for d in deadlines if d is not None), default=None)

    def instances(self) -> tuple[InstanceStatus, ...]:
        """Describe what is registered."""
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
            for instance in self.registry.instances.values()
        )

    def close(self) -> None:
        """Drop queued copies, wait for running ones, unmap every instance."""
        for instance in list(self.registry.instances.values()):
            self._remove(instance)
        self._closer.shutdown(wait=True)
        self.tiering.close()
        self.l1.close()


def _presence(chunks: Sequence[Chunk | None]) -> list[Finding]:
    """Tell which parts of a known chunk are there."""
    return [
        Finding(
            "present" if chunk.ready >> number & 1 else "being_written",
            f"rank {part.name.rank}'s part of group {part.name.group}, layout "
            f"{part.name.layout}, {part.num_bytes} bytes, {chunk.holds} holds",
        )
        for chunk in chunks
        if chunk is not None
        for number, part in [*chunk.parts.items()]
        if part.name is not None
    ]
