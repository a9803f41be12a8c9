"""Instances whose memory is attached asynchronously, and waits for worker events."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from kvcore.config import ServerConfig
from kvcore.copy.memory_transports import TransportTable
from kvcore.cuda.device_interface import OpenedAllocation
from kvcore.cuda.ipc import CudaTransport, export
from kvcore.engine.engine import Engine
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.errors import DeadlineExceeded, HandleError, UnknownInstance
from kvcore.keys import SessionKey, pack_tokens
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import (
    CudaIpc,
    RegisterKVCache,
    RegisterReply,
    Retrieve,
    RetrieveReply,
    Store,
    StoreReply,
    UnregisterKVCache,
)
from kvcore.storage.arena import Arena
from tests.cuda.fake_device_caches import HostCaches
from tests.cuda.fake_gpu import FakeDevice, FakeTimeline, array_at

CHUNK = 16
CACHE_BYTES = 512
GROUP = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, 8), (128, 8, 1)),))
TOKENS = memoryview(pack_tokens(range(2 * CHUNK)))
BLOCKS = (memoryview(pack_tokens([2, 0])),)
KEY = SessionKey("e", "r")


@dataclass
class Bench:
    """An engine with a fake GPU, a worker's memory, and a gate before it is opened."""

    engine: Engine
    worker: FakeDevice
    server: FakeDevice
    gate: Event

    def register(
        self, instance_id: str, client: bytes = b"me", **changes: Any
    ) -> DeferredReply | RegisterReply:
        """Register the worker's cache."""
        address = self.worker.allocate(CACHE_BYTES)
        handle = export(address, CACHE_BYTES, self.worker)
        facts = {name: getattr(handle, name) for name in handle.__struct_fields__}
        return self.engine.register_kv_cache(
            RegisterKVCache(
                instance_id, "e", "m", 1, 0, (CudaIpc(**facts | changes),), (GROUP,)
            ),
            RequestContext(client, os.getpid()),
        )

    def store(
        self, instance_id: str, deadline_ns: int = 0, event: bytes = b""
    ) -> DeferredReply:
        """Store two chunks."""
        request = Store(
            KEY, instance_id, 0, 2 * CHUNK, BLOCKS, tokens=TOKENS, event=event
        )
        return settled(
            self.engine.store(request, RequestContext(b"me", os.getpid(), deadline_ns))
        )

    def never(self) -> bytes:
        """Return the handle of an event that is recorded and never reached."""
        stream, self.event = self.worker.stream(), self.worker.event(shared=True)
        stream.record(self.event)
        self.worker.timeline.streams.remove(stream)
        return self.event.handle()


@pytest.fixture
def bench() -> Iterator[Bench]:
    """An engine and a fake GPU; at the end no memory is open."""
    timeline, gate = FakeTimeline(), Event()
    gate.set()
    worker, server = FakeDevice(timeline), FakeDevice(timeline)
    opening = server.open

    def open_behind_the_gate(handle: bytes) -> OpenedAllocation:
        gate.wait(20)
        return opening(handle)

    server.open = open_behind_the_gate  # type: ignore[method-assign]
    arena = Arena(1 << 16, 4096, f"kvtest-{os.getpid()}-attaching")
    transports = TransportTable(
        {CudaIpc: CudaTransport([server], arena.array, HostCaches)}
    )
    engine = Engine(ServerConfig(chunk_size=CHUNK), arena, transports=transports)
    yield Bench(engine, worker, server, gate)
    gate.set()
    engine.close()
    transports.close()
    assert server.opened == {}
    assert timeline.pinned == set()
    arena.close()


def settled(steps: Iterator[None]) -> DeferredReply:
    """Run a request until it waits for another thread."""
    running = None
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        running = stop.value
    assert isinstance(running, DeferredReply)
    return running


def finish(running: Any) -> Any:
    """Wait for a deferred reply and finish it as the loop does."""
    if not isinstance(running, DeferredReply):
        return running
    assert wait([running.future], 20).done
    return running.finish()


def test_what_is_sent_behind_a_registration_waits_for_it(bench: Bench) -> None:
    """The instance is registered at once; copies wait until its memory is attached."""
    bench.gate.clear()
    registered = bench.register("i")
    stored = bench.store("i")
    assert not stored.future.done()
    bench.gate.set()
    assert isinstance(finish(registered), RegisterReply)
    assert finish(stored) == StoreReply(2, 0, 0)


