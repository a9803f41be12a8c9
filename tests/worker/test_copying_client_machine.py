"""Copying clients under random events, compared with a simple model.

Client and engine are real; only the connection is simulated. After any events, a
readable chunk has the bytes that were stored for it, only retrieves write a cache,
and nothing stays reserved or held when all clients have closed.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcore.client import client as client_module
from kvcore.config import L1Config, ServerConfig, SessionConfig, WireConfig
from kvcore.errors import (
    UnknownTicket,
)
from kvcore.extents import buffers_of
from kvcore.option_structs import ByteSize
from kvcore.protocol import (
    Abort,
    Clear,
    Commit,
    EndSession,
    Lookup,
    Release,
)
from kvcore.storage.chunk import Chunk
from kvcore.worker import copying_client, mapped_arena
from kvcore.worker.mapped_arena import MappedCache
from tests.engine.engine_model import (
    CHUNK,
    IDENTS,
    LEASE_S,
    MAX_CHUNKS,
    PAGE,
    Ident,
    PartOf,
    content,
    extras_of,
    tokens_of,
)
from tests.worker.copying_fixture import (
    CopyingFixture,
    ManualConnection,
    Message,
    PausedCopier,
)
from tests.worker.copying_workers import MODEL, Call, Worker, key_of

PROMPTS = range(4)

picks = st.integers(0, 1000)
workers_at = st.integers(0, 1)


class CopyingMachine(RuleBasedStateMachine):
    """Rules drive all clients, messages and the clock."""

    @initialize(
        num_pages=st.integers(2, 10),
        verify=st.booleans(),
        quota=st.sampled_from([0, 0, PAGE, 3 * PAGE]),
    )
    def build(self, num_pages: int, verify: bool, quota: int) -> None:
        """Start a server and two workers of one rank."""
        quotas = {f"model:{MODEL}": ByteSize(quota)} if quota else {}
        config = ServerConfig(
            chunk_size=CHUNK,
            l1=L1Config(verify=verify, quotas=quotas, engine_share=1.0),
            wire=WireConfig(slice_chunks=1),
            sessions=SessionConfig(lease_s=LEASE_S, idle_s=30.0, max_sessions=3),
        )
        self.fixture = CopyingFixture(config, num_pages)
        self.ended: list[tuple[ManualConnection, int]] = []
        self.fixture.on_answer.append(self.on_answer)
        self.corrupted: set[int] = set()
        self.kept: list[Chunk] = []
        """Keeps corrupted chunks alive, so that their ids stay unique."""
        fixture, waits = self.fixture, MappedCache.mapped

        def mapped(cache: MappedCache, arena: str) -> Any:
            return fixture.mapped(cache, arena, waits)

        self.patches = [
            mock.patch.object(client_module, "Connection", ManualConnection),
            mock.patch.object(copying_client, "monotonic_ns", fixture.now_ns),
            mock.patch.object(mapped_arena, "ChunkCopier", PausedCopier),
            mock.patch.object(MappedCache, "mapped", mapped),
        ]
        for patch in self.patches:
            patch.start()
        self.workers = [Worker(f"w{at}") for at in range(2)]

    def on_answer(self, message: Message) -> None:
        """Record ended tickets."""
        if isinstance(message.request, Commit | Abort | Release):
            self.ended.append((message.connection, message.request.ticket))

    # -- rules: calls -----------------------------------------------------------------

    @rule(
        at=workers_at,
        prompt=st.sampled_from(PROMPTS),
        start=st.integers(0, MAX_CHUNKS - 1),
        num_chunks=st.integers(1, MAX_CHUNKS),
        skip=st.integers(0, CHUNK + 1),
        kind=st.sampled_from(["store", "retrieve"]),
        timeout_s=st.sampled_from([20.0, 20.0, 3.0]),
        has_null=st.booleans(),
        num_steps=st.integers(0, 6),
    )
    def begin(
        self,
        at: int,
        prompt: int,
        start: int,
        num_chunks: int,
        skip: int,
        kind: str,
        timeout_s: float,
        has_null: bool,
        num_steps: int,
    ) -> None:
        """A worker starts a store or retrieve and runs some steps."""
        worker = self.workers[at]
        end = min(start + num_chunks, MAX_CHUNKS)
        call = Call(kind, prompt, start, end, skip, timeout_s, has_null)
        if worker.begin(call):
            self.run_steps(worker, call, num_steps)

    def run_steps(self, worker: Worker, call: Call, num_steps: int) -> None:
        """Run up to `num_steps` steps, unless another strand is copying."""
        for _ in range(num_steps):
            is_blocked = {*self.fixture.copying} - {call.strand}
            if is_blocked or call.future.done():
                return
            self.fixture.settle()
            worker.resume(call)

    @precondition(lambda self: self.fixture.wire)
    @rule(pick=picks, times=st.integers(1, 3))
    def deliver(self, pick: int, times: int) -> None:
        """The server receives messages."""
        for _ in range(times):
            if self.fixture.wire:
                self.fixture.deliver(pick)

    @precondition(lambda self: self.fixture.in_flight)
    @rule(times=st.integers(1, 3))
    def slice(self, times: int) -> None:
        """The server processes slices."""
        for _ in range(times):
            self.fixture.loop.step()
        self.fixture.loop.look_around()

    @precondition(lambda self: self.running_calls())
    @rule(pick=picks, times=st.integers(1, 4))
    def resume(self, pick: int, times: int) -> None:
        """A call resumes."""
        for _ in range(times):
            busy = self.running_calls()
            if busy:
                worker, call = busy[pick % len(busy)]
                worker.resume(call)

    def running_calls(self) -> list[tuple[Worker, Call]]:
        """Return the running calls."""
        return [(w, call) for w in self.workers for call in w.calls.values()]

    @precondition(lambda self: self.running_calls())
    @rule(pick=picks)
    def finish(self, pick: int) -> None:
        """One call runs to its end; the others stay paused."""
        worker, call = self.running_calls()[pick % len(self.running_calls())]
        self.run_steps(worker, call, 100)

    @precondition(lambda self: self.running_calls())
    @rule()
    def drain(self) -> None:
        """All calls end and no ticket remains."""
        while self.fixture.wire or self.running_calls():
            self.fixture.settle()
            for worker, call in self.running_calls():
                worker.resume(call)
        self.fixture.settle()
        assert self.fixture.tickets.num_tickets() == 0
        assert self.fixture.engine.l1.stats().num_reserved == 0

    # -- rules: faults and other requests ---------------------------------------------

    @precondition(lambda self: self.running_calls())
    @rule(pick=picks, what=st.sampled_from(["time", "late", "kill", "restart"]))
    def inject_fault(self, pick: int, what: str) -> None:
        """Advance time, kill a worker, restart the server or expire a request."""
        waiting = [*self.fixture.wire, *self.fixture.in_flight.values()]
        if what == "kill":
            worker, _ = self.running_calls()[pick % len(self.running_calls())]
            self.kill(self.workers.index(worker), pick % 3)
        elif what == "restart":
            self.ended.clear()
            self.fixture.restart([bool(pick & 1), bool(pick & 2)])
        elif what == "late" and waiting:
            self.fixture.expire(waiting[pick % len(waiting)])
        else:
            self.fixture.now += (1.0, 5.0, 11.0, 31.0)[pick % 4]
            self.fixture.engine.expire()

    def kill(self, at: int, num_delivered: int) -> None:
        """Kill a worker; some of its messages still arrive."""
        worker = self.workers[at]
        connection = worker.connection
        connection.is_dead = True
        for call in [*worker.calls.values()]:
            assert call.strand is not None
            self.fixture.killed.add(call.strand)
            worker.resume(call)
            assert call.kind not in worker.calls
        for message in self.fixture.messages_of(connection)[:num_delivered]:
            if message in self.fixture.wire:
                self.fixture.receive(message)
        self.fixture.disconnect(connection)
        worker.client.close()
        self.workers[at] = Worker(worker.name)

    @rule(
        at=workers_at,
        prompt=st.sampled_from(PROMPTS),
        what=st.sampled_from(["look up", "look up", "end", "clear"]),
    )
    def ask(self, at: int, prompt: int, what: str) -> None:
        """Send a request of a scheduler or an operator."""
        key, end = key_of(prompt), MAX_CHUNKS * CHUNK
        tokens = tokens_of(prompt, 0, end)
        requests = {
            "look up": Lookup(key, MODEL, 1, end, tokens, 0, extras_of(prompt)),
            "end": EndSession(key),
            "clear": Clear(),
        }
        self.workers[at].client.submit(requests[what])

    @precondition(lambda self: self.fixture.config.l1.verify)
    @rule(pick=picks)
    def corrupt(self, pick: int) -> None:
        """Change a byte of a readable chunk; its next reader detects it."""
        l1 = self.fixture.engine.l1
        chunks = [c for c in l1.peek(l1.hashes()) if c is not None and c.ready]
        if chunks:
            chunk = chunks[pick % len(chunks)]
            for part in chunk.parts.values():
                self.fixture.arena.array[part.extents[0].offset] ^= 1
            self.corrupted ^= {id(chunk)}
            self.kept.append(chunk)

    @precondition(lambda self: self.ended)
    @rule(pick=picks, kind=st.sampled_from([Commit, Abort, Release]))
    def end_ticket_twice(self, pick: int, kind: type[Commit | Abort | Release]) -> None:
        """Ending a ticket twice fails with `UnknownTicket`."""
        connection, number = self.ended[pick % len(self.ended)]
        client = self.workers[pick % 2].client
        if not connection.is_dead:
            client = next(w.client for w in self.workers if w.connection is connection)
        future = client.submit(kind(number))
        self.fixture.settle()
        assert isinstance(future.exception(), UnknownTicket)

    @rule(at=workers_at)
    def register_again(self, at: int) -> None:
        """Replace a cache that is not being copied."""
        worker = self.workers[at]
        if not worker.calls:
            worker.register()

    # -- invariants -------------------------------------------------------------------

    @invariant()
    def readable_chunks_are_correct(self) -> None:
        """Every readable chunk has the stored bytes."""
        if not hasattr(self, "workers"):
            return
        l1 = self.fixture.engine.l1
        l1.check()
        hashes = [key for key, ident in IDENTS.items() if is_test_chunk(ident)]
        for key, chunk in zip(hashes, l1.peek(hashes), strict=True):
            if chunk is None or not chunk.ready or id(chunk) in self.corrupted:
                continue
            for part in chunk.parts.values():
                data = buffers_of(self.fixture.arena.array.data, part.extents)
                expected = content(IDENTS[key], PartOf(0, 0, 0)).tobytes()
                assert b"".join(data) == expected

    def teardown(self) -> None:
        """Nothing remains after all clients have closed."""
        if not hasattr(self, "workers"):
            return
        try:
            self.drain()
            for worker in self.workers:
                worker.client.close()
            self.check_idle()
        finally:
            self.fixture.close()
            for patch in self.patches:
                patch.stop()

    def check_idle(self) -> None:
        """Assert that nothing is held, reserved or leased."""
        engine = self.fixture.engine
        assert all(s.num_running == 0 for s in engine.sessions._sessions.values())
        self.fixture.now += 100
        engine.expire()
        stats = engine.l1.stats()
        assert (stats.num_held, stats.num_reserved) == (0, 0)
        assert (len(engine.sessions), len(engine.leases)) == (0, 0)
        engine.l1.drop(engine.l1.hashes())
        assert self.fixture.arena.used_bytes == 0


def is_test_chunk(ident: Ident) -> bool:
    """Return whether a chunk can be stored by this test."""
    return (ident.model, ident.world_size) == (MODEL, 1)


TestCopyingMachine = CopyingMachine.TestCase
"""Correct bytes and no leaks after any events."""
TestCopyingMachine.settings = settings(
    max_examples=4 * settings().max_examples, stateful_step_count=50
)
