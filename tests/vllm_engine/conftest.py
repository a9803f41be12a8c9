"""Fixtures for real vLLM engines and real servers. Requires vLLM."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvcore.vllm import tiny_models as tiny
from tests.system.server_fixture import Server
from tests.vllm_engine.engine import Engine, run_in_fork_server

HERE = Path(__file__).resolve().parent

BLOCK_SIZES = {"llama": 32, "mla": 16, "hybrid": 32}
SERVER = ("--l1-size", "256MiB")

Start = Callable[..., Engine]
Serve = Callable[..., Server]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder and raise their timeout for busy machines."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("vllm")
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a tiny model once and returns its folder."""
    folder = tmp_path_factory.mktemp("models")

    def make(kind: str) -> Path:
        path = folder / kind
        if not path.exists():
            run_in_fork_server(tiny.write, kind, path)
        return path

    return make


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Return a function that starts a server with the given options."""
    with ExitStack() as stack:

        def start(*options: str, **rest: str) -> Server:
            folder = tmp_path_factory.mktemp("server")
            # Not forked: the fork server of this process imports vLLM.
            program = ("-m", "kvctl")
            server = Server(folder, *SERVER, *options, program=program, **rest)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture(scope="module")
def start(
    model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Start]:
    """Return a function that starts an engine; `address` enables the connector."""
    with ExitStack() as stack:

        def make(kind: str = "llama", **options: Any) -> Engine:
            log = tmp_path_factory.mktemp("engine") / "log"
            options.setdefault("block_size", BLOCK_SIZES[kind])
            engine = Engine(model(kind), log, **options)
            stack.callback(engine.close)
            return engine

        yield make


def make_prompt(num_tokens: int, seed: int = 0, shared: int = 0) -> list[int]:
    """Return a prompt whose first `shared` tokens are the same for every seed."""
    common, own = random.Random("shared"), random.Random(seed)
    return [
        (common if number < shared else own).randrange(4, 512)
        for number in range(num_tokens)
    ]


def generate_sequentially(
    engine: Engine, prompts: list[list[int]], max_tokens: int = 16
) -> Any:
    """Complete prompts one by one: the composition of a batch changes rounding."""
    answers = [engine.generate([prompt], max_tokens) for prompt in prompts]
    engine.call("settle")
    return {
        "tokens": [answer["tokens"][0] for answer in answers],
        "cached": [answer["cached"][0] for answer in answers],
    }
