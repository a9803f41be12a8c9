"""Tickets of workers that copy: their pages, and what ends them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    DeadlineExceeded,
    HandleError,
    KVError,
    UnknownTicket,
)
from kvcore.keys import SessionKey
from kvcore.protocol import (
    Abort,
    Commit,
    Hold,
    Private,
    RegisterKVCache,
    Release,
    Reserve,
    Retrieve,
    Store,
)
from kvcore.shm import SHM_DIR
from kvcore.storage.recovery import arena_name
from tests.system.conftest import Prompt
from tests.system.server_fixture import (
    CHUNK,
    Server,
    connect,
    process_state,
    wait_until,
)
from tests.system.worker_process import LARGE, PLAIN, POISON, Cache, Worker

NUM_CHUNKS = 4
SIZE = NUM_CHUNKS * CHUNK
BLOCKS = list(range(4 * NUM_CHUNKS))


@pytest.fixture(scope="module")
def driver() -> str:
    """Select workers that copy."""
    return "worker"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server with room for 12 chunks of 8 MiB."""
    server = serve("--l1-size", "96MiB", "--set", "l1.page=64KiB")
    yield server
    server.close()


def pack(blocks: list[int]) -> tuple[memoryview]:
    """Return block ids in their wire form."""
    return (memoryview(np.array(blocks, "<i4").tobytes()),)


def pack_tokens(tokens: list[int]) -> memoryview:
    """Return tokens in their wire form."""
    return memoryview(np.array(tokens, "<u4").tobytes())


@pytest.fixture
def private(client: KVClient, model: str) -> Iterator[str]:
    """An instance of the test's client, which sends the requests."""
    cache = Cache(None, PLAIN, 64)
    handles = (Private(cache.memory.nbytes),)
    name = f"own-{model}"
    client.register_kv_cache(
        RegisterKVCache(name, "engine", model, 1, 0, handles, cache.groups)
    )
    yield name
    client.unregister_kv_cache(name)


