"""Time from a scheduler's lookup to a worker's first bytes, through a real server.

    python -m tests.gpu.bench_first_byte

A new session looks up 256 chunks of L1 in one request, then retrieves the first of them
into GPU memory: the earliest bytes that a worker can have.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import numpy as np

from kvcore.keys import SessionKey
from tests.gpu.gpu_worker import GpuWorkerCommands
from tests.system.server_fixture import CHUNK, Server
from tests.system.worker_process import BLOCK, Group

NUM_CHUNKS = 256
ROUNDS = 50
WARM_UP_ROUNDS = 5
GROUPS = (Group(shape=(8, 2, 0, BLOCK, 1024)),)
"""A chunk has 1 MiB in pieces of 16 KiB."""
L1 = ("--l1-size", "320MiB")


def run(address: str) -> dict[str, float]:
    """Store the chunks, then time lookups and retrieves."""
    commands = GpuWorkerCommands(address, "first-byte")
    try:
        num_blocks = NUM_CHUNKS * CHUNK // BLOCK
        tokens = np.random.default_rng(0).integers(1 << 31, size=NUM_CHUNKS * CHUNK)
        tokens = tokens.astype(np.uint32)
        blocks = np.random.default_rng(1).permutation(num_blocks).astype(np.int32)
        commands.register("a", "model", GROUPS, num_blocks=num_blocks)
        first = SessionKey("engine", "store")
        stored = commands.client.store(first, "a", 0, len(tokens), [blocks], tokens)
        commands.client.end_session(first)
        taken = [_round(commands, number, tokens, blocks) for number in range(ROUNDS)]
    finally:
        commands.close()
    looked_up, whole = zip(*taken[WARM_UP_ROUNDS:], strict=True)
    return {
        "chunks": stored.num_stored,
        "lookup_s": median(looked_up),
        "first_byte_s": median(whole),
        "first_byte_p90_s": quantiles(whole, n=10)[-1],
    }


def _round(
    commands: GpuWorkerCommands, number: int, tokens: np.ndarray, blocks: np.ndarray
) -> tuple[float, float]:
    session = SessionKey("engine", f"round {number}")
    begun = perf_counter()
    found = commands.client.lookup(session, "model", 1, tokens)
    looked_up = perf_counter() - begun
    commands.client.retrieve(session, "a", 0, CHUNK, [blocks[: CHUNK // BLOCK]])
    whole = perf_counter() - begun
    assert found.num_chunks == NUM_CHUNKS
    commands.client.end_session(session)
    return looked_up, whole


def main() -> None:
    """Start a server and measure."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), "--device", "cuda", *L1)
        try:
            print(json.dumps(run(server.address)), flush=True)
        finally:
            server.close()


if __name__ == "__main__":
    main()
