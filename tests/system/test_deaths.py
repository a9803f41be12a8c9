"""Workers killed and sessions ended during a copy, and their effect on others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from kvcore.shm import SHM_DIR
from tests.system.conftest import Prompt, both_drivers
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.system.worker_process import LARGE, Worker

driver = both_drivers

NUM_CHUNKS = 8
SIZE = NUM_CHUNKS * CHUNK
BLOCKS = list(range(4 * NUM_CHUNKS))
REQUESTS = [SessionKey("engine", f"large-{n}") for n in range(4)]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server with room for a few slow copies of 64 MiB each."""
    server = serve("--l1-size", "320MiB", "--set", "l1.page=64KiB")
    yield server
    server.close()


def test_what_the_dead_left_is_removed(
    server: Server, start_worker: Callable[[str], Worker]
) -> None:
    """A segment whose owner is gone has its name until a client's death."""
    left = SHM_DIR / f"kvcore-left-{os.getpid()}"
    victim = start_worker(server.address)
    victim.receive()
    left.touch(0o600)
    victim.kill()
    wait_until(lambda: not left.exists())


def store_and_be_killed(
    client: KVClient, victim: Worker, prompts: list[list[int]]
) -> None:
    """Have a worker store prompts, one per request; kill it during the first."""
    client.clear()
    for n, (key, tokens) in enumerate(zip(REQUESTS, prompts, strict=True)):
        victim.call(
            "begin", str(n), "submit_store", key, "v", 0, SIZE, [BLOCKS], tokens
        )
    wait_until(lambda: client.status().l1.num_chunks > 0)
    victim.kill()


def test_a_worker_killed_in_a_store_leaves_nothing_half_written(
    server: Server,
    client: KVClient,
    start_worker: Callable[[str], Worker],
    model: str,
    prompt: Prompt,
) -> None:
    """Each of its requests is stored whole or not at all; other workers continue."""
    victim, other = start_worker(server.address), start_worker(server.address)
    victim.receive()
    other.receive()
    victim.call("register", "v", model, LARGE, num_blocks=32)
    other.call("register", "o", model, LARGE, num_blocks=32)
    victim.call("fill", "v", BLOCKS[:4])
    expected = victim.call("read", "v", BLOCKS[:4])
    prompts = [prompt(SIZE) for _ in REQUESTS]
    # Every chunk holds the same bytes, so that any other byte shows.
    for first in range(4, len(BLOCKS), 4):
        victim.call("copy", "v", BLOCKS[:4], BLOCKS[first : first + 4])

    store_and_be_killed(client, victim, prompts)

    wait_until(lambda: not is_copying(client))
    wait_until(lambda: {i.instance_id for i in client.status().instances} == {"o"})
    for key, tokens in zip(REQUESTS, prompts, strict=True):
        found = client.lookup(key, model, 1, tokens).num_chunks
        assert found in (0, NUM_CHUNKS)
        if not found:
            continue
        other.call("poison", "o", BLOCKS)
        other.call("retrieve", key, "o", 0, SIZE, [BLOCKS])
        for first in range(0, len(BLOCKS), 4):
            read = other.call("read", "o", BLOCKS[first : first + 4])
            assert (read == expected).all()
    for key in REQUESTS:
        client.end_session(key)
    assert client.status().l1.num_leased == 0
    assert client.status().num_sessions == 0
    fresh = prompt(CHUNK)
    stored = other.call("store", REQUESTS[0], "o", 0, CHUNK, [BLOCKS[:4]], fresh)
    assert stored.num_stored == 1
    client.end_session(REQUESTS[0])


def test_the_end_of_a_session_does_not_stop_its_store(
    server: Server,
    client: KVClient,
    start_worker: Callable[[str], Worker],
    model: str,
    prompt: Prompt,
) -> None:
    """The running copy succeeds; then the session's hashes are removed."""
    worker, key, tokens = start_worker(server.address), REQUESTS[0], prompt(SIZE)
    worker.receive()
    worker.call("register", "w", model, LARGE, num_blocks=32)
    worker.call("begin", "s", "submit_store", key, "w", 0, SIZE, [BLOCKS], tokens)
    wait_until(lambda: worker.call("is_done", "s") or is_copying(client))
    client.end_session(key)
    assert worker.call("result", "s").num_stored == NUM_CHUNKS
    assert client.status().num_sessions == 0
    assert client.lookup(key, model, 1, tokens).num_chunks == NUM_CHUNKS
    client.end_session(key)


def is_copying(client: KVClient) -> bool:
    """Return whether a part is being written."""
    return client.status().l1.num_reserved > 0


def test_a_lease_does_not_wait_for_a_killed_worker(
    server: Server,
    client: KVClient,
    start_worker: Callable[[str], Worker],
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """If one of two ranks is killed, the lease waits for the other only."""
    ranks = [start_worker(server.address) for _ in range(2)]
    tokens = prompt(CHUNK)
    for rank, worker in enumerate(ranks):
        worker.receive()
        worker.call("register", f"r{rank}", model, rank=rank, world_size=2)
        worker.call("store", session, f"r{rank}", 0, CHUNK, [BLOCKS[:4]], tokens)
    assert client.lookup(session, model, 2, tokens).num_chunks == 1
    assert client.status().leases[0].waiting_readers == (0, 1)
    ranks[1].kill()
    wait_until(lambda: client.status().leases[0].waiting_readers == (0,))
    ranks[0].call("retrieve", session, "r0", 0, CHUNK, [BLOCKS[:4]])
    assert client.status().num_leases == 0


def test_an_id_is_free_when_its_process_is_gone(
    server: Server, client: KVClient, start_worker: Callable[[str], Worker], model: str
) -> None:
    """A killed worker is replaced by one with the same instance id."""
    first, second = start_worker(server.address), start_worker(server.address)
    first.receive()
    second.receive()
    first.call("register", "phoenix", model)
    first.kill()
    wait_until(lambda: not any(i.model == model for i in client.status().instances))
    second.call("register", "phoenix", model)
