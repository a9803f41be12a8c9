"""A blend engine in one process, whose every step a test takes when it wants to."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from threading import Event
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from kvcore.blend import engine as blend_engine
from kvcore.blend import lookups as blend_lookups
from kvcore.blend import matchers
from kvcore.blend.engine import BlendEngine
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
from kvcore.engine.engine import Caller, Engine, Running
from kvcore.engine.instance import Instance
from kvcore.errors import ChunksMissing, KVError
from kvcore.keys import ChunkHash, ExtraKey, HashChain, chain_seed, pack_tokens
from kvcore.options import ByteSize
from kvcore.protocol import CBRegisterKVCache, PosixShm
from kvcore.shm import Segment
from kvcore.storage.arena import Arena
from kvcore.storage.coordinator import Call, Coordinator, Timer
from tests.storage.played import PlayedTier

SIZE = 4
"""Tokens a chunk."""
SLOTS = 64
SHAPE = (2, 2, SLOTS, 4)
PART_BYTES = 64
"""One page."""
MODEL = "m"
START, END = 8, 9
"""Marks around a paragraph."""

Buffer = npt.NDArray[np.uint8]
COORDINATOR = "kvcore.storage.manager.Coordinator"
_numbers = count()


def kv(key: ChunkHash, rank: int) -> Buffer:
    """The KV of a chunk on a rank, `[2, 2, SIZE, 4]`: of this chunk and no other."""
    data = blake2b(key + bytes([rank]), digest_size=PART_BYTES).digest()
    return np.frombuffer(data, np.uint8).reshape(2, 2, SIZE, 4)


@dataclass
class Lane:
    """Copies of one direction, each made when the test says so."""

    queue: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = field(
        default_factory=list
    )

    def submit(self, call: Callable[..., Any], *args: Any, **named: Any) -> Future[Any]:
        """Queue a copy."""
        future: Future[Any] = Future()
        args = (*args, named)
        self.queue.append((future, call, args))
        return future

    def shutdown(self, **_: bool) -> None:
        """Drop what is queued; nothing runs meanwhile."""
        for future, _, _ in self.queue:
            future.cancel()
            future.set_running_or_notify_cancel()
        self.queue.clear()


class Stepped(Coordinator):
    """Runs what was posted when told; no call of it may fail."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.errors: list[Exception] = []
        clock = self.clock
        self.ahead = 0.0
        self.clock = lambda: clock() + self.ahead

    def start(self) -> None:
        """Begin no thread."""

    def post(self, call: Call) -> None:
        """Have a call run at the next `run_due`."""
        super().post(lambda: self._try(call))

    def at(self, when: float, call: Call) -> Timer:
        """Have a call run at the first `run_due` after a time."""
        return super().at(when, lambda: self._try(call))

    def _try(self, call: Call) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - told when the test looks
            self.errors.append(error)


@dataclass(frozen=True)
class Text:
    """A chunk of a document, or of a prompt in the normal space, from its start on."""

    is_document: bool
    salt: str
    tokens: tuple[int, ...]


def extras_of(salt: str, image: int | None = None) -> tuple[ExtraKey, ...]:
    """Material of a whole prompt, and of an image in it."""
    extras = [ExtraKey(0, b'["salt", "%s"]' % salt.encode())] if salt else []
    return (*extras, *([ExtraKey(image, b"image")] if image is not None else []))


def packed(tokens: Sequence[int]) -> memoryview:
    """Tokens as the wire has them."""
    return memoryview(pack_tokens(np.array(tokens, np.uint32)))


@dataclass(eq=False)
class Asked:
    """A request under way."""

    kind: str
    client: str
    steps: Generator[None, None, Any] | None
    tokens: tuple[int, ...] = ()
    """Of the prompt, as far as it is searched."""
    salt: str = ""
    session: Any = None
    instance: Instance | None = None
    request: Any = None
    running: Running | None = None
    copied: Sequence[ChunkHash] = ()
    """What its copy reads or writes."""
    lease: Any = None
    """Under which it reads."""
    reply: Any = None
    error: KVError | None = None
    is_over: bool = False
    is_void: bool = False
    """Its session ended or looked up anew, or its client is gone."""


