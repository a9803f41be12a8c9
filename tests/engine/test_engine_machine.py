"""A whole server but for its socket, in any order of events, beside a simple model.

Engines of several models and world sizes share a small L1. Requests go through the
loop in slices, copies stop before and after their bytes move, memory is attached late,
workers die anywhere in between. The model knows which parts were committed and left,
who was leased what, and every byte of every worker's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from math import prod
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcore.config import (
    L1Config,
    PrefetchConfig,
    ServerConfig,
    SessionConfig,
    WireConfig,
)
from kvcore.copy.block_arrays import TokenRange
from kvcore.copy.memory_transports import TransportTable
from kvcore.engine import lookups
from kvcore.engine.engine import Engine
from kvcore.engine.registrations import Instance
from kvcore.engine.request_context import DeferredReply
from kvcore.engine.tiering import no_tiering
from kvcore.engine.transfers import HeldChunks
from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    DeadlineExceeded,
    HandleError,
    InstanceExists,
    KVError,
    LayoutConflict,
    TokensNeeded,
    UnknownInstance,
    UnknownModel,
    UnknownTicket,
)
from kvcore.extents import PartLocation, buffers_of, checksum_of
from kvcore.keys import (
    ChunkHash,
    SessionKey,
)
from kvcore.option_structs import ByteSize
from kvcore.protocol import (
    NULL_BLOCK,
    Abort,
    Clear,
    Commit,
    EndSession,
    FreeLookupLocks,
    Hold,
    HoldReply,
    Lookup,
    PosixShm,
    Private,
    RegisterKVCache,
    Release,
    Reserve,
    ReserveReply,
    Retrieve,
    Store,
    UnregisterKVCache,
)
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import DropReason, Removal
from kvcore.storage.l1 import L1, Reservation
from kvcore.tiers import timer_thread as coordinator
from kvcore.tiers.tier_manager import TierManager
from kvcore.tiers.timer_thread import TimerThread
from kvcore.worker import ticket_service
from kvcore.worker.ticket_service import TicketService
from tests.engine.engine_model import (
    CHUNK,
    ENGINES,
    FAR_NS,
    IDENTS,
    LEASE_S,
    MAX_CHUNKS,
    MAX_TICKETS,
    NUM_BLOCKS,
    PAGE,
    PROMPTS,
    Deployment,
    Lease,
    ModelRequest,
    PartOf,
    Ticket,
    Worker,
    content,
    extras_of,
    hashes_of,
    tokens_of,
)
from tests.engine.manual_threads import (
    Answers,
    ManualCopier,
    ManualLane,
    ManualLoop,
    ManualTransport,
    current,
)
from tests.tiers.manual_tier import ManualTier


class EngineMachine(RuleBasedStateMachine):
    """Nothing moves but by a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.workers: dict[str, Worker] = {}
        self.all_workers: list[Worker] = []
        self.flying: dict[int, ModelRequest] = {}
        self.tickets: dict[int, Ticket] = {}
        self.ended_tickets: list[int] = []
        self.leases: dict[SessionKey, Lease] = {}
        self.bound: dict[SessionKey, int] = {}
        self.unsettled: set[SessionKey] = set()
        """Sessions whose tokens the server may not have of this prompt."""
        self.present: dict[ChunkHash, set[int]] = {}
        self.generation: dict[ChunkHash, int] = {}
        self.part_ids: dict[tuple[str, int, PartOf], int] = {}
        self.reads: dict[int, list[tuple[ChunkHash, int]]] = {}
        self.committed: dict[Any, int] = {}
        """Parts by the future of the copy that wrote them."""
        self.has_condemned = False
        """A lookup that waits may hold a chunk that is no longer found."""
        self.wrong: list[str] = []
        self.names = count()

    @initialize(
        engines=st.lists(st.sampled_from(ENGINES), min_size=1, max_size=3, unique=True),
        num_pages=st.integers(6, 20),
        verify=st.booleans(),
        slice_chunks=st.sampled_from([1, 1, 8]),
        watermark=st.sampled_from([1.0, 1.0, 0.6]),
        num_tiers=st.sampled_from([0, 0, 1, 2]),
    )
    def build(
        self,
        engines: list[Deployment],
        num_pages: int,
        verify: bool,
        slice_chunks: int,
        watermark: float,
        num_tiers: int,
    ) -> None:
        """Start a server, and some engines."""
        self.engines = engines
        self.tiers = [ManualTier(f"t{number}") for number in range(num_tiers)]
        self.coordinator = TimerThread("played", lambda: self.now_ns() / 1e9)
        self.patches = [
            mock.patch.object(ticket_service, "LOOP_CHUNKS", 1),
            mock.patch.object(lookups, "monotonic_ns", self.now_ns),
            mock.patch.object(coordinator.log, "exception", self.wrong.append),
        ]
        for patch in self.patches:
            patch.start()
        self.config = config = ServerConfig(
            chunk_size=CHUNK,
            l1=L1Config(verify=verify, watermark=watermark, engine_share=1.0),
            wire=WireConfig(slice_chunks=slice_chunks),
            sessions=SessionConfig(lease_s=LEASE_S, idle_s=30.0, max_sessions=4),
            prefetch=PrefetchConfig(
                deadline_s=4.0, max_jobs=2, max_bytes=ByteSize(5 * PAGE)
            ),
        )
        self.arena = Arena(num_pages * PAGE, PAGE)
        self.transport = ManualTransport()
        self.engine = Engine(
            config,
            self.arena,
            clock=lambda: self.now,
            open_tiering=self.open_tiering if num_tiers else no_tiering,
            transports=TransportTable({PosixShm: self.transport}),
        )
        self.closer = ManualLane()
        self.engine._closer.shutdown()
        self.engine._closer = self.closer  # type: ignore[assignment]
        self.copies = TicketService(self.engine, MAX_TICKETS)
        self.watch_copies()
        answers = Answers(self.on_running, self.on_answer)
        self.loop = ManualLoop(self.engine, self.copies, answers, lambda: self.now)
        self.error: type[KVError] | None = None
        for engine in engines:
            self.loop.greet(engine.scheduler)
            for rank in range(engine.world_size):
                self.loop.greet(engine.worker(rank))
                self.register_worker(engine, rank, 0, 2, "", "at once")

    def open_tiering(self, l1: L1, arena: Arena) -> TierManager:
        """Put the model's tiers behind L1, with a thread that tests drive."""
        return TierManager(
            l1,
            arena,
            self.tiers,
            self.config.prefetch,
            self.config.write_back,
            self.coordinator,
        )

    def watch_copies(self) -> None:
        """Have the model told of what is committed, held, let go and gone."""
        copier, l1 = self.engine.transfers, self.engine.l1
        copier._clock_ns = self.now_ns
        copier._copier = ManualCopier(
            self.arena.array, CHUNK, checksums=copier.checksums
        )
        commit, hold, release = l1.commit, copier.hold, copier.release

        def commit_watched(
            reservations: Sequence[Reservation], *, hold: bool = False
        ) -> int:
            num = commit(reservations, hold=hold)
            kept = [r for r in reservations if not r.chunk.dropped]
            if num != len(kept):
                self.wrong.append(f"{num} of {len(kept)} parts were committed")
            for one in kept:
                self.present.setdefault(one.chunk.hash, set()).add(one.part)
            strand = current()
            if strand is not None:
                self.committed[strand.future] = num
                self.check_alive(strand.future)
            return num

        def hold_watched(*args: Any) -> HeldChunks:
            expected = self.expect_hold(*args)
            try:
                read = hold(*args)
            except ChunksMissing:
                assert expected is None, "a retrieve missed what is there"
                raise
            assert expected is not None, "a retrieve found what is not there"
            self.reads[id(read)] = expected
            return read

        def release_watched(read: HeldChunks) -> None:
            del self.reads[id(read)]
            release(read)

        l1.commit = commit_watched  # type: ignore[method-assign]
        copier.hold = hold_watched  # type: ignore[method-assign]
        copier.release = release_watched  # type: ignore[method-assign]
        l1.on_removed(self.on_removed)

    def check_alive(self, future: object) -> None:
        """What was copied from a worker that is dead by now may be anything."""
        for asked in self.flying.values():
            is_it = asked.running is not None and asked.running.future is future
            if is_it and asked.worker is not None and asked.worker.is_dead:
                self.wrong.append("a dead worker's store was committed")

    def expect_hold(
        self, instance: Instance, hashes: Any, blocks: Any, tokens: TokenRange, _: int
    ) -> list[tuple[ChunkHash, int]] | None:
        """Say which chunks are held, none if one lacks a part that is read."""
        held = []
        for index, key in enumerate(hashes):
            wanted = set()
            for group, rows in zip(instance.groups, blocks, strict=True):
                skipped = (index + 1) * CHUNK <= tokens.first_token - tokens.start
                if not skipped and (rows[index] != NULL_BLOCK).any():
                    wanted.add(group.part)
            if not wanted <= self.present.get(key, set()):
                return None
            if wanted:
                held.append((key, self.generation.get(key, 0)))
        return held

    def now_ns(self) -> int:
        """Return the played clock's time as deadlines have it."""
        return FAR_NS + int(self.now * 1e9)

    # -- what is told -----------------------------------------------------------------

    def on_removed(self, removal: Removal) -> None:
        """Note a chunk that leaves L1; no session may own it."""
        chunk, reason = removal.chunk, removal.reason
        self.sync_leases()
        held = self.held()
        self.has_condemned |= reason is DropReason.CORRUPT
        place = (chunk.hash, self.generation.get(chunk.hash, 0))
        if reason is not DropReason.CORRUPT and place in held:
            self.wrong.append(f"{reason} though {held[place]}")
        self.present.pop(chunk.hash, None)
        self.generation[chunk.hash] = place[1] + 1

    def held(self) -> dict[tuple[ChunkHash, int], str]:
        """Return the chunks that somebody may read, and why."""
        held = {}
        for key, lease in self.leases.items():
            for place, waiting in zip(lease.chunks, lease.waiting, strict=True):
                if waiting:
                    held[place] = f"leased to {key}"
        for places in self.reads.values():
            held |= dict.fromkeys(places, "being read")
        return held

    def sync_leases(self) -> None:
        """End the leases of sessions that the server has given up: idle, too many."""
        find = self.engine.sessions.find
        for key, lease in [*self.leases.items()]:
            if find(key) is not lease.session:
                del self.leases[key]

    def on_running(self, number: int, running: DeferredReply) -> None:
        """Note that a request's work goes on elsewhere."""
        asked = self.flying[number]
        asked.running = running
        if asked.key is not None and asked.worker is not None:
            self.sync_leases()
            self.unsettled.discard(asked.key)
            asked.lease = None if asked.is_ended else self.leases.get(asked.key)
        if asked.kind == "lookup":
            self.replace_lookups(asked)

    def replace_lookups(self, by: ModelRequest) -> None:
        """Of a session's lookups only the last one may wait for a tier."""
        for asked in self.flying.values():
            waits = asked.kind == "lookup" and asked.running is not None
            if waits and asked.key == by.key and asked is not by:
                asked.is_replaced |= not by.is_ended

    def on_answer(self, number: int, outcome: Any) -> None:
        """Hold an answer against what it may be."""
        asked = self.flying.pop(number)
        self.sync_leases()
        getattr(self, f"answered_{asked.kind}")(asked, outcome)
        if asked.worker is not None and not isinstance(
            outcome, ReserveReply | HoldReply
        ):
            self.give_back(asked)

    def give_back(self, asked: ModelRequest) -> None:
        """A worker may use its blocks for something else."""
        assert asked.worker is not None
        for free, blocks in zip(asked.worker.free, asked.blocks, strict=True):
            free += [block for block in blocks if block != NULL_BLOCK]
        asked.blocks = []

    def check_error(self, asked: ModelRequest, outcome: object) -> bool:
        """Say whether it failed; it must be for a reason."""
        if asked.error is not None:
            assert isinstance(outcome, asked.error), outcome
            return True
        if not isinstance(outcome, KVError):
            return False
        worker = asked.worker
        reasons = {
            TokensNeeded: not asked.has_tokens,
            UnknownInstance: worker is not None and worker.is_gone,
            HandleError: worker is not None and worker.is_gone,
            DeadlineExceeded: 0 < asked.deadline < self.now,
        }
        assert reasons.get(type(outcome)), repr(outcome)
        return True

    # -- registering ------------------------------------------------------------------

    def register_worker(
        self,
        engine: Deployment,
        rank: int,
        version: int,
        block_size: int,
        suffix: str,
        how: str,
        thief: bytes = b"",
    ) -> None:
        """Register a cache, the same again or another."""
        name = f"{engine.name}{rank}{suffix}"
        worker = Worker(name, engine, rank, version, block_size)
        self.make_cache(worker)
        number = next(self.names)
        handles: list[PosixShm | Private] = []
        for at, array in enumerate(worker.arrays):
            if worker.is_private:
                handles.append(Private(array.nbytes))
            else:
                handle = f"memory-{number}-{at}"
                self.transport.arrays[handle] = array.reshape(-1)
                handles.append(PosixShm(handle, 0, array.nbytes))
        groups = tuple(
            shape.group(at, block_size, version)
            for at, shape in enumerate(engine.shapes)
        )
        request = RegisterKVCache(
            name, engine.name, engine.model, engine.world_size, rank,
            tuple(handles), groups,
        )  # fmt: skip
        asked = ModelRequest("registration", thief or worker.client, worker=worker)
        earlier = self.workers.get(name)
        if thief and earlier is not None and earlier.client != thief:
            asked.error = InstanceExists
        elif self.is_in_conflict(worker, earlier):
            asked.error = LayoutConflict
        self.transport.is_slow = how == "late" and not worker.is_private
        if asked.error is None:
            if earlier is not None:
                self.forget(earlier)
            self.workers[name] = worker
            self.all_workers.append(worker)
        self.ask(asked, request)
        self.transport.is_slow = False
        if asked.error is None:
            [instance] = [
                i for i in self.engine.registry.all() if i.instance_id == name
            ]
            worker.lanes = (ManualLane(), ManualLane())
            instance.store_lane, instance.retrieve_lane = worker.lanes  # type: ignore[assignment]
            space = (engine.model, engine.world_size)
            for part, group in zip(worker.parts(), instance.groups, strict=True):
                known = self.part_ids.setdefault((*space, part), group.part)
                assert known == group.part

    def make_cache(self, worker: Worker) -> None:
        """Have memory with something in it."""
        for shape in worker.engine.shapes:
            dims = (
                shape.num_planes,
                NUM_BLOCKS,
                worker.block_size,
                shape.width + worker.version,
            )
            array = np.arange(prod(dims), dtype=np.int64).astype(np.uint8)
            worker.arrays.append(array.reshape(dims))
            worker.shadows.append(worker.arrays[-1].copy())
            worker.free.append(list(range(NUM_BLOCKS)))

    def is_in_conflict(self, worker: Worker, earlier: Worker | None) -> bool:
        """Say whether a living cache of this rank, or of the same bytes, is unlike."""
        replicated = worker.engine.shapes[0].replicated
        return any(
            other.version != worker.version
            for other in self.workers.values()
            if other is not earlier
            and other.engine.model == worker.engine.model
            and other.engine.world_size == worker.engine.world_size
            and (other.rank == worker.rank or replicated)
        )

    def forget(self, worker: Worker) -> None:
        """A worker's cache is registered no more."""
        del self.workers[worker.id]
        worker.is_gone = True

    def answered_registration(self, asked: ModelRequest, outcome: object) -> None:
        """A cache that could not be attached is not registered."""
        worker = asked.worker
        assert worker is not None
        if isinstance(outcome, HandleError):
            if self.workers.get(worker.id) is worker:
                self.forget(worker)
        else:
            self.check_error(asked, outcome)
        asked.worker = None

    def answered_done(self, asked: ModelRequest, outcome: object) -> None:
        """Something that cannot fail, or must."""
        self.check_error(asked, outcome)

    # -- lookups ----------------------------------------------------------------------

    def live_parts(self, engine: Deployment) -> list[list[PartOf]]:
        """Return each rank's parts, nothing while a rank is missing."""
        by_rank: dict[int, list[PartOf]] = {}
        for worker in self.workers.values():
            other = worker.engine
            if (other.model, other.world_size) == (engine.model, engine.world_size):
                by_rank[worker.rank] = worker.parts()
        if len(by_rank) < engine.world_size:
            return []
        return [*by_rank.values()]

    def count_hits(self, asked: ModelRequest) -> int:
        """Count how many leading chunks of a lookup are a hit."""
        engine = asked.engine
        assert engine is not None
        space = (engine.model, engine.world_size)
        hashes = hashes_of(*space, asked.prompt)[: asked.num_chunks]

        def has(index: int, window: int | None) -> bool:
            have = self.present.get(hashes[index], set())
            return all(
                self.part_ids[*space, part] in have
                for parts in asked.needs
                for part in parts
                if engine.shapes[part.group].window == window
            )

        windows = {s.window for s in engine.shapes} - {None}
        best = 0
        for n in range(1, len(hashes) + 1):
            if not has(n - 1, None):
                break
            if all(
                has(index, window)
                for window in windows
                if window
                for index in range(max(0, n - -(-window // CHUNK)), n)
            ):
                best = n
        return best

    def answered_lookup(self, asked: ModelRequest, outcome: Any) -> None:
        """It counts what is there, and that is leased."""
        if self.check_error(asked, outcome):
            return
        assert asked.key is not None
        assert asked.engine is not None
        self.unsettled.discard(asked.key)
        hit = self.count_hits(asked)
        waited = asked.running is not None
        if not waited:
            self.replace_lookups(asked)
        is_cancelled = waited and (asked.is_ended or asked.is_replaced)
        if is_cancelled or (waited and 0 < asked.deadline < self.now):
            hit = 0
        if not self.tiers or not waited or not self.has_condemned:
            assert (outcome.num_chunks, outcome.num_tokens) == (hit, hit * CHUNK)
        if is_cancelled or asked.is_ended:
            return
        hit = outcome.num_chunks
        self.leases.pop(asked.key, None)
        if hit:
            engine = asked.engine
            hashes = hashes_of(engine.model, engine.world_size, asked.prompt)[:hit]
            self.leases[asked.key] = Lease(
                [(key, self.generation.get(key, 0)) for key in hashes],
                [set(range(engine.world_size)) for _ in hashes],
                asked.client,
                engine.name,
                self.now + LEASE_S,
                self.engine.sessions.find(asked.key),
            )

    # -- stores and retrieves ---------------------------------------------------------

    def answered_store(self, asked: ModelRequest, outcome: Any) -> None:
        """What it counts is what was committed."""
        assert asked.worker is not None
        future = asked.running.future if asked.running else None
        committed = self.committed.pop(future, 0)
        if self.check_error(asked, outcome):
            assert not committed
            return
        assert outcome.num_stored == committed
        num_parts = (asked.end - asked.start) // CHUNK * len(asked.blocks)
        counts = (outcome.num_stored, outcome.num_present, outcome.num_dropped)
        assert sum(counts) == num_parts

    def answered_retrieve(self, asked: ModelRequest, outcome: Any) -> None:
        """All of it is there, or none."""
        if isinstance(outcome, ChunksMissing) and asked.error is None:
            return
        if self.check_error(asked, outcome):
            return
        assert outcome.num_tokens == asked.end - asked.first
        self.note_read(asked)
        worker = asked.worker
        assert worker is not None
        space = (worker.engine.model, worker.engine.world_size)
        hashes = hashes_of(*space, asked.prompt)
        for part, blocks in zip(worker.parts(), asked.blocks, strict=True):
            shadow = worker.shadows[part.group]
            for token in range(asked.first, asked.end):
                at = token - asked.start
                block = blocks[at // worker.block_size]
                right = content(IDENTS[hashes[token // CHUNK]], part)
                if block != NULL_BLOCK:
                    slot = at % worker.block_size
                    shadow[:, block, slot] = right[:, token % CHUNK]

    def note_read(self, asked: ModelRequest) -> None:
        """A rank has read; its lease is the one that it was found under."""
        assert asked.key is not None
        assert asked.worker is not None
        lease = self.leases.get(asked.key)
        if asked.start == asked.end or lease is None or lease is not asked.lease:
            return
        first, end = asked.start // CHUNK, -(-asked.end // CHUNK)
        if asked.first < asked.end and not lease.take(first, end, {asked.worker.rank}):
            del self.leases[asked.key]

    def answered_reserve(self, asked: ModelRequest, outcome: Any) -> None:
        """Room is handed out, and is the worker's alone."""
        if self.check_error(asked, outcome):
            return
        num_parts = (asked.end - asked.start) // CHUNK * len(asked.blocks)
        num_reserved = sum(map(len, outcome.parts))
        assert num_reserved + outcome.num_present + outcome.num_dropped == num_parts
        self.hand_out(asked, outcome, is_written=True)

    def answered_hold(self, asked: ModelRequest, outcome: Any) -> None:
        """Parts are lent, all that are wanted."""
        if isinstance(outcome, ChunksMissing) and asked.error is None:
            return
        if not self.check_error(asked, outcome):
            self.hand_out(asked, outcome, is_written=False)

    def hand_out(self, asked: ModelRequest, reply: Any, *, is_written: bool) -> None:
        """Note a ticket."""
        if reply.ticket is None:
            self.give_back(asked)
            return
        assert asked.worker is not None
        assert not asked.worker.is_gone
        ticket = self.tickets[reply.ticket] = Ticket(asked, reply.parts, is_written)
        if is_written:
            for _, place in self.places_of(ticket):
                for buffer in buffers_of(self.arena.array.data, place.extents):
                    buffer[:] = b"?" * len(buffer)

    def places_of(self, ticket: Ticket) -> Iterator[tuple[bytes, PartLocation]]:
        """Yield a ticket's places, with the right bytes of each."""
        asked = ticket.asked
        worker = asked.worker
        assert worker is not None
        hashes = hashes_of(worker.engine.model, worker.engine.world_size, asked.prompt)
        for part, places in zip(worker.parts(), ticket.places, strict=True):
            for place in places:
                key = hashes[asked.start // CHUNK + place.index]
                yield content(IDENTS[key], part).tobytes(), place

    # -- asking -----------------------------------------------------------------------

    def ask(self, asked: ModelRequest, request: Any) -> None:
        """Send a request."""
        number = self.loop.next_id()
        self.flying[number] = asked
        deadline_ns = FAR_NS + int(asked.deadline * 1e9) if asked.deadline else 0
        self.loop.ask(number, asked.client, request, deadline_ns)

    def bind(self, key: SessionKey, prompt: int) -> int:
        """Return the prompt that a session is about.

        An engine that has nothing under way for it may use its id for another.
        """
        busy = any(asked.key == key for asked in self.flying.values())
        busy |= any(ticket.asked.key == key for ticket in self.tickets.values())
        if key not in self.bound:
            self.bound[key] = prompt
        elif not busy and self.bound[key] != prompt and prompt % 2:
            self.bound[key] = prompt
            self.unsettled.add(key)
        return self.bound[key]

    def tokens(self, asked: ModelRequest, sent: str, num_tokens: int) -> dict[str, Any]:
        """Return a request's session, and what it says of its tokens."""
        assert asked.key is not None
        prompt = asked.prompt = self.bind(asked.key, asked.prompt)
        named: dict[str, Any] = {"session": asked.key}
        if sent == "all" or asked.key in self.unsettled:
            asked.has_tokens = True
            named["tokens"] = tokens_of(prompt, 0, num_tokens)
            named["extras"] = extras_of(prompt)
        elif sent == "rest":
            offset = min(2 * CHUNK, num_tokens)
            named["tokens"] = tokens_of(prompt, offset, num_tokens)
            named["token_offset"] = offset
            named["extras"] = extras_of(prompt)
        return named

    def begin(
        self, kind: str, worker: Worker, key: SessionKey, prompt: int, num_tokens: int,
        pick: int, deadline: float,
    ) -> ModelRequest | None:  # fmt: skip
        """Make a copy's request with blocks of its own; none where there is no room."""
        asked = ModelRequest(kind, worker.client, key, prompt, worker=worker)
        asked.blocks = self.take_blocks(worker, num_tokens, pick)
        if not asked.blocks:
            return None
        if not self.has_room(worker):
            self.give_back(asked)
            return None
        asked.deadline = self.now + deadline if deadline else 0.0
        return asked

    def take_blocks(
        self, worker: Worker, num_tokens: int, pick: int
    ) -> list[list[int]]:
        """Take free blocks, none where there are too few."""
        needed = -(-num_tokens // worker.block_size)
        if any(len(free) < needed for free in worker.free):
            return []
        taken = []
        for free in worker.free:
            free.sort(reverse=bool(pick % 2))
            start = pick % (len(free) - needed + 1)
            taken.append(free[start : start + needed])
            del free[start : start + needed]
        return taken

    def go_on(self) -> bool:
        """Move everything as far as it goes for now; say whether anything did."""
        moved = self.loop.step()
        self.coordinator.run_due()
        for tier in self.tiers:
            moved |= bool(tier.pending)
            tier.answer_all()
        self.coordinator.run_due()
        for lane in self.busy_lanes():
            lane.resume()
            moved = True
        return self.loop.look_around() or moved

    def busy_lanes(self) -> list[ManualLane]:
        """Return what runs beside the loop."""
        lanes = [lane for worker in self.all_workers for lane in worker.lanes]
        return [lane for lane in [*lanes, self.closer] if lane.is_busy]

    def settle(self) -> None:
        """See everything under way to its end."""
        while self.transport.pending:
            self.transport.pending.pop(0)(True)
        for _ in range(1000):
            if not self.go_on():
                return
        raise AssertionError("it never ends")

    engines_at = st.integers(0, 2)
    ranks = st.integers(0, 1)
    prompts = st.integers(0, len(PROMPTS) - 1)
    requests = st.sampled_from(["r", "s"])
    lengths = st.integers(1, MAX_CHUNKS)
    sendings = st.sampled_from(["all"] * 5 + ["none", "rest"])
    hurries = st.sampled_from([True, False])
    picks = st.integers(0, 7)
    deadlines = st.sampled_from([0.0, 0.0, 0.0, 1.0, 6.0])

    def engine_at(self, number: int) -> Deployment:
        """Return one of the engines that run."""
        return self.engines[number % len(self.engines)]

    def worker_at(self, number: int, rank: int, pick: int) -> Worker | None:
        """Return a registered cache of an engine's, or another's of its rank."""
        engine = self.engine_at(number)
        rank %= engine.world_size
        name = f"{engine.name}{rank}"
        choice = [w for w in (name, name + "+") if w in self.workers]
        return self.workers[choice[pick % len(choice)]] if choice else None

    # -- rules: what engines do -------------------------------------------------------

    @rule(
        at=engines_at, request=requests, prompt=prompts, length=lengths,
        sent=sendings, deadline=deadlines, hurry=hurries,
    )  # fmt: skip
    def look_up(
        self, at: int, request: str, prompt: int, length: int, sent: str,
        deadline: float, hurry: bool,
    ) -> None:  # fmt: skip
        """A scheduler looks up."""
        engine = self.engine_at(at)
        asked = ModelRequest(
            "lookup", engine.scheduler, SessionKey(engine.name, request), prompt
        )
        asked.engine, asked.num_chunks = engine, length
        asked.needs = self.live_parts(engine)
        asked.deadline = self.now + deadline if deadline else 0.0
        if not asked.needs:
            asked.error = UnknownModel
        named = self.tokens(asked, sent, length * CHUNK)
        self.ask(
            asked,
            Lookup(
                model=engine.model,
                world_size=engine.world_size,
                end=length * CHUNK + 1,
                **named,
            ),
        )
        if hurry:
            self.settle()

    @rule(
        at=engines_at, rank=ranks, pick=picks, request=requests, prompt=prompts,
        start=st.sampled_from([0, 0, 0, 1, 2]), length=lengths,
        over=st.integers(0, CHUNK - 1), nulls=st.sampled_from([0, 0, 1, 2]),
        sent=sendings, deadline=deadlines, event=st.booleans(), hurry=hurries,
    )  # fmt: skip
    def store(
        self, at: int, rank: int, pick: int, request: str, prompt: int, start: int,
        length: int, over: int, nulls: int, sent: str, deadline: float, event: bool,
        hurry: bool,
    ) -> None:  # fmt: skip
        """A worker stores what it has computed, or asks for room to do it."""
        worker = self.worker_at(at, rank, pick)
        if worker is None:
            return
        engine = worker.engine
        end = min(start + length, MAX_CHUNKS) * CHUNK
        start *= CHUNK
        key = SessionKey(engine.name, request)
        kind = "reserve" if worker.is_private else "store"
        asked = self.begin(kind, worker, key, prompt, end - start, pick, deadline)
        if asked is None:
            return
        asked.start = asked.first = start
        asked.end = end
        named = self.tokens(asked, sent, end)
        self.pass_window(asked, nulls)
        self.compute(asked)
        # A partial chunk at the end is not stored.
        at_end = min(end + over, MAX_CHUNKS * CHUNK)
        store = Store(
            instance_id=worker.id,
            start=start,
            end=at_end if at_end // CHUNK * CHUNK == end else end,
            blocks=pack(asked.blocks),
            event=b"e" if event else b"",
            **named,
        )
        self.ask(asked, Reserve(store) if worker.is_private else store)
        if hurry:
            self.settle()

    def leased(self, engine: Deployment) -> list[SessionKey]:
        """Return an engine's sessions that have a lease."""
        return [key for key in self.leases if key.engine_id == engine.name]

    def has_room(self, worker: Worker) -> bool:
        """Say whether the server copies, or its client may have another ticket."""
        return not worker.is_private or self.num_tickets(worker.client) < MAX_TICKETS

    def num_tickets(self, client: bytes) -> int:
        """Count what a client has, and may get."""
        asked = [ticket.asked for ticket in self.tickets.values()]
        asked += [a for a in self.flying.values() if a.kind in ("reserve", "hold")]
        return sum(one.client == client for one in asked)

    def pass_window(self, asked: ModelRequest, nulls: int) -> None:
        """Where a window has passed, there are no blocks."""
        worker = asked.worker
        assert worker is not None
        for group, shape in enumerate(worker.engine.shapes):
            if shape.window:
                passed = asked.blocks[group][:nulls]
                worker.free[group] += passed
                asked.blocks[group][:nulls] = [NULL_BLOCK] * len(passed)

    def compute(self, asked: ModelRequest) -> None:
        """Have the right bytes in a worker's blocks."""
        worker = asked.worker
        assert worker is not None
        space = (worker.engine.model, worker.engine.world_size)
        hashes = hashes_of(*space, asked.prompt)
        for part, blocks in zip(worker.parts(), asked.blocks, strict=True):
            for token in range(asked.start, asked.end):
                at = token - asked.start
                block, slot = blocks[at // worker.block_size], at % worker.block_size
                if block == NULL_BLOCK:
                    continue
                right = content(IDENTS[hashes[token // CHUNK]], part)
                for array in (worker.arrays[part.group], worker.shadows[part.group]):
                    array[:, block, slot] = right[:, token % CHUNK]

    @rule(at=engines_at, request=requests, prompt=prompts, length=lengths)
    def compute_and_find(self, at: int, request: str, prompt: int, length: int) -> None:
        """An engine computes a prompt, and its scheduler finds it."""
        engine = self.engine_at(at)
        for rank in range(engine.world_size):
            self.store(
                at, rank, 0, request, prompt, 0, length, 0, 0, "all", 0.0, False, True
            )
            for number in [n for n, t in self.tickets.items() if t.is_written]:
                self.end_ticket([*self.tickets].index(number), "well")
        self.look_up(at, request, prompt, length, "all", 0.0, True)

    @rule(
        at=engines_at, rank=ranks, pick=picks, request=requests, prompt=prompts,
        as_found=st.sampled_from([True, True, False]),
        start=st.sampled_from([0, 0, 0, 1, 2]), length=lengths,
        less=st.sampled_from([0, 0, 0, 1, 2]),
        skip=st.sampled_from([0, 0, 0, 0, 1, 2, 5]),
        nulls=st.sampled_from([0, 0, 2]),
        sent=sendings, deadline=deadlines, event=st.booleans(), hurry=hurries,
    )  # fmt: skip
    def retrieve(
        self, at: int, rank: int, pick: int, request: str, prompt: int,
        as_found: bool, start: int, length: int, less: int, skip: int, nulls: int,
        sent: str, deadline: float, event: bool, hurry: bool,
    ) -> None:  # fmt: skip
        """A worker reads what was found, some of it, or what never was."""
        worker = self.worker_at(at, rank, pick)
        if worker is None:
            return
        engine = worker.engine
        key = SessionKey(engine.name, request)
        if as_found and not self.leased(engine):
            self.compute_and_find(at, request, prompt, length)
        leased = self.leased(engine)
        if as_found and leased:
            key = leased[pick % len(leased)]
            start, length = 0, len(self.leases[key].chunks)
        end = min(start + length, MAX_CHUNKS) * CHUNK
        start *= CHUNK
        kind = "hold" if worker.is_private else "retrieve"
        asked = self.begin(kind, worker, key, prompt, end - start, pick, deadline)
        if asked is None:
            return
        asked.start, asked.end = start, end - less
        asked.first = min(start + skip, asked.end)
        if engine.shapes[0].is_opaque:
            cut = any((t - start) % worker.block_size for t in (asked.first, asked.end))
            if cut and asked.first < asked.end:
                asked.error = BadRequest
        self.pass_window(asked, nulls)
        sent_to = -(-asked.end // CHUNK) * CHUNK
        named = self.tokens(asked, sent, sent_to)
        retrieve = Retrieve(
            instance_id=worker.id,
            start=start,
            end=asked.end,
            blocks=pack(asked.blocks),
            skip_first_n_tokens=asked.first - start,
            event=b"e" if event else b"",
            **named,
        )
        self.ask(asked, Hold(retrieve) if worker.is_private else retrieve)
        if hurry:
            self.settle()

    @rule(at=engines_at, rank=ranks, pick=st.integers(-1, 8), prompt=prompts)
    def ask_wrongly(self, at: int, rank: int, pick: int, prompt: int) -> None:
        """A request that cannot be: it is told why, and nothing happens.

        The last one is for another client's cache.
        """
        if pick < 0:
            self.steal(at, rank)
            return
        worker = self.worker_at(at, rank, 0)
        if worker is None or not self.has_room(worker):
            return
        asked = ModelRequest("done", worker.client, SessionKey("wrong", "r"), prompt)
        named: dict[str, Any] = {
            "session": asked.key,
            "instance_id": worker.id,
            "start": 0,
            "end": CHUNK,
            "blocks": pack([[0, 1, 2, 3]] * len(worker.free)),
            "tokens": tokens_of(prompt, 0, CHUNK),
        }
        wrong: list[tuple[type[KVError], dict[str, Any]]] = [
            (UnknownInstance, {"instance_id": "nobody"}),
            (BadRequest, {"start": 1}),
            (BadRequest, {"blocks": pack([[NUM_BLOCKS, 0]] * len(worker.free))}),
            (BadRequest, {"blocks": pack([[-2, 0]] * len(worker.free))}),
            (BadRequest, {"blocks": pack([[]] * len(worker.free))}),
            (BadRequest, {"blocks": ()}),
            (BadRequest, {"start": 2 * CHUNK}),
            (BadRequest, {"tokens": memoryview(b"12345")}),
        ]
        wrong.append((UnknownInstance, {}))
        asked.error, changes = wrong[pick]
        if not changes:
            asked.client = worker.engine.scheduler
        copy = Store if prompt % 2 else Retrieve
        request_ = copy(**named | changes)
        if worker.is_private:
            request_ = Reserve(request_) if prompt % 2 else Hold(request_)
        self.ask(asked, request_)

    @rule(at=engines_at, request=requests, hurry=hurries)
    def end_session(self, at: int, request: str, hurry: bool) -> None:
        """A request ends, whatever is under way for it."""
        engine = self.engine_at(at)
        key = SessionKey(engine.name, request)
        for asked in [*self.flying.values(), *(t.asked for t in self.tickets.values())]:
            if asked.key == key:
                asked.is_ended = True
                asked.lease = None
        self.ask(ModelRequest("done", engine.scheduler), EndSession(key))
        self.leases.pop(key, None)
        self.bound.pop(key, None)
        self.unsettled.discard(key)
        if hurry:
            self.settle()

    @rule(
        at=engines_at,
        request=requests,
        start=st.integers(0, 8),
        length=st.integers(0, 16),
    )
    def free(self, at: int, request: str, start: int, length: int) -> None:
        """An engine wants no more of some chunks."""
        engine = self.engine_at(at)
        key = SessionKey(engine.name, request)
        end = start + length
        self.ask(
            ModelRequest("done", engine.scheduler), FreeLookupLocks(key, start, end)
        )
        lease = self.leases.get(key)
        first, last = start // CHUNK, -(-end // CHUNK)
        if lease and first < last and not lease.take(first, last, {0, 1}):
            del self.leases[key]

    @rule(really=st.sampled_from([False, False, False, True]))
    def clear(self, really: bool) -> None:
        """Somebody drops what nobody reads or writes."""
        if really:
            self.ask(ModelRequest("done", self.engines[0].scheduler), Clear())

    # -- rules: who comes and goes ----------------------------------------------------

    @rule(
        at=engines_at, rank=ranks, version=st.sampled_from([0, 0, 1]),
        block_size=st.sampled_from([1, 2, 4]), suffix=st.sampled_from(["", "", "+"]),
        how=st.sampled_from(["at once", "late"]),
    )  # fmt: skip
    def register(
        self, at: int, rank: int, version: int, block_size: int, suffix: str, how: str
    ) -> None:  # fmt: skip
        """A worker registers: anew, in its own place, or one cache more."""
        engine = self.engine_at(at)
        if engine.shapes[0].is_opaque:
            block_size = 2
        rank %= engine.world_size
        self.register_worker(engine, rank, version, block_size, suffix, how)

    def steal(self, at: int, rank: int) -> None:
        """A client registers under the id of another's living cache."""
        worker = self.worker_at(at, rank, 0)
        if worker is not None:
            suffix = "+" if worker.id.endswith("+") else ""
            self.register_worker(
                worker.engine, worker.rank, worker.version, worker.block_size,
                suffix, "at once", worker.engine.scheduler,
            )  # fmt: skip

    @rule(at=engines_at, rank=ranks, pick=st.sampled_from([-1, -1, 0, 1]))
    def unregister(self, at: int, rank: int, pick: int) -> None:
        """A worker takes its cache away, whatever is queued."""
        worker = self.worker_at(at, rank, pick)
        if worker is not None and pick >= 0:
            self.forget(worker)
            asked = ModelRequest("done", worker.client)
            self.ask(asked, UnregisterKVCache(worker.id))

    @precondition(lambda self: self.transport.pending)
    @rule(pick=picks, well=st.sampled_from([True, True, False]))
    def attach(self, pick: int, well: bool) -> None:
        """A worker's memory is there at last, or cannot be attached."""
        pending = self.transport.pending
        pending.pop(pick % len(pending))(well)

    @rule(
        at=engines_at,
        who=st.integers(-1, 1),
        is_back=st.sampled_from([True, True, False]),
    )
    def die(self, at: int, who: int, is_back: bool) -> None:
        """A scheduler or a worker is killed; another takes its place."""
        engine = self.engine_at(at)
        rank = who % engine.world_size
        client = engine.scheduler if who < 0 else engine.worker(rank)
        dropped = [
            number
            for number, asked in self.flying.items()
            if asked.client == client and asked.running is None
        ]
        gone = [w for w in self.workers.values() if w.client == client]
        self.loop.kill(client)
        self.lose_requests(client, dropped)
        for worker in gone:
            self.forget(worker)
            worker.is_dead = True
        self.lose_leases(client, engine, {rank} if gone else set())
        self.loop.greet(client)
        if is_back and who >= 0:
            self.register_worker(engine, rank, 0, 2, "", "at once")

    def lose_requests(self, client: bytes, dropped: Sequence[int]) -> None:
        """What is in slices is dropped; tickets end; nobody waits for a tier."""
        for asked in self.flying.values():
            waits = asked.kind == "lookup" and asked.running is not None
            asked.is_replaced |= waits and asked.client == client
        for number in dropped:
            asked = self.flying.pop(number)
            if asked.worker is not None and asked.kind != "registration":
                self.give_back(asked)
        for number, ticket in [*self.tickets.items()]:
            if ticket.asked.client == client:
                self.drop_ticket(number)

    def lose_leases(self, client: bytes, engine: Deployment, ranks: set[int]) -> None:
        """Leases that it looked up end, and no other waits for its ranks."""
        for key, lease in [*self.leases.items()]:
            lost = lease.client == client
            if lease.engine == engine.name and ranks:
                lost |= not lease.take(0, MAX_CHUNKS, ranks)
            if lost:
                del self.leases[key]

    # -- rules: tickets ---------------------------------------------------------------

    def drop_ticket(self, number: int) -> Ticket:
        """Note a ticket's end."""
        ticket = self.tickets.pop(number)
        self.give_back(ticket.asked)
        self.ended_tickets.append(number)
        return ticket

    @precondition(lambda self: self.tickets)
    @rule(
        pick=picks,
        how=st.sampled_from(["well", "well", "well", "badly", "wrong"]),
    )
    def end_ticket(self, pick: int, how: str) -> None:
        """A worker has copied, or has not."""
        number = [*self.tickets][pick % len(self.tickets)]
        ticket = self.tickets[number]
        client = ticket.asked.client
        if not ticket.is_written:
            self.end_hold(number, ticket, how)
        elif how != "well":
            self.drop_ticket(number)
            self.ask(ModelRequest("done", client), Abort(number))
        else:
            checksums = b""
            for right, place in self.places_of(ticket):
                rest = right
                buffers = buffers_of(self.arena.array.data, place.extents)
                for buffer in buffers:
                    buffer[:] = rest[: len(buffer)]
                    rest = rest[len(buffer) :]
                assert not rest
                checksums += checksum_of(buffers)
            if not self.engine.transfers.checksums:
                checksums = b""
            asked = ModelRequest("commit", client, worker=ticket.asked.worker)
            asked.deadline = ticket.asked.deadline
            self.drop_ticket(number)
            self.ask(asked, Commit(number, memoryview(checksums)))

    def answered_commit(self, asked: ModelRequest, outcome: Any) -> None:
        """It is kept unless it is late or its cache has gone."""
        worker, late = asked.worker, 0 < asked.deadline < self.now
        assert worker is not None
        failed = self.check_error(asked, outcome)
        assert failed == (late or worker.is_gone)
        asked.worker = None

    def end_hold(self, number: int, ticket: Ticket, how: str) -> None:
        """A worker has read; what was lent is still what it was."""
        for right, place in self.places_of(ticket):
            buffers = buffers_of(self.arena.array.data, place.extents)
            assert b"".join(buffers) == right
        asked = ModelRequest("done", ticket.asked.client)
        release = Release(number, 1)
        if how == "wrong" and any(map(len, ticket.places)):
            release = Release(
                number, None, (next(filter(len, ticket.places))[0].index,)
            )
        elif how != "well":
            release = Release(number, None)
        self.drop_ticket(number)
        if release.num_bytes is not None:
            self.note_read(ticket.asked)
        self.ask(asked, release)

    @precondition(lambda self: self.ended_tickets)
    @rule(pick=picks, at=engines_at)
    def end_again(self, pick: int, at: int) -> None:
        """What has ended stays so."""
        number = self.ended_tickets[pick % len(self.ended_tickets)]
        kinds = (Abort, Commit, Release)
        asked = ModelRequest("done", self.engine_at(at).scheduler, error=UnknownTicket)
        self.ask(asked, kinds[pick % 3](number))

    # -- rules: tiers -----------------------------------------------------------------

    @precondition(lambda self: self.tiers)
    @rule(
        pick=picks, times=st.integers(1, 4), well=st.sampled_from([True, True, False])
    )
    def answer_tier(self, pick: int, times: int, well: bool) -> None:
        """Tiers answer, in any order; the last of it well or not."""
        for left in reversed(range(times)):
            self.coordinator.run_due()
            tiers = [tier for tier in self.tiers if tier.pending]
            if tiers:
                tier = tiers[pick % len(tiers)]
                tier.answer(pick % len(tier.pending), well=well or bool(left))
        self.coordinator.run_due()

    @precondition(lambda self: any(tier.kept for tier in self.tiers))
    @rule(pick=picks, gone=st.booleans())
    def spoil(self, pick: int, gone: bool) -> None:
        """A tier loses a part, or has other bytes for it."""
        tier = next(tier for tier in self.tiers if tier.kept)
        key = [*tier.kept][pick % len(tier.kept)]
        if gone:
            del tier.kept[key]
        else:
            tier.wrong.add(key)

    # -- rules: what runs -------------------------------------------------------------

    @precondition(lambda self: self.busy_lanes())
    @rule(pick=st.integers(0, 20), times=st.integers(1, 3))
    def copy(self, pick: int, times: int) -> None:
        """A lane, or the closer, goes on."""
        for _ in range(times):
            lanes = self.busy_lanes()
            if lanes:
                lanes[pick % len(lanes)].resume()

    @rule(times=st.integers(1, 4))
    def slice(self, times: int) -> None:
        """The loop goes on with what it has in slices."""
        for _ in range(times):
            self.loop.step()

    @rule()
    def answer(self) -> None:
        """The loop takes in what has ended."""
        self.loop.look_around()

    @rule()
    def run(self) -> None:
        """Everything comes to its end."""
        self.settle()

    @rule(seconds=st.sampled_from([2.0, 5.0, 11.0, 31.0]))
    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.now += seconds
        self.engine.expire()
        self.coordinator.run_due()
        for key, lease in [*self.leases.items()]:
            if lease.deadline <= self.now:
                del self.leases[key]

    # -- what always holds ------------------------------------------------------------

    @invariant()
    def l1_is_consistent(self) -> None:
        """No overlap, no lost page, nothing gone that was somebody's."""
        if not hasattr(self, "engine"):
            return
        assert not self.wrong
        self.engine.l1.check()

    @invariant()
    def holds_are_those_of_the_model(self) -> None:
        """Leases and reads hold what they should, and nothing else does."""
        if not hasattr(self, "engine"):
            return
        self.sync_leases()
        table = self.engine.leases
        assert len(table) == len(self.leases)
        assert table.num_granted == len(table) + sum(table.num_ended.values())
        stats = self.engine.l1.stats()
        num_held = len(self.held())
        # Prefetch and write-back have holds of their own.
        assert stats.num_held >= num_held if self.tiers else stats.num_held == num_held
        assert stats.num_parts == sum(map(len, self.present.values()))
        assert self.copies.num_tickets() == len(self.tickets)

    @invariant()
    def what_is_readable_is_right(self) -> None:
        """Every byte of it, of every rank, group and layout."""
        if not hasattr(self, "engine"):
            return
        names = {(s[0], s[1], n): s[2] for s, n in self.part_ids.items()}
        hashes = [*self.present]
        for key, chunk in zip(hashes, self.engine.l1.peek(hashes), strict=True):
            assert chunk is not None
            ident = IDENTS[key]
            for number in self.present[key]:
                assert chunk.ready >> number & 1
                part = names[ident.model, ident.world_size, number]
                extents = chunk.parts[number].extents
                buffers = buffers_of(self.arena.array.data, extents)
                assert b"".join(buffers) == content(ident, part).tobytes()

    @invariant()
    def caches_are_as_they_should_be(self) -> None:
        """No byte is written but those of a retrieve, and those only as a whole."""
        for worker in self.all_workers:
            busy = [set[int]() for _ in worker.arrays]
            for asked in self.flying.values():
                if asked.worker is worker and asked.kind == "retrieve":
                    for taken, blocks in zip(busy, asked.blocks, strict=True):
                        taken |= {*blocks}
            for array, shadow, taken in zip(
                worker.arrays, worker.shadows, busy, strict=True
            ):
                rest = [b for b in range(NUM_BLOCKS) if b not in taken]
                assert (array[:, rest] == shadow[:, rest]).all()

    def teardown(self) -> None:
        """When all is done and everyone has gone, nothing is left."""
        if not hasattr(self, "engine"):
            return
        try:
            self.settle()
            assert not self.flying
            self.caches_are_as_they_should_be()
            for at, engine in enumerate(self.engines):
                for who in range(-1, engine.world_size):
                    self.die(at, who, is_back=False)
            self.settle()
            self.holds_are_those_of_the_model()
            self.check_idle()
        finally:
            self.engine.close()
            self.loop.close()
            for patch in self.patches:
                patch.stop()
            self.arena.close()
        assert all(memory.is_closed for memory in self.transport.memories)

    def check_idle(self) -> None:
        """Nothing is held, reserved, leased or under way; all pages come back."""
        sessions = self.engine.sessions
        assert all(s.num_running == 0 for s in sessions._sessions.values())
        self.now += 100
        self.engine.expire()
        assert len(sessions) == 0
        assert len(self.engine.leases) == 0
        assert self.copies.num_tickets() == 0
        assert self.engine.registry.all() == []
        assert self.engine.tiering.num_prefetches() == 0
        stats = self.engine.l1.stats()
        assert (stats.num_held, stats.num_reserved) == (0, 0)
        self.engine.l1.drop(self.engine.l1.hashes())
        self.engine.l1.check()
        assert self.arena.used_bytes == 0


def pack(blocks: Sequence[Sequence[int]]) -> tuple[memoryview, ...]:
    """Pack block ids as requests have them."""
    return tuple(memoryview(np.array(ids, "<i4").tobytes()) for ids in blocks)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.__doc__ = """Whatever happens, right bytes, and nothing left."""
TestEngineMachine.settings = settings(
    max_examples=2 * settings().max_examples, stateful_step_count=50
)
