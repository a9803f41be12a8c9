"""A file tier across servers: chunks of one server are loaded by a later one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK, Server, connect, wait_until
from tests.system.test_ranks import HYBRID
from tests.system.worker_process import BLOCK, PLAIN, Group, Worker

PER_CHUNK = CHUNK // BLOCK
SMALL = ("--l1-size", "64KiB")
"""Room for sixteen pages: eight chunks of one plain rank."""

Serve = Callable[..., Server]
StartWorker = Callable[[str], Worker]


@pytest.fixture
def tier(tmp_path: Path) -> str:
    """The URL of a new file tier."""
    return f"file://{tmp_path}/tier"


@contextmanager
def connected(server: Server) -> Iterator[KVClient]:
    """A client; at its end the server must hold nothing for it."""
    with connect(server.address, label="test", timeout_s=20) as client:
        yield client
        wait_until(lambda: is_idle(client))


def is_idle(client: KVClient) -> bool:
    """Return whether no chunk is leased, reserved, loaded or written."""
    status = client.status()
    writing = sum(tier.write_back.num_parts for tier in status.tiers)
    held = (status.num_leases, status.l1.num_leased, status.l1.num_reserved)
    return (status.num_prefetches, writing, *held) == (0, 0, 0, 0, 0)


def counter(client: KVClient, name: str) -> int:
    """Return one of the server's counters."""
    return client.status().counters[name]


def written(client: KVClient) -> int:
    """Return the number of parts written to the tiers."""
    return sum(tier.counters["stored"] for tier in client.status().tiers)


def chunk_blocks(num_chunks: int, first: int = 0) -> list[int]:
    """Return the block ids of `num_chunks` chunks."""
    return list(range(first * PER_CHUNK, (first + num_chunks) * PER_CHUNK))


def start_workers(
    start_worker: StartWorker,
    server: Server,
    model: str,
    groups: tuple[Group, ...],
    ranks: int,
) -> list[Worker]:
    """One worker per rank, each with its own bytes."""
    workers = [start_worker(server.address) for _ in range(ranks)]
    for rank, worker in enumerate(workers):
        worker.receive()
        worker.call("register", f"i{rank}", model, groups, rank=rank, world_size=ranks)
        worker.call("fill", f"i{rank}", list(range(64)), 7 + rank)
    return workers


@pytest.mark.parametrize(
    ("groups", "ranks"),
    [
        pytest.param(PLAIN, 1, id="plain-1"),
        pytest.param(PLAIN, 2, id="plain-2", marks=pytest.mark.long),
        pytest.param(HYBRID, 1, id="hybrid-1", marks=pytest.mark.long),
        pytest.param(HYBRID, 2, id="hybrid-2"),
    ],
)
def test_a_later_server_serves_what_an_earlier_one_stored(
    serve: Serve,
    start_worker: StartWorker,
    prompt: Prompt,
    tier: str,
    model: str,
    ranks: int,
    groups: tuple[Group, ...],
) -> None:
    """All ranks and groups, byte for byte, in other blocks."""
    tokens, stored = prompt(5 * CHUNK), chunk_blocks(5)
    first = serve("--tier", tier)
    truth = []
    with connected(first) as client:
        workers = start_workers(start_worker, first, model, groups, ranks)
        session = SessionKey("engine", "writer")
        for rank, worker in enumerate(workers):
            lists = [stored] * len(groups)
            worker.call("store", session, f"i{rank}", 0, len(tokens), lists, tokens)
            truth.append(
                [worker.call("read", f"i{rank}", stored, g) for g in range(len(groups))]
            )
        client.end_session(session)
        wait_until(lambda: written(client) == 5 * ranks * len(groups))
        for worker in workers:
            worker.close()
    assert first.stop() == 0

    second = serve("--tier", tier)
    with connected(second) as client:
        workers = start_workers(start_worker, second, model, groups, ranks)
        session = SessionKey("engine", "reader")
        found = client.lookup(session, model, ranks, tokens)
        assert (found.num_chunks, found.num_from_tiers) == (5, 5)
        again = client.lookup(SessionKey("engine", "again"), model, ranks, tokens)
        assert (again.num_chunks, again.num_from_tiers) == (5, 0)
        client.end_session(SessionKey("engine", "again"))
        target = chunk_blocks(5, first=8)
        for rank, worker in enumerate(workers):
            worker.call("poison", f"i{rank}", target)
            lists = [masked(target, group, 5) for group in groups]
            worker.call("retrieve", session, f"i{rank}", 0, len(tokens), lists)
            for g, ids in enumerate(lists):
                there = [i for i, block in enumerate(ids) if block >= 0]
                seen = worker.call("read", f"i{rank}", [ids[i] for i in there], g)
                assert np.array_equal(seen, truth[rank][g][there])
        client.end_session(session)
        loaded = sum(window_chunks(group, 5) for group in groups) * ranks
        assert counter(client, "parts_prefetched") == loaded


def test_a_prefetch_goes_on_after_its_lookup_was_answered(
    serve: Serve, start_worker: StartWorker, prompt: Prompt, tier: str, model: str
) -> None:
    """The first answer comes at its deadline; a later lookup finds all of it."""
    tokens = prompt(4 * CHUNK)
    first = serve("--tier", tier)
    with connected(first) as client:
        [worker] = start_workers(start_worker, first, model, PLAIN, 1)
        session = SessionKey("engine", "writer")
        worker.call("store", session, "i0", 0, len(tokens), [chunk_blocks(4)], tokens)
        truth = worker.call("read", "i0", chunk_blocks(4))
        client.end_session(session)
        wait_until(lambda: written(client) == 4)
    assert first.stop() == 0

    second = serve("--tier", tier, "--set", "prefetch.deadline_s=0.0001")
    with connected(second) as client:
        [worker] = start_workers(start_worker, second, model, PLAIN, 1)
        session = SessionKey("engine", "reader")
        assert client.lookup(session, model, 1, tokens).num_chunks <= 4
        wait_until(lambda: counter(client, "parts_prefetched") == 4)
        wait_until(lambda: client.status().num_prefetches == 0)
        assert client.lookup(session, model, 1, tokens).num_chunks == 4
        assert counter(client, "prefetches") == 1
        worker.call(
            "retrieve", session, "i0", 0, len(tokens), [chunk_blocks(4, first=4)]
        )
        assert np.array_equal(
            worker.call("read", "i0", chunk_blocks(4, first=4)), truth
        )
        client.end_session(session)


def window_chunks(group: Group, num_chunks: int) -> int:
    """Chunks of a group that a hit reads."""
    return num_chunks if group.window is None else -(-group.window // CHUNK)


def masked(blocks: list[int], group: Group, num_chunks: int) -> list[int]:
    """Set the blocks before the window's chunks to null."""
    null = (num_chunks - window_chunks(group, num_chunks)) * PER_CHUNK
    return [-1] * null + blocks[null:]
