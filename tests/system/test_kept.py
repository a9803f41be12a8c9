"""L1 across restarts: a server killed under load serves what it had committed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvcore.client import KVClient
from kvcore.errors import KVError, SetupError
from kvcore.keys import SessionKey
from kvcore.protocol import RegisterKVCache
from kvcore.shm import SHM_DIR, Segment
from kvcore.storage.recovery import arena_name
from tests.system.fork_server import fork_server, run_command
from tests.system.server_fixture import CHUNK, Server, connect
from tests.system.worker_process import BLOCK, PLAIN, Cache

PER_CHUNK = CHUNK // BLOCK
MODEL = "kept"
NUM_CHUNKS = 4
"""Chunks per prompt."""

Serve = Callable[..., Server]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Path]:
    """A journal's path; its arena is removed after the test."""
    path = tmp_path / "journal"
    yield path
    (SHM_DIR / arena_name(path)).unlink(missing_ok=True)


def tokens_of(number: int) -> npt.NDArray[np.uint32]:
    """Return the tokens of a prompt."""
    return np.full(NUM_CHUNKS * CHUNK, number, np.uint32)


def bytes_of(number: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return the bytes of a prompt's blocks."""
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


@contextmanager
def registered(address: str, name: str) -> Iterator[tuple[KVClient, Cache]]:
    """A client with a cache of one prompt's size."""
    cache = Cache(f"kvtest-{os.getpid()}-{name}", PLAIN, NUM_CHUNKS * PER_CHUNK)
    try:
        with connect(address, timeout_s=20) as client:
            client.register_kv_cache(
                RegisterKVCache(
                    name, "engine", MODEL, 1, 0, cache.handles, cache.groups
                )
            )
            yield client, cache
    finally:
        cache.close()


def store_on(address: str, first: int, sent: Connection) -> None:
    """Store prompts until the server is gone; send the number of each stored one."""
    with suppress(KVError), registered(address, f"w{first}") as (client, cache):
        blocks = [list(range(NUM_CHUNKS * PER_CHUNK))]
        view = cache.views[0]
        for number in range(first, first + 1_000_000):
            view[:] = bytes_of(number, view.shape)
            session = SessionKey("engine", f"s{number}")
            tokens = tokens_of(number)
            client.store(
                session, f"w{first}", 0, len(tokens), blocks, tokens, timeout_s=2
            )
            sent.send(number)
            client.submit_end_session(session)


def receive_all(pipe: Connection) -> Iterator[int]:
    """Yield the numbers that a loader sent before it ended."""
    with suppress(EOFError):
        while True:
            yield pipe.recv()


def kill_under_load(server: Server, num_stores: int, first: int) -> list[int]:
    """Kill the server while two processes store; return the stored prompts.

    The kill waits until the first process has stored `num_stores` prompts.
    """
    context = fork_server()
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    loaders = [
        context.Process(
            target=store_on, args=(server.address, first + 10**7 * i, writer)
        )
        for i, (_, writer) in enumerate(pipes)
    ]
    for loader, (_, writer) in zip(loaders, pipes, strict=True):
        loader.start()
        writer.close()
    first_pipe = pipes[0][0]
    # Both have connected: a client that still connects would wait for a server.
    stored = [pipe.recv() for pipe, _ in pipes]
    stored += [first_pipe.recv() for _ in range(num_stores)]
    server.kill()
    for loader, (pipe, _) in zip(loaders, pipes, strict=True):
        stored += receive_all(pipe)
        loader.join(20)
        assert loader.exitcode == 0
    return stored


def count_served(client: KVClient, cache: Cache, numbers: list[int]) -> int:
    """Retrieve and compare the found chunks of each prompt; return their number."""
    found = 0
    view = cache.views[0]
    for number in numbers:
        session = SessionKey("engine", f"r{number}")
        tokens = tokens_of(number)
        reply = client.lookup(session, MODEL, 1, tokens)
        found += reply.num_chunks
        if reply.num_tokens:
            view[:] = 0
            ids = [list(range(reply.num_chunks * PER_CHUNK))]
            client.retrieve(session, "reader", 0, reply.num_tokens, ids)
            expected = bytes_of(number, view.shape)
            num_blocks = len(ids[0])
            assert np.array_equal(view[:num_blocks], expected[:num_blocks])
        client.end_session(session)
    return found


def crash_and_check(
    serve: Serve, journal: Path, rng: random.Random, *, evicts: bool = False
) -> None:
    """Kill three runs in a row; each finds what those before it acknowledged."""
    size = "1MiB" if evicts else "8MiB"
    options = ("--set", f"l1.keep={journal}", "--l1-size", size)
    server = serve(*options)
    known: list[int] = []
    for run in range(3):
        known += kill_under_load(server, rng.randint(1, 12), first=run * 10**4)
        server = server.restart()
        recent = known[-40:]
        with registered(server.address, "reader") as (client, cache):
            found = count_served(client, cache, recent)
            status = client.status()
        assert evicts or found == NUM_CHUNKS * len(recent)
        assert status.l1.num_reserved == 0
    server.close()


@pytest.mark.long
def test_a_killed_server_serves_what_it_had_committed(
    serve: Serve, journal: Path
) -> None:
    """All acknowledged stores, byte for byte, and nothing half written."""
    crash_and_check(serve, journal, random.Random(0))


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(100, 135))
def test_many_killed_servers(serve: Serve, journal: Path, seed: int) -> None:
    """A hundred kills at random points, some with constant eviction."""
    crash_and_check(serve, journal, random.Random(seed), evicts=seed % 2 == 0)


