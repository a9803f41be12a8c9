"""Reconnection of clients to a server killed and restarted at its address."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.errors import KVError, Unavailable, UnknownModel
from kvcore.keys import SessionKey
from kvcore.protocol import EndSession, Ping
from tests.system.conftest import Prompt, both_drivers
from tests.system.server_fixture import CHUNK, Server, connect, wait_until
from tests.system.worker_process import Worker

driver = both_drivers

ONE = [0, 1, 2, 3]


@pytest.fixture
def old(serve: Callable[..., Server]) -> Server:
    """A server for one test."""
    return serve()


@pytest.fixture
def worker(old: Server, start_worker: Callable[[str], Worker]) -> Worker:
    """A worker with the instance "a" of model "m"."""
    worker = start_worker(old.address)
    worker.receive()
    worker.call("register", "a", "m")
    worker.call("fill", "a", ONE)
    return worker


@pytest.fixture
def scheduler(old: Server) -> Iterator[KVClient]:
    """A client for lookups."""
    with connect(old.address, timeout_s=20) as client:
        yield client


@pytest.fixture
def again(old: Server) -> Iterator[Callable[[], Server]]:
    """Return a function that restarts the server."""
    runs: list[Server] = []

    def start() -> Server:
        runs.append(old.restart())
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def is_found(client: KVClient, key: SessionKey, tokens: list[int], chunks: int) -> bool:
    """Return whether a lookup of model "m" finds `chunks`; False if none registered."""
    try:
        return client.lookup(key, "m", 1, tokens).num_chunks == chunks
    except UnknownModel:
        return False


def test_clients_reconnect_and_register_again(
    old: Server,
    worker: Worker,
    scheduler: KVClient,
    again: Callable[[], Server],
    prompt: Prompt,
) -> None:
    """Idle workers register again; lookups, stores and retrieves work again."""
    key, tokens = SessionKey("engine", "r"), prompt(CHUNK)
    worker.call("store", key, "a", 0, CHUNK, [ONE], tokens)
    assert is_found(scheduler, key, tokens, 1)
    old.kill()
    assert old.segments
    run = again()
    assert not old.segments
    wait_until(lambda: [i.instance_id for i in scheduler.status().instances] == ["a"])
    assert scheduler.server.pid == run.pid
    assert is_found(scheduler, key, tokens, 0)
    worker.call("store", key, "a", 0, CHUNK, [ONE], tokens)
    assert is_found(scheduler, key, tokens, 1)
    worker.call("retrieve", key, "a", 0, CHUNK, [[4, 5, 6, 7]])
    one, two = (worker.call("read", "a", blocks) for blocks in (ONE, [4, 5, 6, 7]))
    assert np.array_equal(one, two)


def test_requests_pending_at_a_killed_server_are_unavailable(
    old: Server, worker: Worker, scheduler: KVClient, prompt: Prompt
) -> None:
    """They fail at once, retrieves too: a dead process writes no more."""
    key, tokens = SessionKey("engine", "r"), prompt(CHUNK)
    worker.call("store", key, "a", 0, CHUNK, [ONE], tokens)
    scheduler.lookup(key, "m", 1, tokens)
    old.pause()
    lookup = scheduler.submit_lookup(key, "m", 1, tokens)
    for method in ("store", "retrieve"):
        worker.call("begin", method, f"submit_{method}", key, "a", 0, CHUNK, [ONE])
    wait_until(lambda: "1 pending" in repr(scheduler._connection))
    wait_until(lambda: "2 pending" in worker.call("state"))
    assert not lookup.done()
    old.kill()
    for wait_for_reply in (
        lambda: lookup.result(20),
        lambda: worker.call("result", "store"),
        lambda: worker.call("result", "retrieve"),
    ):
        with pytest.raises(Unavailable, match=f"process {old.pid}.* is gone"):
            wait_for_reply()


def test_requests_sent_while_it_is_down_are_served_by_the_next_run(
    old: Server,
    worker: Worker,
    scheduler: KVClient,
    again: Callable[[], Server],
    prompt: Prompt,
) -> None:
    """They wait for the next run and follow the registration."""
    old.kill()
    wait_until(lambda: is_gone(scheduler))
    key, tokens = SessionKey("engine", "r"), prompt(CHUNK)
    wait_until(lambda: worker.call("is_server_gone"))
    worker.call("begin", "s", "submit_store", key, "a", 0, CHUNK, [ONE], tokens)
    ping = scheduler.submit(Ping())
    assert not ping.done()
    assert not worker.call("is_done", "s")
    again()
    assert worker.call("result", "s").num_stored == 1
    ping.result(20)
    wait_until(lambda: is_found(scheduler, key, tokens, 1))


def is_gone(client: KVClient) -> bool:
    """Return whether the client has noticed that its server ended."""
    try:
        return client.server is None
    except Unavailable:
        return True


def test_requests_without_a_server_end_at_their_deadline(
    old: Server, worker: Worker, scheduler: KVClient
) -> None:
    """Retrieves too: a request that was never sent writes nothing."""
    old.kill()
    wait_until(lambda: is_gone(scheduler))
    wait_until(lambda: worker.call("is_server_gone"))
    key = SessionKey("engine", "r")
    with pytest.raises(Unavailable, match="no server answers"):
        scheduler.submit(EndSession(key), 0.1).result(20)
    for method in ("store", "retrieve"):
        with pytest.raises(Unavailable, match="no server answers"):
            worker.call(method, key, "a", 0, CHUNK, [ONE], timeout_s=0.1)


def test_requests_in_the_queue_find_the_next_run(
    old: Server,
    worker: Worker,
    scheduler: KVClient,
    again: Callable[[], Server],
    prompt: Prompt,
) -> None:
    """Each of many pending requests ends once, and new ones are served."""
    key, tokens = SessionKey("engine", "r"), prompt(CHUNK)
    scheduler.lookup(key, "m", 1, tokens)
    futures = []

    def submit_lookups() -> None:
        futures.extend(scheduler.submit_lookup(key, "m", 1, tokens) for _ in range(100))

    old.pause()
    submit_lookups()
    wait_until(lambda: "100 pending" in repr(scheduler._connection))
    old.kill()
    submit_lookups()
    wait_until(lambda: is_gone(scheduler))
    submit_lookups()
    again()
    ends = [future.exception(20) for future in futures]
    allowed = (Unavailable, UnknownModel)
    assert all(end is None or isinstance(end, allowed) for end in ends)
    assert all(isinstance(end, Unavailable) for end in ends[:100])
    assert not any(isinstance(end, Unavailable) for end in ends[200:])
    wait_until(lambda: is_found(scheduler, key, tokens, 0))


def test_a_client_cannot_start_without_a_server(old: Server) -> None:
    """It raises within its timeout and names the address."""
    old.kill()
    with pytest.raises(KVError, match=old.address):
        connect(old.address, timeout_s=0.1)
