"""Copying client against a scripted server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from threading import Event
from typing import Any

import numpy as np
import pytest

from kvcore.errors import (
    BadRequest,
    Closed,
    DeadlineExceeded,
    Unavailable,
    UnknownInstance,
)
from kvcore.extents import Extent, PartLocation
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import (
    Abort,
    ArenaHandle,
    Commit,
    Done,
    Hold,
    HoldReply,
    Ping,
    Pong,
    PosixShm,
    Private,
    RegisterKVCache,
    RegisterReply,
    Release,
    Reserve,
    ReserveReply,
    Store,
    StoreReply,
    UnregisterKVCache,
)
from kvcore.shm import Bytes, Segment
from kvcore.worker.copying_client import CopyingClient
from kvcore.worker.mapped_arena import CopyQueue, HostWorkerMemory, WorkerMemory
from tests.client.test_connection import ScriptedServer, scripted_server

__all__ = ["scripted_server"]

KEY = SessionKey("e", "r")
CHUNK = 64
PART = 2 * 2 * CHUNK * 8
GROUP = CacheGroup(
    axes="LKNSD",
    dtype="uint8",
    block_size=16,
    tensors=(TensorView(0, 0, (2, 2, 4, 16, 8), (1024, 512, 128, 8, 1)),),
)
LOCATIONS = ((PartLocation(0, (Extent(0, PART),)),),)


@pytest.fixture
def arena() -> Iterator[Segment]:
    """An arena of two parts."""
    with Segment.create(f"kvtest-{os.getpid()}-arena", 2 * PART, touch=True) as segment:
        yield segment


@pytest.fixture
def cache() -> Bytes:
    """A cache of one chunk."""
    return np.arange(PART, dtype=np.uint8)


@pytest.fixture
def client(
    scripted_server: ScriptedServer, arena: Segment, cache: Bytes
) -> Iterator[CopyingClient]:
    """A client with a registered instance "i"."""
    memory = PosixShm(arena.name, 0, arena.num_bytes)
    scripted_server.answers |= {
        RegisterKVCache: RegisterReply(("",), PART, ArenaHandle(memory, False)),
        UnregisterKVCache: Done(),
        Reserve: ReserveReply(7, arena.name, LOCATIONS, 0, 0),
        Hold: HoldReply(8, arena.name, LOCATIONS),
        Commit: StoreReply(1, 0, 0),
        Abort: Done(),
    }
    with CopyingClient(scripted_server.address, timeout_s=20) as client:
        request = RegisterKVCache("i", "e", "m", 1, 0, (), (GROUP,))
        client.register_kv_cache(request, (cache,))
        yield client


BLOCKS = ([0, 1, 2, 3],)


def test_registered_handles_are_private(
    scripted_server: ScriptedServer, client: CopyingClient
) -> None:
    """The server gets the size of the memory, and no handle to it."""
    [requests] = [
        one for one in scripted_server.seen if isinstance(one, RegisterKVCache)
    ]
    assert requests.handles == (Private(PART),)


@pytest.mark.parametrize(
    ("method", "ticket_request", "ending"),
    [("store", Reserve, Abort), ("retrieve", Hold, Release)],
)
def test_a_late_ticket_is_ended(
    scripted_server: ScriptedServer,
    client: CopyingClient,
    arena: Segment,
    method: str,
    ticket_request: type[Reserve] | type[Hold],
    ending: type[Abort] | type[Release],
) -> None:
    """Its caller has failed, so no copy will follow."""
    scripted_server.answers[ticket_request] = None
    with pytest.raises(DeadlineExceeded):
        getattr(client, method)(KEY, "i", 0, CHUNK, BLOCKS, timeout_s=0.05)
    before = arena.array.copy()
    kind = ReserveReply if ticket_request is Reserve else HoldReply
    rest = (0, 0) if ticket_request is Reserve else ()
    scripted_server.answer(ticket_request, kind(9, arena.name, LOCATIONS, *rest))
    scripted_server.wait_for(ending)
    assert [one.ticket for one in scripted_server.seen if isinstance(one, ending)] == [
        9
    ]
    assert np.array_equal(arena.array, before)


def test_a_store_to_a_restarted_server_is_not_copied(
    scripted_server: ScriptedServer, client: CopyingClient, arena: Segment
) -> None:
    """The locations belong to an unmapped arena: nothing is written."""
    before = arena.array.copy()
    scripted_server.answers[Reserve] = ReserveReply(
        7, "kvcore-another", LOCATIONS, 0, 0
    )
    with pytest.raises(Unavailable, match="restarted before the copy"):
        client.store(KEY, "i", 0, CHUNK, BLOCKS)
    scripted_server.wait_for(Abort)
    assert np.array_equal(arena.array, before)


def test_an_event_is_rejected(client: CopyingClient) -> None:
    """The event is rejected, since no process would wait for it."""
    with pytest.raises(BadRequest, match="event"):
        client.store(KEY, "i", 0, CHUNK, BLOCKS, event=b"e" * 64)


def test_ending_a_ticket_waits_for_a_full_send_queue(
    scripted_server: ScriptedServer, client: CopyingClient
) -> None:
    """It is sent once the queue has room, and so are the requests before it."""
    scripted_server.is_paused.set()
    pings = [client.submit(Ping(), 20) for _ in range(5000)]
    end = client.submit(Abort(7), 20)
    assert wait([*pings, end], 0.1).not_done
    scripted_server.is_paused.clear()
    assert end.result(20) == Done()
    assert all(ping.result(20) for ping in pings)


def test_ending_a_ticket_is_sent_after_its_deadline(
    scripted_server: ScriptedServer, client: CopyingClient
) -> None:
    """It is sent even after its deadline; otherwise the ticket would leak."""
    scripted_server.is_paused.set()
    requests = [client.submit(Ping(), 0.2) for _ in range(5000)]
    requests.append(client.submit(Abort(7), 0.2))
    wait(requests, 20)
    assert isinstance(requests[-1].exception(), DeadlineExceeded)
    scripted_server.is_paused.clear()
    scripted_server.wait_for(Abort)


def test_a_closed_client_rejects_copies(
    scripted_server: ScriptedServer, client: CopyingClient
) -> None:
    """Later copies fail with `Closed`."""
    assert client.submit_store(KEY, "i", 0, CHUNK, BLOCKS).result(20).num_stored == 1
    client.close()
    with pytest.raises(Closed):
        client.store(KEY, "i", 0, CHUNK, BLOCKS)


def test_a_callback_may_close_while_a_copy_waits_for_a_reply(
    scripted_server: ScriptedServer, client: CopyingClient
) -> None:
    """The thread that closes is the one that would receive the reply."""
    scripted_server.answers[Reserve] = None
    scripted_server.answers[Ping] = None
    store = client.submit_store(KEY, "i", 0, CHUNK, BLOCKS)
    scripted_server.wait_for(Reserve)
    ended = client.submit(Ping(), 20)
    closed = call_when_done(ended, client.close)
    scripted_server.wait_for(Ping, 2)
    scripted_server.answer(Ping, Pong(0))
    assert closed.wait(20)
    with pytest.raises(Closed):
        store.result(20)
    client.close()
    assert not client._caches


def call_when_done(future: Future[Any], call: Callable[[], None]) -> Event:
    """Call a function in a future's callback; return an event set after it."""
    returned = Event()

    def called(_: Future[Any]) -> None:
        call()
        returned.set()

    future.add_done_callback(called)
    return returned


