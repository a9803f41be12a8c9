"""Fixtures for the connector with real servers and a fake engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from tests.system.conftest import client, model, serve, server
from tests.system.server_fixture import Server
from tests.vllm.fake_engine import FakeEngine, Request

__all__ = ["client", "model", "serve", "server"]

Start = Callable[..., FakeEngine]
_numbers = itertools.count()


@pytest.fixture(params=["server", "worker"])
def driver(request: pytest.FixtureRequest) -> str:
    """The process that copies: server or worker."""
    return str(request.param)


@pytest.fixture
def start(server: Server, model: str, driver: str) -> Iterator[Start]:
    """Return a function that starts an engine at the module's server or `address`."""
    with ExitStack() as stack:

        def make(address: str = server.address, **options: object) -> FakeEngine:
            options.setdefault("model", model)
            options.setdefault("driver", driver)
            engine = FakeEngine(address, **options)  # type: ignore[arg-type]
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture
def request_of() -> Callable[[int], Request]:
    """Return a function that makes a request with a unique prompt of n tokens."""

    def make(num_tokens: int) -> Request:
        number = next(_numbers)
        tokens = np.random.default_rng(number).integers(0, 1 << 31, num_tokens)
        return Request(f"request-{number}", tokens.tolist())

    return make
