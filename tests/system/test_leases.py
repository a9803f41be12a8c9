"""Leases on found chunks, until read, freed, ended, expired or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from tests.system.conftest import Prompt, both_drivers
from tests.system.server_fixture import CHUNK, Server, connect, wait_until
from tests.system.worker_process import Worker

driver = both_drivers

NUM_CHUNKS = 4
BLOCKS = list(range(4 * NUM_CHUNKS))


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server with room for 16 chunks of these caches."""
    server = serve("--l1-size", "128KiB")
    yield server
    server.close()


@pytest.fixture
def worker(workers: list[Worker], model: str) -> Worker:
    """A worker with the instance "a" of the model."""
    workers[0].call("register", "a", model)
    return workers[0]


@pytest.fixture
def stored(worker: Worker, session: SessionKey, prompt: Prompt) -> list[int]:
    """A prompt whose four chunks are stored."""
    tokens = prompt(NUM_CHUNKS * CHUNK)
    worker.call("store", session, "a", 0, len(tokens), [BLOCKS], tokens)
    return tokens


def ended(client: KVClient) -> dict[str, int]:
    """Return the number of ended leases by reason."""
    counters = client.status().counters
    return {
        name.removeprefix("leases_"): count
        for name, count in counters.items()
        if name.startswith("leases_") and name != "leases_granted"
    }


def ends(client: KVClient, before: dict[str, int]) -> dict[str, int]:
    """Return the leases that ended since, by reason."""
    now = ended(client)
    return {why: now[why] - before[why] for why in now if now[why] != before[why]}


def flood(worker: Worker, prompt: Prompt) -> int:
    """Store as many chunks as L1 has room for; return how many found no room."""
    tokens = prompt(16 * CHUNK)
    key = SessionKey("engine", "flood")
    reply = worker.call("store", key, "a", 0, len(tokens), [[*range(64)]], tokens)
    worker.call("end_session", key)
    return int(reply.num_dropped)


def test_a_new_lookup_replaces_the_lease(
    stored: list[int], client: KVClient, model: str, session: SessionKey
) -> None:
    """A session has one lease at most, that of its last lookup."""
    before = ended(client)
    client.lookup(session, model, 1, stored)
    client.lookup(session, model, 1, stored[: 2 * CHUNK])
    status = client.status()
    assert [lease.num_chunks for lease in status.leases] == [2]
    assert status.l1.num_leased == 2
    assert ends(client, before) == {"replaced": 1}


def test_a_lease_is_freed_by_range(
    stored: list[int], client: KVClient, model: str, session: SessionKey
) -> None:
    """The engine releases chunks that it will not read."""
    before = ended(client)
    client.lookup(session, model, 1, stored)
    client.free_lookup_locks(session, CHUNK, 3 * CHUNK)
    assert client.status().l1.num_leased == 2
    client.free_lookup_locks(session, CHUNK, 3 * CHUNK)
    client.free_lookup_locks(session, 0, len(stored))
    assert client.status().l1.num_leased == 0
    assert ends(client, before) == {"released": 1}


def test_the_end_of_a_session_ends_its_lease(
    stored: list[int], client: KVClient, model: str, session: SessionKey
) -> None:
    """At once; ending it again changes nothing."""
    before = ended(client)
    client.lookup(session, model, 1, stored)
    client.end_session(session)
    assert client.status().num_leases == 0
    client.end_session(session)
    assert ends(client, before) == {"session_end": 1}


def test_a_lookup_that_finds_nothing_ends_the_lease_before_it(
    stored: list[int],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """The session reads what its last lookup found: nothing."""
    client.lookup(session, model, 1, stored)
    assert client.lookup(session, model, 1, prompt(CHUNK)).num_chunks == 0
    assert client.status().num_leases == 0


def test_leased_chunks_are_never_evicted(
    stored: list[int],
    worker: Worker,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Other stores evict all other chunks, and these after the lease has ended."""
    client.lookup(session, model, 1, stored)
    assert flood(worker, prompt) == NUM_CHUNKS
    worker.call("retrieve", session, "a", 0, len(stored), [BLOCKS])
    assert client.status().num_leases == 0
    assert flood(worker, prompt) == 0
    assert client.lookup(session, model, 1, stored).num_chunks == 0


def test_the_leaves_go_first(
    worker: Worker,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """If only a part of a prompt fits, its prefix stays."""
    client.clear()
    tokens = prompt(14 * CHUNK)
    worker.call("store", session, "a", 0, len(tokens), [[*range(56)]], tokens)
    key = SessionKey("engine", "more")
    worker.call("store", key, "a", 0, 5 * CHUNK, [[*range(20)]], prompt(5 * CHUNK))
    worker.call("end_session", key)
    assert client.lookup(session, model, 1, tokens).num_chunks == 11


def test_a_killed_scheduler_leaves_no_lease(
    stored: list[int],
    client: KVClient,
    model: str,
    server: Server,
    start_worker: Callable[[str], Worker],
) -> None:
    """Its leases end with its process."""
    before = ended(client)
    scheduler = start_worker(server.address)
    scheduler.receive()
    key = SessionKey("engine", "killed")
    assert scheduler.call("lookup", key, model, 1, stored).num_chunks == NUM_CHUNKS
    assert client.status().num_leases == 1
    scheduler.kill()
    wait_until(lambda: client.status().num_leases == 0)
    assert client.status().l1.num_leased == 0
    assert ends(client, before) == {"client_gone": 1}
    client.end_session(key)


def test_clear_leaves_what_is_leased(
    stored: list[int], client: KVClient, model: str, session: SessionKey
) -> None:
    """Its reply counts the leased chunks; those without a lease are removed."""
    client.clear()
    assert client.lookup(session, model, 1, stored).num_chunks == 0
    assert client.status().l1.used_bytes == 0


def test_clear_says_what_it_kept(
    stored: list[int], client: KVClient, model: str, session: SessionKey
) -> None:
    """Leased chunks stay until their lease ends."""
    client.lookup(session, model, 1, stored[: 3 * CHUNK])
    cleared = client.clear()
    assert cleared.num_kept == 3
    client.free_lookup_locks(session, 0, 3 * CHUNK)
    cleared = client.clear()
    assert (cleared.num_chunks, cleared.num_kept) == (3, 0)


@pytest.fixture(scope="module")
def brief(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server with short leases and long sessions."""
    server = serve("--set", "sessions.lease_s=0.2")
    yield server
    server.close()


def test_an_unread_lease_expires(
    brief: Server, start_worker: Callable[[str], Worker], prompt: Prompt
) -> None:
    """It expires in time, although its session continues."""
    worker = start_worker(brief.address)
    worker.receive()
    worker.call("register", "a", "m")
    tokens = prompt(CHUNK)
    key = SessionKey("engine", "slow")
    with connect(brief.address) as client:
        before = ended(client)
        client.lookup(key, "m", 1, tokens)
        # Long enough that the server has scheduled the session's expiry.
        began = client.ping().monotonic_ns
        wait_until(lambda: client.ping().monotonic_ns - began > 3e8)
        worker.call("store", key, "a", 0, CHUNK, [[0, 1, 2, 3]])
        assert client.lookup(key, "m", 1, tokens).num_chunks == 1
        wait_until(lambda: client.status().num_leases == 0, seconds=10)
        assert ends(client, before)["expired"] == 1
        assert client.status().num_sessions == 1
        worker.call("retrieve", key, "a", 0, CHUNK, [[0, 1, 2, 3]])