def test_a_restart_during_registration_unmaps_the_arena(
    scripted_server: ScriptedServer, client: CopyingClient, arena: Segment, cache: Bytes
) -> None:
    """Its arena is unmapped even before the registration returns."""
    notify_disconnect = client._connection.reconnect._notify_disconnect
    opened = Event()

    def slow(*args: Any) -> WorkerMemory:
        notify_disconnect()
        opened.set()
        return HostWorkerMemory(*args)

    request = RegisterKVCache("j", "e", "m", 1, 0, (), (GROUP,))
    client.register_kv_cache(request, (cache,), slow)
    assert opened.is_set()
    assert client._caches["j"]._mapped is None
    with pytest.raises(Unavailable, match="restarted before the copy"):
        client.store(KEY, "j", 0, CHUNK, BLOCKS)


def test_an_unregistered_cache_is_not_copied(
    scripted_server: ScriptedServer, client: CopyingClient
) -> None:
    """The client sends the store to the server, which rejects it."""
    client.unregister_kv_cache("i")
    scripted_server.answers[Store] = UnknownInstance("no instance")
    with pytest.raises(UnknownInstance):
        client.store(KEY, "i", 0, CHUNK, BLOCKS)


def test_a_cache_that_cannot_be_opened_is_not_registered(
    scripted_server: ScriptedServer, client: CopyingClient, cache: Bytes
) -> None:
    """The server gets an unregistration, and other instances still work."""

    def broken(*_: object) -> WorkerMemory:
        raise RuntimeError("no such device")

    request = RegisterKVCache("j", "e", "m", 1, 0, (), (GROUP,))
    with pytest.raises(RuntimeError, match="no such device"):
        client.register_kv_cache(request, (cache,), broken)
    assert UnregisterKVCache("j") in scripted_server.seen
    assert client.submit_store(KEY, "i", 0, CHUNK, BLOCKS).result(20).num_stored == 1


def test_a_closed_copy_queue_rejects_copies() -> None:
    """A copy submitted after the unregistration fails."""
    queue = CopyQueue("test")
    queue.close()
    with pytest.raises(UnknownInstance, match="before the submission"):
        queue.submit(lambda: None)


CLOSES_AT_EXIT = """
import atexit, sys
import numpy as np
from kvcore.protocol import RegisterKVCache
from kvcore.worker.copying_client import CopyingClient
from tests.worker.test_copying_client import GROUP, PART

client = CopyingClient(sys.argv[1], timeout_s=20)
atexit.register(client.close)
request = RegisterKVCache("i", "e", "m", 1, 0, (), (GROUP,))
client.register_kv_cache(request, (np.zeros(PART, np.uint8),))
"""


def test_a_client_can_be_closed_while_the_interpreter_exits(
    scripted_server: ScriptedServer, client: CopyingClient
) -> None:
    """Threads cannot start then: the calling thread unmaps the arena."""
    child = subprocess.run(
        [sys.executable, "-c", CLOSES_AT_EXIT, scripted_server.address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (child.returncode, child.stderr) == (0, "")