def test_a_clean_stop_keeps_chunks(serve: Serve, journal: Path) -> None:
    """A server stopped with SIGTERM keeps its chunks for the next one."""
    options = ("--set", f"l1.keep={journal}")
    first = serve(*options)
    with registered(first.address, "reader") as (client, cache):
        cache.views[0][:] = bytes_of(1, cache.views[0].shape)
        blocks = [list(range(NUM_CHUNKS * PER_CHUNK))]
        tokens = tokens_of(1)
        client.store(SessionKey("e", "1"), "reader", 0, len(tokens), blocks, tokens)
    assert first.stop() == 0
    second = serve(*options)
    with registered(second.address, "reader") as (client, cache):
        assert count_served(client, cache, [1]) == NUM_CHUNKS
    assert second.stop() == 0


@pytest.mark.parametrize(
    ("folder", "more"),
    [
        pytest.param("nowhere", (), marks=pytest.mark.long),
        pytest.param(".", ("--tier", "nothing://"), marks=pytest.mark.long),
        (".", ("--ready-file", "/nowhere/ready")),
    ],
)
def test_a_start_that_fails_keeps_nothing(
    journal: Path, folder: str, more: tuple[str, ...]
) -> None:
    """No journal, no such tier, no ready file: exit code 2, and no memory taken."""
    path = journal.parent / folder / journal.name
    done = run_command("serve", "--port", "0", "--set", f"l1.keep={path}", *more)
    assert done.returncode == 2
    assert not (SHM_DIR / arena_name(path)).exists()


def test_wrong_bytes_are_a_miss_at_retrieve(serve: Serve, journal: Path) -> None:
    """With l1.verify flipped bits are found, their chunks dropped, and counted."""
    server = serve("--set", f"l1.keep={journal}", "--set", "l1.verify=true")
    arena = arena_name(journal)
    with registered(server.address, "reader") as (client, cache):
        cache.views[0][:] = bytes_of(5, cache.views[0].shape)
        blocks = [list(range(NUM_CHUNKS * PER_CHUNK))]
        tokens = tokens_of(5)
        session = SessionKey("engine", "5")
        client.store(session, "reader", 0, len(tokens), blocks, tokens)
        size = (SHM_DIR / arena).stat().st_size
        assert client.lookup(session, MODEL, 1, tokens).num_chunks == NUM_CHUNKS
        with suppress(SetupError):
            memory = Segment.attach(arena, offset=0, length=size)
            memory.array[:] ^= 1
            memory.close()
        cache.views[0][:] = 0
        with pytest.raises(KVError, match="found wrong"):
            client.retrieve(session, "reader", 0, len(tokens), blocks)
        assert not cache.views[0].any()
        client.end_session(session)
        assert client.lookup(session, MODEL, 1, tokens).num_chunks == 0
        assert client.status().counters["chunks_corrupt"] == NUM_CHUNKS
        client.end_session(session)
    server.close()
