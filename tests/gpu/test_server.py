"""A real server and real workers whose caches are in GPU memory."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.errors import DeadlineExceeded, HandleError
from kvcore.keys import SessionKey
from tests.gpu.conftest import StartWorker
from tests.gpu.gpu_worker import GpuWorkerCommands
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.system.worker_process import LARGE, MLA, PAGES, PLAIN, POISON, Group, Worker

pytestmark = pytest.mark.gpu

SIZE = 4 * CHUNK
FROM = [9, 3, 4, 5, 60, 61, 62, 63, 1, 17, 30, 2, 50, 49, 48, 47]
INTO = [20, 21, 22, 23, 7, 40, 11, 0, 8, 9, 10, 33, 12, 13, 55, 54]
HYBRID = (Group(), Group(window=CHUNK))
TOKEN_IN_BLOCK = (Group("LNKSD", (2, 0, 2, 16, 32)),)
HEAD_MAJOR = (Group("KLNHSD", (2, 2, 0, 2, 16, 16)),)


@pytest.mark.parametrize(
    "groups",
    [PLAIN, MLA, PAGES, HYBRID, TOKEN_IN_BLOCK, HEAD_MAJOR],
    ids=["plain", "mla", "pages", "hybrid", "kv in a block", "head-major"],
)
def test_a_worker_retrieves_anothers_blocks(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
    groups: tuple[Group, ...],
) -> None:
    """Scattered blocks arrive byte for byte, and no other block changes."""
    first, second = workers
    tokens = prompt(SIZE)
    lists = [FROM] * len(groups)
    first.call("register", "a", model, groups)
    second.call("register", "b", model, groups)
    first.call("fill", "a", FROM)
    expected = [first.call("read", "a", FROM, n) for n in range(len(groups))]
    reply = first.call("store", session, "a", 0, SIZE, lists, tokens)
    assert reply.num_stored == 4 * len(groups)
    second.call("poison", "b", list(range(64)))
    assert client.lookup(session, model, 1, tokens).num_tokens == SIZE
    lists = [INTO] * len(groups)
    reply = second.call("retrieve", session, "b", 0, SIZE, lists)
    assert reply.num_tokens == SIZE
    assert len(reply.event) == 64
    others = sorted(set(range(64)) - set(INTO))
    for n, blocks in enumerate(expected):
        assert (second.call("read", "b", INTO, n) == blocks).all()
        assert (second.call("read", "b", others, n) == POISON).all()


def test_single_tokens_are_skipped(
    workers: list[Worker], model: str, session: SessionKey, prompt: Prompt
) -> None:
    """The skipped tokens, which end within a block, are not written."""
    first, second = workers
    tokens = prompt(CHUNK)
    first.call("register", "a", model)
    second.call("register", "b", model)
    first.call("fill", "a", FROM[:4])
    expected = first.call("read", "a", FROM[:4])
    first.call("store", session, "a", 0, CHUNK, [FROM[:4]], tokens)
    second.call("poison", "b", INTO[:4])
    second.call(
        "retrieve", session, "b", 0, CHUNK, [INTO[:4]], tokens, skip_first_n_tokens=21
    )
    got = second.call("read", "b", INTO[:4])
    # [blocks, L, K, slots, D]
    assert (got[0] == POISON).all()
    assert (got[1][..., :5, :] == POISON).all()
    assert (got[1][..., 5:, :] == expected[1][..., 5:, :]).all()
    assert (got[2:] == expected[2:]).all()


def test_a_store_follows_the_workers_event(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Stores after an event that is reached succeed repeatedly."""
    worker = workers[0]
    worker.call("register", "a", model)
    for _ in range(3):
        tokens = prompt(CHUNK)
        key = SessionKey("engine", f"event-{tokens[0]}")
        reply = worker.call("store_behind", 20, key, "a", CHUNK, FROM[:4], tokens)
        assert reply.num_stored == 1
        client.end_session(key)


