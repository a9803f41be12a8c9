"""Real servers and real workers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from tests.system.server_fixture import Server, connect
from tests.system.worker_process import Worker

Prompt = Callable[[int], list[int]]
_counter = itertools.count()


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start a server with these options."""
    servers: list[Server] = []

    def start(*options: str, **rest: str) -> Server:
        server = Server(tmp_path_factory.mktemp("server"), *options, **rest)
        servers.append(server)
        return server

    yield start
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """The module's server."""
    server = serve()
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[KVClient]:
    """The test's connection to the module's server."""
    with connect(server.address, label="test", timeout_s=20) as client:
        yield client


@pytest.fixture(scope="module")
def driver() -> str:
    """The side that copies; a module that tests both uses `both_drivers`."""
    return "server"


@pytest.fixture(scope="module", params=["server", "worker"])
def both_drivers(request: pytest.FixtureRequest) -> str:
    """Both sides in turn, for use as a module's `driver`."""
    return str(request.param)


@pytest.fixture(scope="module")
def start_worker(driver: str) -> Iterator[Callable[[str], Worker]]:
    """Start a worker of a server; `answer` once before the first `ask`."""
    with ExitStack() as stack:

        def start(address: str) -> Worker:
            worker = Worker(address, driver=driver)
            stack.callback(worker.close)
            return worker

        yield start


@pytest.fixture(scope="module")
def workers(server: Server, start_worker: Callable[[str], Worker]) -> list[Worker]:
    """Two workers of the module's server."""
    both = [start_worker(server.address) for _ in range(2)]
    for worker in both:
        worker.receive()
    return both


@pytest.fixture
def model() -> str:
    """A model that no other test uses."""
    return f"model-{next(_counter)}"


@pytest.fixture
def session(client: KVClient) -> Iterator[SessionKey]:
    """A session that no other test uses; after its end nothing may be held."""
    key = SessionKey("engine", f"request-{next(_counter)}")
    yield key
    client.end_session(key)
    status = client.status()
    held = (status.num_leases, status.l1.num_leased, status.l1.num_reserved)
    assert held == (0, 0, 0)


@pytest.fixture
def prompt() -> Prompt:
    """Return a unique prompt of this many tokens."""

    def make(num_tokens: int) -> list[int]:
        rng = np.random.default_rng(next(_counter))
        return rng.integers(0, 1 << 31, num_tokens).tolist()

    return make
