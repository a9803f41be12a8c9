"""In-process blend engine; the test takes each step."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np

from kvcore.blend.blend_engine import BlendEngine
from kvcore.blend.matchers import DocumentSpace
from kvcore.config import (
    BlendConfig,
    L1Config,
    PrefetchConfig,
    ServerConfig,
    SessionConfig,
    WireConfig,
    WriteBackConfig,
)
from kvcore.engine import lookups
from kvcore.engine.engine import Engine
from kvcore.engine.registrations import Instance
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.tiering import no_tiering
from kvcore.errors import ChunksMissing, DeadlineExceeded, KVError
from kvcore.keys import ChunkHash, HashChain, chain_seed
from kvcore.option_structs import ByteSize
from kvcore.protocol import CBRegisterKVCache, CBRetrievePreComputed, PosixShm
from kvcore.shm import SHM_DIR, Segment
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import Chunk
from kvcore.storage.l1 import L1
from kvcore.storage.quotas import QuotaAccount
from kvcore.storage.recovery import recover
from kvcore.tiers.tier_manager import TierManager
from tests.blend.blend_model import (
    END,
    FAR_NS,
    MODEL,
    PART_BYTES,
    ROPE,
    SHAPE,
    SIZE,
    START,
    Buffer,
    Operation,
    Text,
    extras_of,
    kv,
    packed,
    turned,
)
from tests.blend.manual_threads import ManualLane, SteppedClock, small_steps
from tests.tiers.manual_tier import ManualTier

_numbers = count()


class BlendFixture:
    """An engine, its blend engine, and a buffer for each rank."""

    def __init__(
        self,
        matcher: str,
        *,
        num_pages: int,
        num_tiers: int = 0,
        world_size: int = 1,
        policy: str = "write_through",
        max_jobs: int = 100,
        max_tier_chunks: int = 1000,
        collide: bool = False,
        keep: str = "",
        quotas: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._stack = ExitStack()
        self.keep = keep
        """What is kept across a restart: "", the "index", or "l1" too."""
        folder = self._stack.enter_context(TemporaryDirectory()) if keep else ""
        self.config = ServerConfig(
            chunk_size=SIZE,
            blend=BlendConfig(
                matcher="separated" if matcher == "separated" else "anywhere",
                start=() if matcher == "anywhere" else ((START,),),
                end=() if matcher == "anywhere" else ((END,),),
                max_tier_chunks=max_tier_chunks,
                keep=f"{folder}/documents" if keep == "index" else None,
            ),
            l1=L1Config(
                size=ByteSize(num_pages << 12),
                page=ByteSize(1 << 12),
                quotas={name: ByteSize(size) for name, size in quotas.items()},
                keep=f"{folder}/journal" if keep == "l1" else None,
                engine_share=1.0,
            ),
            wire=WireConfig(slice_chunks=1),
            sessions=SessionConfig(lease_s=60, idle_s=600),
            prefetch=PrefetchConfig(deadline_s=600, max_jobs=max_jobs),
            write_back=WriteBackConfig(policy=policy, watermark=0.5),
            tiers=("file:///played",) * min(num_tiers, 1),
        )
        self.now = 0.0
        self.world_size = world_size
        self.texts: dict[ChunkHash, Text] = {}
        """The text of every chunk that may be stored."""
        self.restored: set[ChunkHash] = set()
        """Chunks of an earlier run: their quota is the model's, of no salt."""
        self.operations: list[Operation] = []
        self.on_step: Callable[[Operation], None] = lambda _: None
        """Called after every step of a request."""
        self.buffers: dict[int, Segment] = {}
        self.tiers = [ManualTier(f"t{i}") for i in range(num_tiers)]
        self._name = f"kvtest-{os.getpid()}-blend-{next(_numbers)}"
        self._num_pages = num_pages
        patch = self._stack.enter_context
        patch(small_steps())
        patch(mock.patch.object(lookups, "monotonic_ns", self.now_ns))
        if collide:  # A window's hash is the sum of its tokens.
            patch(mock.patch("secrets.randbits", return_value=1))
        self._start()
        for rank in range(world_size):
            name = f"{self._name}-{rank}"
            self.buffers[rank] = Segment.create(name, int(np.prod(SHAPE)), touch=False)
            self.register(rank)

    def _start(self) -> None:
        """Start a server with the files that an earlier one kept."""
        keep = self.config.l1.keep
        kept = keep is not None
        size = self._num_pages * PART_BYTES
        self.arena = Arena(size, PART_BYTES, f"{self._name}-arena", kept=kept)
        recovered = recover(Path(keep), self.arena) if keep is not None else None
        self.coordinator = SteppedClock("test", lambda: self.now_ns() / 1e9)
        self.engine = Engine(
            self.config,
            self.arena,
            lambda: self.now,
            self.open_tiering if self.tiers else no_tiering,
            recovered,
        )
        self.engine.transfers._clock_ns = self.now_ns
        self.blend = BlendEngine(self.config, self.engine)
        self.arena.keep()
        self.l1 = self.engine.l1
        self.restored = {*self.l1.hashes()}

    def open_tiering(self, l1: L1, arena: Arena) -> TierManager:
        """Open the tiers behind L1 with a manual timer thread."""
        return TierManager(
            l1,
            arena,
            self.tiers,
            self.config.prefetch,
            self.config.write_back,
            self.coordinator,
        )

    def _stop(self) -> None:
        """Stop the server with requests pending."""
        self.engine.close()
        self.blend.close()
        self.arena.close()
        # Loads that it started refer to its memory, not to its successor's.
        for tier in self.tiers:
            tier.close()

    def restart(self) -> None:
        """Stop the server and start the next; no request is answered, tiers remain."""
        for operation in self.operations:
            if operation.steps is not None:
                operation.steps.close()
        self.operations.clear()
        if self.keep == "l1":
            # Live views of the arena keep its lock, as a running server does.
            fcntl.flock(self.arena._segment._lock, fcntl.LOCK_UN)
        self._stop()
        self._start()

    def close(self) -> None:
        """Stop the server and remove its memory."""
        self._stop()
        if self.keep == "l1":
            (SHM_DIR / self.arena.name).unlink()
        self._stack.close()
        for segment in self.buffers.values():
            segment.unlink()
            segment.close()

    def now_ns(self) -> int:
        """Return the manual clock's time in the deadlines' unit."""
        return FAR_NS + int(self.now * 1e9)

    # -- registration ------------------------------------------------------------------

    def caller(self, client: str, deadline: float = 0.0) -> RequestContext:
        """Return the context of client "s", the scheduler, or "w0" or "w1"."""
        deadline_ns = FAR_NS + int(deadline * 1e9) if deadline else 0
        return RequestContext(client, os.getpid(), deadline_ns)

    def register(self, rank: int) -> Instance:
        """Register a rank's buffer in place of an earlier one."""
        segment = self.buffers[rank]
        request = CBRegisterKVCache(
            f"i{rank}",
            "e",
            MODEL,
            self.world_size,
            rank,
            PosixShm(segment.name, 0, segment.num_bytes),
            (*SHAPE[:3], ROPE.head_dim),
            "float16",
            ROPE,
        )
        self.blend.cb_register_kv_cache(request, self.caller(f"w{rank}"))
        self.await_closed()
        instance = self.engine.registry.get(f"w{rank}", f"i{rank}")
        instance.store_lane = ManualLane()  # type: ignore[assignment]
        instance.retrieve_lane = ManualLane()  # type: ignore[assignment]
        return instance

    def instance(self, rank: int) -> Instance | None:
        """Return a rank's instance if it is registered."""
        return self.engine.registry.find(f"w{rank}", f"i{rank}")

    def buffer(self, rank: int) -> Buffer:
        """Return a rank's buffer."""
        array: Buffer = self.buffers[rank].array.reshape(SHAPE)
        return array

    def await_closed(self) -> None:
        """Wait until removed buffers are unmapped and their copies dropped."""
        closed = Event()
        self.engine.run_after_close(closed.set)
        assert closed.wait(20)

    # -- requests ----------------------------------------------------------------------

    def begin(self, handler: Callable[..., Any], operation: Operation) -> Operation:
        """Begin a request without taking a step of it."""
        caller = self.caller(operation.client, operation.deadline)

        def steps() -> Generator[None, None, Any]:
            return (yield from handler(operation.request, caller))

        operation.steps = steps()
        self.operations.append(operation)
        return operation

    def space(self, salt: str) -> DocumentSpace:
        """Return the document space of a salt."""
        return DocumentSpace(MODEL, self.world_size, SIZE, extras_of(salt))

    def hashes(
        self, tokens: Sequence[int], salt: str, *, is_document: bool
    ) -> list[ChunkHash]:
        """Hash the whole chunks of a document, or of a prompt in the normal space."""
        if is_document:
            chain = HashChain(self.space(salt).seed, SIZE)
        else:
            seed = chain_seed("prefix", MODEL, self.world_size, SIZE)
            chain = HashChain(seed, SIZE, extras_of(salt))
        for _ in chain.extend(packed(tokens), 1 << 20):
            pass
        return chain.hashes

    def learn(self, tokens: Sequence[int], salt: str, *, is_document: bool) -> None:
        """Record the texts of chunks that may be stored."""
        hashes = self.hashes(tokens, salt, is_document=is_document)
        for number, key in enumerate(hashes, 1):
            text = Text(is_document, salt, tuple(tokens[: number * SIZE]))
            assert self.texts.setdefault(key, text) == text

    def advance(self, operation: Operation) -> None:
        """Take one step of a request: a slice, its copy, a tier's reply, its end."""
        try:
            self._advance(operation)
        except KVError as error:
            operation.error = error
            self._end(operation, None)
        self.on_step(operation)

    def _advance(self, operation: Operation) -> None:
        if operation.steps is None:
            assert operation.running is not None
            if operation.running.future.done():
                self._end(operation, operation.running.finish())
            else:
                self._advance_copy(operation)
            return
        try:
            next(operation.steps)
        except StopIteration as stop:
            operation.steps = None
            if not isinstance(stop.value, DeferredReply):
                self._end(operation, stop.value)
                return
            operation.running = stop.value
            for _, lane in self._lanes(operation):
                operation.copied = lane.queue[-1][2][1]

    def _end(self, operation: Operation, reply: Any) -> None:
        operation.reply = reply
        operation.is_over = True
        self.operations.remove(operation)

    def _advance_copy(self, operation: Operation) -> None:
        """Take a step of the work that a request waits for."""
        lanes = self._lanes(operation)
        if lanes:
            self.copy(*lanes[0])
            return
        self.coordinator.run_due()
        if operation.running and operation.running.future.done():
            return
        pending = [tier for tier in self.tiers if tier.pending]
        assert pending, "no pending work can end this request"
        pending[0].answer(0)
        self.coordinator.run_due()

    def _lanes(self, operation: Operation) -> list[tuple[Instance, ManualLane]]:
        lanes: list[tuple[Instance, Any]] = []
        if operation.instance is not None and operation.running is not None:
            both = (operation.instance.store_lane, operation.instance.retrieve_lane)
            lanes = [
                (operation.instance, lane)
                for lane in both
                if any(operation.running.future is each[0] for each in lane.queue)  # type: ignore[attr-defined]
            ]
        return lanes

    def copy(self, instance: Instance, lane: ManualLane) -> None:
        """Make the first copy of a lane and check every byte of the buffer."""
        future, call, (*args, named) = lane.queue.pop(0)
        if not future.set_running_or_notify_cancel():
            return
        [operation] = [
            a for a in self.operations if a.running and a.running.future is future
        ]
        buffer = self.buffer(instance.rank)
        hashes, [rows] = args[1:3]
        before = np.full(SHAPE, next(_numbers) % 251, np.uint8)
        buffer[:] = before
        written = before.copy()
        for number, (key, row) in enumerate(zip(hashes, rows, strict=True)):
            written[:, :, row] = kv(key, instance.rank)
            if operation.kind == "retrieve" and operation.request.rotate_keys:
                distance = self.distance(operation.request, number, key, int(row[0]))
                written[0][:, row] = turned(written[0][:, row], distance)
        is_store = call.__name__ == "store"
        if is_store:
            before = written
            buffer[:] = written
        late = 0 < operation.deadline < self.now
        missing = not late and not is_store and not self.are_present(hashes, instance)
        try:
            future.set_result(call(*args, **named))
        except KVError as error:
            future.set_exception(error)
        failed = future.exception()
        assert isinstance(failed, DeadlineExceeded) == late
        assert isinstance(failed, ChunksMissing) == missing
        assert np.array_equal(buffer, before if is_store or failed else written)

    def distance(
        self, request: CBRetrievePreComputed, number: int, key: ChunkHash, slot: int
    ) -> int:
        """Return the distance by which a chunk's keys are rotated."""
        if request.matches:
            old_start = request.matches[number].old_start
        else:
            old_start = len(self.texts[key].tokens) - SIZE
        return slot - request.offset - old_start

    def are_present(self, hashes: Sequence[ChunkHash], instance: Instance) -> bool:
        """Return whether L1 has a rank's part of every chunk."""
        bit = 1 << instance.groups[0].part
        return all(chunk and chunk.ready & bit for chunk in self.l1.peek(hashes))

    def drive(self, operation: Operation) -> None:
        """Run a request to its end; others take steps when it may wait for them."""
        for number in count(1):
            if operation.is_over:
                return
            self.advance(operation)
            if number % 40 == 0:
                for other in [
                    each for each in self.operations if each is not operation
                ]:
                    self.advance(other)

    def finish_all(self) -> None:
        """Run every request to its end."""
        while self.operations:
            self.drive(self.operations[0])
        self.answer_tiers()

    def answer_tiers(self) -> None:
        """Answer every request to the tiers."""
        self.coordinator.run_due()
        while any(tier.pending for tier in self.tiers):
            for tier in self.tiers:
                tier.answer_all()
            self.coordinator.run_due()

    def needs(self) -> int:
        """Return the mask of all ranks' parts; 0 while not all are registered."""
        if any(self.instance(rank) is None for rank in range(self.world_size)):
            return 0
        return self.engine.registry.lookup(MODEL, self.world_size)[1].full

    # -- invariants --------------------------------------------------------------------

    def check(self) -> None:
        """Check that L1 is consistent, with the bytes of each chunk and rank."""
        self.l1.check()
        assert self.coordinator.errors == []
        used = dict.fromkeys(self.config.l1.quotas, 0)
        for key, chunk in zip(
            hashes := self.l1.hashes(), self.l1.peek(hashes), strict=True
        ):
            assert chunk is not None
            self.charge(key, chunk, used)
            for number, part in chunk.parts.items():
                if chunk.ready >> number & 1:
                    [extent] = part.extents
                    data = self.arena.array[extent.offset :][: extent.length]
                    assert part.name is not None
                    assert data.tobytes() == kv(key, part.name.rank).tobytes()
        reported = {each.space: each.used_bytes for each in self.l1.quotas()}
        assert reported == used

    def charge(self, key: ChunkHash, chunk: Chunk, used: dict[str, int]) -> None:
        """Add a chunk to its account's use; a document's account is its salt's."""
        accounts = {id(a): n for n, a in self.accounts().items()}
        name = accounts.get(id(chunk.account))
        if name is not None:
            used[name] += sum(part.num_bytes for part in chunk.parts.values())
        text = self.texts[key]
        if text.is_document and key not in self.restored:
            salted, of_model = f"salt:{text.salt}", f"model:{MODEL}"
            own = [each for each in (salted, of_model) if each in used]
            assert name == (own[0] if own else None)

    def accounts(self) -> dict[str, QuotaAccount]:
        """Return the accounts that have a quota."""
        order = self.l1._table.quotas
        return order._accounts if order is not None else {}