def test_a_copy_does_not_start_before_its_event(
    stub: None,
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A store whose event is not reached by its deadline commits no chunk."""
    worker = workers[0]
    worker.call("register", "a", model)
    worker.call("hold", held=True)
    tokens = prompt(CHUNK)
    with pytest.raises(DeadlineExceeded):
        worker.call("store_behind", 0.2, session, "a", CHUNK, FROM[:4], tokens)
    worker.call("hold", held=False)
    assert client.lookup(session, model, 1, tokens).num_chunks == 0
    reply = worker.call("store_behind", 20, session, "a", CHUNK, FROM[:4], tokens)
    assert reply.num_stored == 1


def test_a_worker_that_dies_before_its_event_is_removed(
    stub: None,
    start_worker: StartWorker,
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Its copies end, its memory is closed, and other workers are served meanwhile."""
    victim, other = start_worker(), workers[0]
    tokens = prompt(CHUNK)
    victim.call("register", "v", model)
    victim.call("hold", held=True)
    victim.send("store_behind", 20, session, "v", CHUNK, FROM[:4], tokens)
    other.call("register", "o", model)
    victim.kill()
    wait_until(lambda: "v" not in {i.instance_id for i in client.status().instances})
    assert other.call("store", session, "o", 0, CHUNK, [FROM[:4]], tokens).num_stored
    # The closer is one thread: after this call it has closed the dead worker's memory.
    other.call("unregister_kv_cache", "o")


def test_a_worker_killed_during_a_copy_stores_all_or_nothing(
    start_worker: StartWorker,
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Its chunks are all present or all absent; other workers continue."""
    victim, other = start_worker(), workers[0]
    tokens = prompt(4 * CHUNK)
    blocks = list(range(16))
    victim.call("register", "v", model, LARGE, num_blocks=16)
    other.call("register", "o", model, LARGE, num_blocks=16)
    victim.call("fill", "v", blocks)
    expected = victim.call("read", "v", blocks)
    victim.call("begin", "s", "submit_store", session, "v", 0, SIZE, [blocks], tokens)
    victim.kill()
    wait_until(lambda: "v" not in {i.instance_id for i in client.status().instances})
    wait_until(lambda: client.status().l1.num_reserved == 0)
    found = client.lookup(session, model, 1, tokens).num_chunks
    assert found in (0, 4)
    if found:
        other.call("retrieve", session, "o", 0, SIZE, [blocks])
        assert (other.call("read", "o", blocks) == expected).all()
    other.call("unregister_kv_cache", "o")


def test_forged_handles_are_refused(
    workers: list[Worker], model: str, devices: tuple[object, ...]
) -> None:
    """Ranges past the allocation, made-up handles, unknown GPUs."""
    worker = workers[0]
    worker.call("register", "a", model)
    far = {"offset": 1 << 40}
    unknown = {"handle": bytes(64)}
    elsewhere = {"device": "GPU-00000000-0000-0000-0000-000000000000"}
    for changes in (far, unknown, elsewhere):
        with pytest.raises(HandleError):
            worker.call("register_as", "a", model, **changes)
    worker.call("register_as", "a", model)


def test_caches_on_every_gpu_share_chunks(
    workers: list[Worker],
    model: str,
    session: SessionKey,
    prompt: Prompt,
    devices: tuple[object, ...],
) -> None:
    """One worker has a cache on each GPU; all share the chunks."""
    worker, tokens = workers[0], prompt(CHUNK)
    for number in range(len(devices)):
        worker.call("register", f"gpu-{number}", model, number=number)
    worker.call("fill", "gpu-0", FROM[:4])
    expected = worker.call("read", "gpu-0", FROM[:4])
    worker.call("store", session, "gpu-0", 0, CHUNK, [FROM[:4]], tokens)
    last = f"gpu-{len(devices) - 1}"
    worker.call("poison", last, INTO[:4])
    worker.call("retrieve", session, last, 0, CHUNK, [INTO[:4]])
    assert (worker.call("read", last, INTO[:4]) == expected).all()


def test_gpu_ordinals_may_differ_in_the_server(
    stub: None,
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    prompt: Prompt,
) -> None:
    """The worker's first GPU is the server's last; it is found by UUID."""
    monkeypatch.setenv("STUB_REVERSED", "1")
    server = serve("--device", "cuda")
    monkeypatch.delenv("STUB_REVERSED")
    worker = Worker(server.address, GpuWorkerCommands)
    try:
        worker.receive()
        worker.call("register", "a", model)
        key = SessionKey("engine", "reversed")
        reply = worker.call("store", key, "a", 0, CHUNK, [FROM[:4]], prompt(CHUNK))
        assert reply.num_stored == 1
        (seen,) = worker.call("status").devices
        assert (seen.uuid, seen.name) == (
            "GPU-10101010-1010-1010-1010-101010101010",
            "Stub 0",
        )
        assert sum(seen.copies.values()) == 1
    finally:
        worker.close()
        server.close()


def test_a_thousand_registrations_leak_no_resource(
    workers: list[Worker], server: Server, client: KVClient, model: str
) -> None:
    """The server has as many descriptors and threads as before."""
    worker = workers[0]
    worker.call("register", "c", model, num_blocks=4096)
    worker.call("cycle", "c", model, 10)
    before = used(server)
    for _ in range(10):
        worker.call("cycle", "c", model, 100)
    assert used(server) == before
    assert "c" not in {i.instance_id for i in client.status().instances}


def used(server: Server) -> tuple[int, int]:
    """Return the numbers of a server's descriptors and threads."""
    folder = f"/proc/{server.pid}"
    return len(os.listdir(f"{folder}/fd")), len(os.listdir(f"{folder}/task"))


def test_workers_continue_with_the_next_server(
    serve: Callable[..., Server],
    devices: tuple[object, ...],
    model: str,
    prompt: Prompt,
) -> None:
    """The next server opens the same handles, and copies work."""
    server = serve("--device", "cuda")
    worker = Worker(server.address, GpuWorkerCommands)
    key, tokens = SessionKey("engine", "again"), prompt(CHUNK)
    try:
        worker.receive()
        worker.call("register", "a", model)
        worker.call("fill", "a", FROM[:4])
        server.kill()
        server = server.restart()
        wait_until(lambda: not worker.call("is_server_gone"))
        worker.call("store", key, "a", 0, CHUNK, [FROM[:4]], tokens)
        expected = worker.call("read", "a", FROM[:4])
        worker.call("poison", "a", INTO[:4])
        worker.call("retrieve", key, "a", 0, CHUNK, [INTO[:4]])
        assert np.array_equal(worker.call("read", "a", INTO[:4]), expected)
    finally:
        worker.close()
        server.close()