class House:
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
    ) -> None:
        config = ServerConfig(
            chunk_size=SIZE,
            blend=BlendConfig(
                matcher="separated" if matcher == "separated" else "anywhere",
                start=() if matcher == "anywhere" else ((START,),),
                end=() if matcher == "anywhere" else ((END,),),
                max_tier_chunks=max_tier_chunks,
            ),
            l1=L1Config(size=ByteSize(num_pages << 12), page=ByteSize(1 << 12)),
            wire=WireConfig(slice_chunks=1),
            sessions=SessionConfig(lease_s=60, idle_s=600),
            prefetch=PrefetchConfig(deadline_s=600, max_jobs=max_jobs),
            write_back=WriteBackConfig(policy=policy, watermark=0.5),
        )
        self.now = 0.0
        self.world_size = world_size
        self.texts: dict[ChunkHash, Text] = {}
        """What any stored chunk is of."""
        self.asked: list[Asked] = []
        self.look_at: Callable[[Asked], None] = lambda _: None
        """Told after every step of a request."""
        self.buffers: dict[int, Segment] = {}
        self.tiers = [PlayedTier(f"t{i}") for i in range(num_tiers)]
        self.coordinator = Stepped("test")
        self.arena = Arena(num_pages * PART_BYTES, PART_BYTES)
        self._small = small_steps()
        with ExitStack() as stack:
            patch = stack.enter_context
            patch(mock.patch(COORDINATOR, return_value=self.coordinator))
            if collide:  # A window's hash is the sum of its tokens.
                patch(mock.patch("secrets.randbits", return_value=1))
            self.engine = Engine(config, self.arena, lambda: self.now, self.tiers)
            self.blend = BlendEngine(config, self.engine)
        self.l1 = self.engine.l1
        for rank in range(world_size):
            name = f"kvtest-{os.getpid()}-blend-{next(_numbers)}"
            self.buffers[rank] = Segment.create(name, int(np.prod(SHAPE)), touch=False)
            self.register(rank)

    def close(self) -> None:
        """Let go of everything."""
        self._small.close()
        self.engine.close()
        self.blend.close()
        self.arena.close()
        for segment in self.buffers.values():
            segment.unlink()
            segment.close()

    # -- registration -----------------------------------------------------------------

    def caller(self, client: str) -> Caller:
        """A client: "s", the scheduler, or "w0" and "w1"."""
        return Caller(client, os.getpid())

    def register(self, rank: int) -> Instance:
        """Register a rank's buffer, in place of what is there."""
        segment = self.buffers[rank]
        request = CBRegisterKVCache(
            f"i{rank}",
            "e",
            MODEL,
            self.world_size,
            rank,
            PosixShm(segment.name, 0, segment.num_bytes),
            SHAPE,
            "uint8",
        )
        self.blend.cb_register_kv_cache(request, self.caller(f"w{rank}"))
        self.await_closed()
        instance = self.engine.registry.get(f"w{rank}", f"i{rank}")
        instance.store_lane = Lane()  # type: ignore[assignment]
        instance.retrieve_lane = Lane()  # type: ignore[assignment]
        return instance

    def instance(self, rank: int) -> Instance | None:
        """A rank's instance, if it is registered."""
        return self.engine.registry.instances.get(f"i{rank}")

    def buffer(self, rank: int) -> Buffer:
        """A rank's buffer."""
        array: Buffer = self.buffers[rank].array.reshape(SHAPE)
        return array

    def await_closed(self) -> None:
        """Wait until the buffers that went are unmapped and their copies dropped."""
        closed = Event()
        self.engine.do_behind(closed.set)
        assert closed.wait(20)

    # -- requests ---------------------------------------------------------------------

    def ask(self, handler: Callable[..., Any], asked: Asked) -> Asked:
        """Begin a request, of which nothing is done yet."""
        caller = self.caller(asked.client)

        def steps() -> Generator[None, None, Any]:
            return (yield from handler(asked.request, caller))

        asked.steps = steps()
        self.asked.append(asked)
        return asked

    def space(self, salt: str) -> DocumentSpace:
        """The documents of a salt."""
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
        """Note what chunks that may be stored will be of."""
        hashes = self.hashes(tokens, salt, is_document=is_document)
        for number, key in enumerate(hashes, 1):
            text = Text(is_document, salt, tuple(tokens[: number * SIZE]))
            assert self.texts.setdefault(key, text) == text

    def advance(self, asked: Asked) -> None:
        """Take one step of a request: a slice, its copy, a tier's answer, its end."""
        try:
            self._advance(asked)
        except KVError as error:
            asked.error = error
            self._end(asked, None)
        self.look_at(asked)

    def _advance(self, asked: Asked) -> None:
        if asked.steps is None:
            assert asked.running is not None
            if asked.running.future.done():
                self._end(asked, asked.running.finish())
            else:
                self._further(asked)
            return
        try:
            next(asked.steps)
        except StopIteration as stop:
            asked.steps = None
            if not isinstance(stop.value, Running):
                self._end(asked, stop.value)
                return
            asked.running = stop.value
            for _, lane in self._lanes(asked):
                asked.copied = lane.queue[-1][2][1]

    def _end(self, asked: Asked, reply: Any) -> None:
        asked.reply = reply
        asked.is_over = True
        self.asked.remove(asked)

    def _further(self, asked: Asked) -> None:
        """Bring on what a request waits for."""
        lanes = self._lanes(asked)
        if lanes:
            self.copy(*lanes[0])
            return
        self.coordinator.run_due()
        if asked.running and asked.running.future.done():
            return
        pending = [tier for tier in self.tiers if tier.pending]
        assert pending, "nothing is under way that could end this"
        pending[0].answer(0)
        self.coordinator.run_due()

    def _lanes(self, asked: Asked) -> list[tuple[Instance, Lane]]:
        lanes: list[tuple[Instance, Any]] = []
        if asked.instance is not None and asked.running is not None:
            both = (asked.instance.store_lane, asked.instance.retrieve_lane)
            lanes = [
                (asked.instance, lane)
                for lane in both
                if any(asked.running.future is each[0] for each in lane.queue)  # type: ignore[attr-defined]
            ]
        return lanes

    def copy(self, instance: Instance, lane: Lane) -> None:
        """Make the first copy of a lane, and look at every byte of the buffer."""
        future, call, (*args, named) = lane.queue.pop(0)
        if not future.set_running_or_notify_cancel():
            return
        buffer = self.buffer(instance.rank)
        hashes, [rows] = args[1:3]
        before = np.full(SHAPE, next(_numbers) % 251, np.uint8)
        buffer[:] = before
        written = before.copy()
        for key, row in zip(hashes, rows, strict=True):
            written[:, :, row] = kv(key, instance.rank)
        is_store = call.__name__ == "store"
        if is_store:
            before = written
            buffer[:] = written
        missing = not is_store and not self.are_there(hashes, instance)
        try:
            future.set_result(call(*args, **named))
        except KVError as error:
            future.set_exception(error)
        failed = future.exception()
        assert isinstance(failed, ChunksMissing) == missing
        assert np.array_equal(buffer, before if is_store or failed else written)

    def are_there(self, hashes: Sequence[ChunkHash], instance: Instance) -> bool:
        """Say whether L1 has a rank's part of every chunk."""
        bit = 1 << instance.groups[0].part
        return all(chunk and chunk.ready & bit for chunk in self.l1.peek(hashes))

    def drive(self, asked: Asked) -> None:
        """Take a request to its end; others go on when it may wait for them."""
        for number in count(1):
            if asked.is_over:
                return
            self.advance(asked)
            if number % 40 == 0:
                for other in [each for each in self.asked if each is not asked]:
                    self.advance(other)

    def finish_all(self) -> None:
        """Have everything that is under way end."""
        while self.asked:
            self.drive(self.asked[0])
        self.answer_tiers()

    def answer_tiers(self) -> None:
        """Have tiers answer all that they are asked."""
        self.coordinator.run_due()
        while any(tier.pending for tier in self.tiers):
            for tier in self.tiers:
                tier.answer_all()
            self.coordinator.run_due()

    def needs(self) -> int:
        """The mask of all ranks' parts; 0 while not all are registered."""
        if any(self.instance(rank) is None for rank in range(self.world_size)):
            return 0
        return self.engine.registry.lookup(MODEL, self.world_size)[1].full

    # -- what always holds ------------------------------------------------------------

    def check(self) -> None:
        """L1 is consistent, and each byte in it is of its chunk and rank."""
        self.l1.check()
        assert self.coordinator.errors == []
        for key, chunk in zip(
            hashes := self.l1.hashes(), self.l1.peek(hashes), strict=True
        ):
            assert chunk is not None
            for number, part in chunk.parts.items():
                if chunk.ready >> number & 1:
                    [extent] = part.extents
                    data = self.arena.array[extent.offset :][: extent.length]
                    assert part.name is not None
                    assert data.tobytes() == kv(key, part.name.rank).tobytes()


def small_steps() -> ExitStack:
    """Have the engine yield where only longer prompts would make it."""
    stack = ExitStack()
    for place, name, number in (
        (matchers, "MATCH_STEP", 2),
        (blend_engine, "MATCH_STEP", 2),
        (matchers, "SLICE_WINDOWS", 8),
        (blend_lookups, "ACQUIRE_CHUNKS", 3),
        (lookups, "ACQUIRE_CHUNKS", 2),
    ):
        stack.enter_context(mock.patch.object(place, name, number))
    return stack