def test_a_cache_comes_back_as_it_was(bench: Bench) -> None:
    """Stores and retrieves go through the opened memory."""
    finish(bench.register("i"))
    (address,) = bench.worker.allocations
    cache = array_at(address, CACHE_BYTES)
    cache[:] = np.arange(CACHE_BYTES) % 251
    kept = cache.copy()
    finish(bench.store("i"))
    cache[:] = 0
    retrieve = Retrieve(KEY, "i", 0, 2 * CHUNK, BLOCKS, tokens=TOKENS)
    reply = finish(
        settled(bench.engine.retrieve(retrieve, RequestContext(b"me", os.getpid())))
    )
    assert isinstance(reply, RetrieveReply)
    assert len(reply.event) == 64
    blocks = cache.reshape(4, 128)
    assert (blocks[[0, 2]] == kept.reshape(4, 128)[[0, 2]]).all()
    assert not blocks[[1, 3]].any()


def test_memory_that_cannot_be_attached_leaves_no_instance(bench: Bench) -> None:
    """The registration fails, and so do the requests sent after it."""
    bench.gate.clear()
    registered = bench.register("i", offset=1)
    stored = bench.store("i")
    bench.gate.set()
    with pytest.raises(HandleError, match="claims 512 from byte 1"):
        finish(registered)
    with pytest.raises(HandleError):
        finish(stored)
    assert bench.engine.registry.all() == []
    assert bench.engine.l1.stats().num_reserved == 0


def test_a_client_may_die_while_its_memory_is_attached(bench: Bench) -> None:
    """Memory that is opened after its end is closed again."""
    bench.gate.clear()
    registered = bench.register("i")
    bench.engine.end_client(b"me")
    bench.gate.set()
    assert isinstance(finish(registered), RegisterReply)
    assert bench.engine.registry.all() == []


def test_a_client_may_die_while_its_event_is_waited_for(bench: Bench) -> None:
    """The lane stops waiting, and the closer continues with the next instance."""
    finish(bench.register("dead"))
    finish(bench.register("other", b"you"))
    stored = bench.store("dead", event=bench.never())
    bench.engine.end_client(b"me")
    with pytest.raises(UnknownInstance, match="gone"):
        finish(stored)
    running = bench.engine.unregister_kv_cache(
        UnregisterKVCache("other"), RequestContext(b"you", os.getpid())
    )
    finish(running)
    assert bench.server.opened == {}
    assert bench.engine.l1.stats().used_bytes == 0


def test_a_deadline_ends_a_wait(bench: Bench) -> None:
    """A store whose event is not reached before the deadline is aborted."""
    finish(bench.register("i"))
    with pytest.raises(DeadlineExceeded):
        finish(bench.store("i", deadline_ns=1, event=bench.never()))
    assert bench.engine.l1.stats().used_bytes == 0


def test_a_store_reads_what_was_written_before_its_event(bench: Bench) -> None:
    """The worker's queued work runs before the copy."""
    finish(bench.register("i"))
    (address,) = bench.worker.allocations
    stream, event = bench.worker.stream(), bench.worker.event(shared=True)
    source = bench.worker.allocate_host(CACHE_BYTES)
    array_at(source, CACHE_BYTES)[:] = 7
    stream.copy(address, source, CACHE_BYTES)
    stream.record(event)
    finish(bench.store("i", event=event.handle()))
    bench.worker.free_host(source)
    array_at(address, CACHE_BYTES)[:] = 0
    retrieve = Retrieve(KEY, "i", 0, 2 * CHUNK, BLOCKS, tokens=TOKENS)
    finish(settled(bench.engine.retrieve(retrieve, RequestContext(b"me", os.getpid()))))
    assert (array_at(address, CACHE_BYTES).reshape(4, 128)[[0, 2]] == 7).all()


def test_a_client_ends_where_no_thread_can_be_started(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own work needs no new thread, whatever limits their number."""
    reply = bench.register("i")
    if isinstance(reply, DeferredReply):
        wait([reply.future])
        reply.finish()

    def refuse(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", refuse)
        bench.engine.end_client(b"me")
        closed = Event()
        bench.engine.run_after_close(closed.set)
        assert closed.wait(20)
    assert not bench.engine.registry.all()
