"""Requests to a server that is stopped past their deadlines, then continued.

SIGSTOP is what a swapped-out, frozen or debugged process looks like to its clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.errors import DeadlineExceeded
from kvcore.keys import SessionKey
from tests.system.conftest import Prompt, both_drivers
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.system.worker_process import LARGE, Worker

driver = both_drivers

NUM_CHUNKS = 8
SIZE = NUM_CHUNKS * CHUNK
BLOCKS = list(range(4 * NUM_CHUNKS))


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server with room for a few slow copies of 64 MiB each."""
    server = serve("--l1-size", "320MiB", "--set", "l1.page=64KiB")
    yield server
    server.close()


@pytest.fixture
def worker(workers: list[Worker], model: str) -> Worker:
    """A worker with a large cache "a" of the model, filled."""
    worker = workers[0]
    worker.call("register", "a", model, LARGE, num_blocks=len(BLOCKS))
    worker.call("fill", "a", BLOCKS)
    return worker


@pytest.fixture
def stopped(server: Server) -> Iterator[Callable[[], None]]:
    """Return a function that stops the server; the end of the test continues it."""
    yield server.pause
    server.resume()


def test_a_store_that_was_not_begun_is_void_when_late(
    worker: Worker,
    server: Server,
    stopped: Callable[[], None],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """The engine may already have reused its blocks for other tokens."""
    tokens = prompt(SIZE)
    client.lookup(session, model, 1, tokens)
    stopped()
    with pytest.raises(DeadlineExceeded):
        worker.call("store", session, "a", 0, SIZE, [BLOCKS], timeout_s=0.2)
    worker.call("poison", "a", BLOCKS)
    server.resume()
    worker.call("ping")
    assert client.lookup(session, model, 1, tokens).num_chunks == 0


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))]
)
def test_a_copy_stopped_past_its_deadline_is_not_kept(
    worker: Worker,
    server: Server,
    stopped: Callable[[], None],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
    part: int,
) -> None:
    """Stopped in the middle of a store, past its deadline, and continued: aborted.

    If the copy was faster than the stop, its bytes are the earlier ones.
    """
    tokens = prompt(SIZE)
    client.lookup(session, model, 1, tokens)
    before = worker.call("digest", "a", BLOCKS)
    options = {"timeout_s": 0.5}
    worker.call(
        "begin", "s", "submit_store", session, "a", 0, SIZE, [BLOCKS], **options
    )
    wait_until(lambda: worker.call("is_done", "s") or is_copying(client))
    stopped()
    was_late = False
    try:
        worker.call("result", "s")
    except DeadlineExceeded:
        was_late = True
    worker.call("poison", "a", BLOCKS)
    server.resume()
    wait_until(lambda: not is_copying(client))
    found = client.lookup(session, model, 1, tokens).num_chunks
    assert found == NUM_CHUNKS or (was_late and found == 0)
    if found:
        worker.call("retrieve", session, "a", 0, SIZE, [BLOCKS])
        assert worker.call("digest", "a", BLOCKS) == before


def is_copying(client: KVClient) -> bool:
    """Return whether a part is being written."""
    return client.status().l1.num_reserved > 0


def test_a_retrieve_is_not_done_before_the_server_is(
    driver: str,
    worker: Worker,
    server: Server,
    stopped: Callable[[], None],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Past the deadline the server still owns its blocks, until its reply."""
    if driver == "worker":
        pytest.skip("its blocks are the worker's own: see test_ticket_service.py")
    tokens = prompt(SIZE)
    worker.call("store", session, "a", 0, SIZE, [BLOCKS], tokens)
    expected = worker.call("digest", "a", BLOCKS)
    worker.call("poison", "a", BLOCKS)
    client.lookup(session, model, 1, tokens)
    stopped()
    worker.call(
        "begin",
        "r",
        "submit_retrieve",
        session,
        "a",
        0,
        SIZE,
        [BLOCKS],
        timeout_s=0.1,
    )
    with pytest.raises(DeadlineExceeded):
        # Sent later and due later: had the retrieve ended by its deadline, it would
        # have done so before this.
        worker.call("due", 0.4)
    assert not worker.call("is_done", "r")
    server.resume()
    with pytest.raises(DeadlineExceeded, match="on arrival"):
        worker.call("result", "r")
    worker.call("retrieve", session, "a", 0, SIZE, [BLOCKS])
    assert worker.call("digest", "a", BLOCKS) == expected


def test_a_retrieve_stopped_while_it_writes_ends_right(
    worker: Worker,
    server: Server,
    stopped: Callable[[], None],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """It began in time and may end late; until then its blocks are not reused."""
    tokens = prompt(SIZE)
    worker.call("store", session, "a", 0, SIZE, [BLOCKS], tokens)
    expected = worker.call("digest", "a", BLOCKS)
    worker.call("poison", "a", BLOCKS)
    client.lookup(session, model, 1, tokens)
    worker.call(
        "begin",
        "r",
        "submit_retrieve",
        session,
        "a",
        0,
        SIZE,
        [BLOCKS],
        timeout_s=1,
    )
    wait_until(lambda: worker.call("is_done", "r") or worker.call("differs", "a", 0))
    stopped()
    with pytest.raises(DeadlineExceeded):
        worker.call("due", 1.1)
    server.resume()
    assert worker.call("result", "r").num_tokens == SIZE
    assert worker.call("digest", "a", BLOCKS) == expected


def test_other_requests_end_at_their_deadline_and_work_again(
    server: Server, stopped: Callable[[], None], workers: list[Worker], model: str
) -> None:
    """No request waits past its deadline, and no client must connect again."""
    other = workers[1]
    other.call("register", "b", model)
    stopped()
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            other.call("due", 0.05)
    server.resume()
    other.call("ping")
    tokens, key = list(range(CHUNK)), SessionKey("engine", "after")
    other.call("fill", "b", [0, 1, 2, 3])
    other.call("store", key, "b", 0, CHUNK, [[0, 1, 2, 3]], tokens)
    assert other.call("lookup", key, model, 1, tokens).num_chunks == 1
    other.call("retrieve", key, "b", 0, CHUNK, [[4, 5, 6, 7]])
    one, two = (other.call("read", "b", blocks) for blocks in ([0, 1], [4, 5]))
    assert np.array_equal(one, two)
    other.call("end_session", key)