def reserve(name: str, session: SessionKey, tokens: list[int]) -> Reserve:
    """Reserve pages for all chunks of a prompt."""
    packed = pack_tokens(tokens)
    blocks = pack(BLOCKS[: len(tokens) // 16])
    return Reserve(Store(session, name, 0, len(tokens), blocks, packed))


def hold(name: str, session: SessionKey, tokens: list[int]) -> Hold:
    """Hold all chunks of a prompt."""
    packed = pack_tokens(tokens)
    blocks = pack(BLOCKS[: len(tokens) // 16])
    return Hold(Retrieve(session, name, 0, len(tokens), blocks, 0, packed))


def state(client: KVClient) -> tuple[int, int, int]:
    """Return the numbers of tickets, parts being written and chunks held."""
    status = client.status()
    return (status.num_tickets, status.l1.num_reserved, status.l1.num_leased)


def test_a_ticket_ends_once(
    client: KVClient, private: str, session: SessionKey, prompt: Prompt
) -> None:
    """Commit, abort or release ends it; then, and to other clients, it is unknown."""
    tokens = prompt(2 * CHUNK)
    reserved = client.call(reserve(private, session, tokens))
    assert state(client) == (1, 2, 0)
    [shown] = client.status().tickets
    assert (shown.instance_id, shown.kind, shown.num_parts) == (private, "reserved", 2)
    assert shown.age_s >= 0
    with connect(client.address) as other, pytest.raises(UnknownTicket):
        other.call(Commit(reserved.ticket))
    with pytest.raises(UnknownTicket):
        client.call(Release(reserved.ticket))
    assert client.call(Commit(reserved.ticket)).num_stored == 2
    for end in (Commit, Abort):
        with pytest.raises(UnknownTicket, match="has ended"):
            client.call(end(reserved.ticket))
    held = client.call(hold(private, session, tokens))
    assert [shown.kind for shown in client.status().tickets] == ["held"]
    assert held.parts == reserved.parts
    assert client.call(Release(held.ticket)).num_tokens == 0
    with pytest.raises(UnknownTicket):
        client.call(Release(held.ticket))
    assert state(client) == (0, 0, 0)


def test_only_a_read_takes_the_rank_off_the_lease(
    client: KVClient, private: str, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """A worker that could not read may try again under the same lease."""
    tokens = prompt(CHUNK)
    client.call(Commit(client.call(reserve(private, session, tokens)).ticket))
    assert client.lookup(session, model, 1, tokens).num_chunks == 1
    client.call(Release(client.call(hold(private, session, tokens)).ticket))
    assert client.status().num_leases == 1
    before = client.status().counters["bytes_retrieved"]
    held = client.call(hold(private, session, tokens))
    assert client.call(Release(held.ticket, 77)).num_tokens == CHUNK
    assert client.status().num_leases == 0
    assert client.status().counters["bytes_retrieved"] - before == 77


def test_what_is_there_needs_no_ticket(
    client: KVClient, private: str, session: SessionKey, prompt: Prompt
) -> None:
    """Present parts, parts that another client writes, and empty stores."""
    tokens = prompt(CHUNK)
    first = client.call(reserve(private, session, tokens))
    again = client.call(reserve(private, session, tokens))
    assert (again.ticket, again.num_present, again.parts) == (None, 1, ())
    client.call(Abort(first.ticket))
    none = client.call(Reserve(Store(session, private, 0, 5, pack([0]))))
    assert (none.ticket, none.num_present, none.num_dropped) == (None, 0, 0)
    none = client.call(Hold(Retrieve(session, private, 0, 0, pack([]))))
    assert none.ticket is None


def test_each_driver_has_its_requests(
    client: KVClient,
    private: str,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """STORE of a private instance is refused, and RESERVE of another."""
    store = reserve(private, session, prompt(CHUNK)).store
    with pytest.raises(BadRequest, match="is private: its worker copies"):
        client.call(store)
    cache = Cache(f"kvtest-{os.getpid()}-shared", PLAIN, 64)
    client.register_kv_cache(
        RegisterKVCache("s", "engine", model, 1, 0, cache.handles, cache.groups)
    )
    try:
        with pytest.raises(BadRequest, match="is not private: the server copies"):
            client.call(reserve("s", session, prompt(CHUNK)))
        mixed = (*cache.handles, Private(64))
        with pytest.raises(HandleError, match="all of one kind"):
            client.call(
                RegisterKVCache("m", "engine", model, 1, 0, mixed, cache.groups)
            )
    finally:
        client.unregister_kv_cache("s")
        cache.close()


def test_a_reservation_outlives_its_instance_but_is_not_kept(
    client: KVClient, private: str, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """It keeps its pages until it ends; then none of its chunks is found."""
    tokens = prompt(CHUNK)
    reserved = client.call(reserve(private, session, tokens))
    cache = Cache(None, PLAIN, 64)
    handles = (Private(cache.memory.nbytes),)
    again = RegisterKVCache(private, "engine", model, 1, 0, handles, cache.groups)
    client.call(again)
    assert state(client) == (1, 1, 0)
    with pytest.raises(KVError, match="unregistered"):
        client.call(Commit(reserved.ticket))
    assert state(client) == (0, 0, 0)
    assert client.lookup(session, model, 1, tokens).num_chunks == 0


def test_a_client_that_ends_nothing_gets_no_more(
    serve: Callable[..., Server], prompt: Prompt
) -> None:
    """The number of its tickets is bounded; ending some makes room."""
    server = serve("--set", "wire.max_requests_per_client=4")
    cache = Cache(None, PLAIN, 64)
    handles = (Private(cache.memory.nbytes),)
    key = SessionKey("engine", "greedy")
    with connect(server.address) as client:
        client.register_kv_cache(
            RegisterKVCache("i", "engine", "m", 1, 0, handles, cache.groups)
        )
        tickets = [
            client.call(reserve("i", key, prompt(CHUNK))).ticket for _ in range(4)
        ]
        with pytest.raises(KVError, match="4 tickets of this client"):
            client.call(reserve("i", key, prompt(CHUNK)))
        client.call(Abort(tickets[0]))
        assert client.call(reserve("i", key, prompt(CHUNK))).ticket
    with connect(server.address) as client:
        wait_until(lambda: state(client) == (0, 0, 0))
    server.close()


# -- a stopped or killed worker ------------------------------------------------------


@pytest.fixture
def pair(workers: list[Worker], model: str, client: KVClient) -> list[Worker]:
    """Two workers with a large cache of the model each, "a" filled."""
    client.clear()
    for worker, name in zip(workers, "ab", strict=True):
        worker.call("register", name, model, LARGE, num_blocks=len(BLOCKS))
    workers[0].call("fill", "a", BLOCKS)
    return workers


def freeze(worker: Worker) -> None:
    """Send SIGSTOP and wait until the process is stopped."""
    pid = worker.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: process_state(pid) == "T")


def test_a_stopped_worker_keeps_its_pages_and_nothing_else(
    pair: list[Worker], client: KVClient, model: str, prompt: Prompt
) -> None:
    """It writes only its reserved pages, late, then aborts; others continue."""
    first, second = pair
    slow, key = SessionKey("engine", "slow"), SessionKey("engine", "quick")
    tokens, others = prompt(SIZE), prompt(12 * CHUNK)
    first.call("pause_copy", "gather")
    first.call(
        "begin", "s", "submit_store", slow, "a", 0, SIZE, [BLOCKS], tokens,
        timeout_s=0.5,
    )  # fmt: skip
    wait_until(lambda: first.call("is_copy_paused"))
    freeze(first)
    try:
        assert [shown.kind for shown in client.status().tickets] == ["reserved"]
        second.call("fill", "b", BLOCKS, seed=7)
        written = second.call("digest", "b", BLOCKS)
        stored = second.call("store", key, "b", 0, 12 * CHUNK, [BLOCKS * 3], others)
        assert (stored.num_stored, stored.num_dropped) == (8, 4)
        wait_until(lambda: client.status().tickets[0].age_s > 0.6)
        assert state(client)[:2] == (1, NUM_CHUNKS)
    finally:
        os.kill(first.process.pid or 0, signal.SIGCONT)
    first.call("resume_copy")
    with pytest.raises(DeadlineExceeded, match="nothing was kept"):
        first.call("result", "s")
    wait_until(lambda: state(client)[:2] == (0, 0))
    assert client.lookup(slow, model, 1, tokens).num_chunks == 0
    for start in (0, 4 * CHUNK):
        second.call("poison", "b", BLOCKS)
        second.call("retrieve", key, "b", start, start + SIZE, [BLOCKS], others)
        assert second.call("digest", "b", BLOCKS) == written
    for session in (slow, key):
        client.end_session(session)


def test_a_retrieve_that_has_not_begun_ends_in_time(
    pair: list[Worker],
    server: Server,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """The stopped server does not write, and the worker has not begun."""
    worker, tokens = pair[0], prompt(SIZE)
    worker.call("store", session, "a", 0, SIZE, [BLOCKS], tokens)
    worker.call("poison", "a", BLOCKS)
    client.lookup(session, model, 1, tokens)
    poisoned = worker.call("digest", "a", BLOCKS)
    server.pause()
    try:
        with pytest.raises(DeadlineExceeded):
            worker.call("retrieve", session, "a", 0, SIZE, [BLOCKS], timeout_s=0.1)
        assert worker.call("digest", "a", BLOCKS) == poisoned
    finally:
        server.resume()


@pytest.mark.parametrize("step", ["gather", "scatter"])
def test_the_death_of_a_worker_ends_its_tickets(
    pair: list[Worker],
    start_worker: Callable[[str], Worker],
    server: Server,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
    step: str,
) -> None:
    """Killed in the middle of a copy: its reserved or held pages are free again."""
    tokens = prompt(SIZE)
    if step == "scatter":
        pair[0].call("store", session, "a", 0, SIZE, [BLOCKS], tokens)
    victim = start_worker(server.address)
    victim.receive()
    victim.call("register", "v", model, LARGE, num_blocks=len(BLOCKS))
    victim.call("pause_copy", step)
    method = "submit_store" if step == "gather" else "submit_retrieve"
    victim.call("begin", "c", method, session, "v", 0, SIZE, [BLOCKS], tokens)
    wait_until(lambda: victim.call("is_copy_paused"))
    busy = (1, NUM_CHUNKS, 0) if step == "gather" else (1, 0, NUM_CHUNKS)
    assert state(client) == busy
    victim.kill()
    wait_until(lambda: state(client) == (0, 0, 0))
    # A session ends with the client that opened it.
    assert client.status().num_sessions == (0 if step == "gather" else 1)
    stored = pair[0].call("store", session, "a", 0, SIZE, [BLOCKS], tokens)
    assert stored.num_stored == (NUM_CHUNKS if step == "gather" else 0)


def test_the_memory_of_a_killed_server_is_unmapped(
    serve: Callable[..., Server], start_worker: Callable[[str], Worker]
) -> None:
    """Idle workers unmap it at once: the server's next run needs the memory."""
    server = serve()
    worker = start_worker(server.address)
    worker.receive()
    worker.call("register", "a", "m")
    maps = Path(f"/proc/{worker.process.pid}/maps")
    [name] = server.segments
    assert name in maps.read_text()
    server.kill()
    wait_until(lambda: name not in maps.read_text())
    run = server.restart()
    wait_until(lambda: run.segments[0] in maps.read_text())
    worker.call("fill", "a", [0, 1, 2, 3])
    key = SessionKey("engine", "next")
    assert worker.call("store", key, "a", 0, CHUNK, [[0, 1, 2, 3]], [1] * CHUNK)
    worker.call("unregister_kv_cache", "a")
    run.close()


def test_a_kept_arena_is_not_shared_with_workers(
    serve: Callable[..., Server], start_worker: Callable[[str], Worker], tmp_path: Path
) -> None:
    """A worker might still write when the next server has started."""
    journal = tmp_path / "journal"
    server = serve("--set", f"l1.keep={journal}")
    worker = start_worker(server.address)
    worker.receive()
    with pytest.raises(BadRequest, match=r"with l1\.keep the server copies"):
        worker.call("register", "a", "m")
    server.close()
    (SHM_DIR / arena_name(journal)).unlink()


def test_wrong_bytes_are_found_by_the_worker(
    serve: Callable[..., Server], start_worker: Callable[[str], Worker], prompt: Prompt
) -> None:
    """With l1.verify a retrieve checks its bytes, and a wrong chunk is removed."""
    server = serve("--set", "l1.verify=true")
    worker, key = start_worker(server.address), SessionKey("engine", "r")
    worker.receive()
    worker.call("register", "a", "m")
    worker.call("fill", "a", BLOCKS)
    tokens = prompt(2 * CHUNK)
    worker.call("store", key, "a", 0, 2 * CHUNK, [BLOCKS[:8]], tokens)
    assert worker.call("retrieve", key, "a", 0, 2 * CHUNK, [BLOCKS[8:]]).num_tokens
    one, two = (worker.call("digest", "a", b) for b in (BLOCKS[:8], BLOCKS[8:]))
    assert one == two
    [name] = server.segments
    with (SHM_DIR / name).open("r+b") as memory:
        arena = memory.read()
        place = arena.index(worker.call("read", "a", [4])[0, 0, 0].tobytes())
        memory.seek(place)
        memory.write(bytes([arena[place] ^ 1]))
    worker.call("poison", "a", BLOCKS[8:])
    with pytest.raises(ChunksMissing, match="found wrong"):
        worker.call("retrieve", key, "a", 0, 2 * CHUNK, [BLOCKS[8:]])
    assert (worker.call("read", "a", BLOCKS[8:]) == POISON).all()
    with connect(server.address) as client:
        wait_until(lambda: client.status().counters["chunks_corrupt"] == 1)
        assert client.lookup(key, "m", 1, tokens).num_chunks == 1
        client.end_session(key)
        assert state(client) == (0, 0, 0)
    with suppress(KVError):
        worker.call("unregister_kv_cache", "a")
    server.close()
