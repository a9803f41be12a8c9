"""Fixtures: a GPU or the stub of its driver (`.ci/stub`), a server, workers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvcore.errors import SetupError
from tests.gpu.gpu_worker import GpuWorkerCommands
from tests.system.conftest import client, model, prompt, serve, session
from tests.system.server_fixture import Server
from tests.system.worker_process import Worker, WorkerCommands

__all__ = ["client", "model", "prompt", "serve", "session"]

StartWorker = Callable[[], Worker]


@pytest.fixture(scope="session")
def devices() -> tuple[Any, ...]:
    """All GPUs."""
    try:
        from kvcore.cuda.driver import open_devices

        return open_devices()
    except SetupError as error:
        pytest.skip(error.message)


@pytest.fixture
def device(devices: tuple[Any, ...]) -> Any:
    """The first GPU."""
    return devices[0]


@pytest.fixture
def stub(devices: tuple[Any, ...]) -> None:
    """Require the stub of the driver, which can hold events back on demand."""
    if not hasattr(ctypes.CDLL("libcuda.so.1"), "stub_hold"):
        pytest.skip("needs the stub of the driver: events of a GPU cannot be held back")


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], devices: tuple[Any, ...]) -> Iterator[Server]:
    """The module's server."""
    server = serve("--device", "cuda", "--l1-size", "64MiB")
    yield server
    server.close()


@pytest.fixture(scope="module")
def commands() -> type[WorkerCommands]:
    """Commands of the module's workers."""
    return GpuWorkerCommands


@pytest.fixture(scope="module")
def start_worker(
    server: Server, commands: type[WorkerCommands]
) -> Iterator[StartWorker]:
    """Start a worker of the module's server, on the first GPU."""
    with ExitStack() as stack:

        def start() -> Worker:
            worker = Worker(server.address, commands)
            stack.callback(worker.close)
            worker.receive()
            return worker

        yield start


@pytest.fixture(scope="module")
def workers(start_worker: StartWorker) -> list[Worker]:
    """Two workers of the module's server."""
    return [start_worker() for _ in range(2)]
