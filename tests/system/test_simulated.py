"""Simulated hits equal a server's hits, block for block."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from kvcore.storage.eviction import POLICIES, make_policy
from kvctl.lab.config.workload_config import Trace
from kvctl.lab.traces import trace_reader as reader
from kvctl.lab.traces.trace_rows import TraceRow, make_row
from kvctl.lab.workload.cache_simulation import SimulatedL1, number
from tests.system.server_fixture import Server, connect
from tests.system.worker_process import BLOCK, Group, Worker

PAGE = 4096
SMALL = (Group(shape=(1, 2, 0, BLOCK, 1)),)
"""32 bytes per block: a chunk of up to 2,048 tokens takes one page."""
TRACES = os.environ.get("KVCTL_TRACES")
REAL_ROWS = 400


def generated(size: int) -> list[TraceRow]:
    """Interleaved conversations with common prefixes, some abandoned."""
    rng = np.random.default_rng(5)
    talks = [[number] for number in range(1, 4)]
    rows, fresh = [], 100
    for line in range(250):
        talk = talks[min(rng.geometric(0.3) - 1, len(talks) - 1)]
        grown = [*talk[: rng.integers(1, len(talk) + 1)]]
        for _ in range(rng.integers(1, 6)):
            fresh += 1
            grown.append(fresh)
        talks.insert(0, grown[:16])
        rows.append(make_row(line, 0.0, len(grown) * size, 0, grown, size, None))
    return rows


def full_blocks(rows: list[TraceRow]) -> list[TraceRow]:
    """Cut every request after its last full block."""
    cut = []
    for row in rows:
        count = row.num_tokens // row.block_size
        tokens, ids = count * row.block_size, row.hash_ids[:count].tolist()
        if count:
            cut.append(make_row(row.line, 0.0, tokens, 0, ids, row.block_size, None))
    return cut


def simulated(rows: list[TraceRow], policy: str, capacity: int) -> list[int]:
    """Return the simulated hits of each request."""
    cache = SimulatedL1(make_policy(policy), capacity)
    return [cache.serve(ids.tolist()) for ids in number("cut", rows).blocks]


def served(
    rows: list[TraceRow], worker: Worker, client: KVClient, model: str
) -> list[int]:
    """Send requests one at a time; return the chunks that each lookup found."""
    longest = max(row.num_tokens for row in rows)
    worker.call("register", "a", model, SMALL, num_blocks=longest // BLOCK)
    hits = []
    for row in rows:
        session, tokens = SessionKey("engine", str(row.line)), row.tokens()
        found = client.lookup(session, model, 1, tokens)
        blocks = list(range(row.num_tokens // BLOCK))
        split = found.num_tokens // BLOCK
        if split:
            worker.call("retrieve", session, "a", 0, found.num_tokens, [blocks[:split]])
        if found.num_tokens < row.num_tokens:
            worker.call(
                *("store", session, "a", found.num_tokens, row.num_tokens),
                [blocks[split:]],
            )
        client.end_session(session)
        hits.append(found.num_chunks)
    return hits


def compare(
    rows: list[TraceRow],
    policy: str,
    capacity: int,
    serve: Callable[..., Server],
    start_worker: Callable[[str], Worker],
) -> None:
    """Replay rows on a server with room for `capacity` chunks, and simulate it."""
    options = {
        "--chunk-size": rows[0].block_size,
        "--l1-size": f"{capacity * PAGE}B",
        "--set": f"l1.eviction={policy}",
    }
    server = serve(*(str(part) for option in options.items() for part in option))
    worker = start_worker(server.address)
    worker.receive()
    with connect(server.address, label="test", timeout_s=20) as client:
        hits = served(rows, worker, client, "model")
        evicted = client.status().counters["chunks_evicted"]
    assert hits == simulated(rows, policy, capacity)
    assert evicted > capacity
    assert sum(hits)


@pytest.mark.parametrize(
    "policy",
    [
        name if name == "lru" else pytest.param(name, marks=pytest.mark.long)
        for name in sorted(POLICIES)
    ],
)
def test_a_generated_trace_hits_as_simulated(
    policy: str, serve: Callable[..., Server], start_worker: Callable[[str], Worker]
) -> None:
    """Each request has the simulated hits, through many evictions."""
    compare(generated(64), policy, 60, serve, start_worker)


@pytest.mark.skipif(
    TRACES is None, reason="KVCTL_TRACES does not name a folder of public traces"
)
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_cut_of_a_real_trace_hits_as_simulated(
    policy: str, serve: Callable[..., Server], start_worker: Callable[[str], Worker]
) -> None:
    """The same over the first requests of a real trace."""
    path = Path(TRACES or "", "mooncake_conversation.jsonl.zst")
    rows = reader.read(Trace(trace=str(path)))
    cut = full_blocks(list(islice(rows, REAL_ROWS)))
    compare(cut, policy, number("cut", cut).num_unique // 10, serve, start_worker)
