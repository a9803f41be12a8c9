"""STORE and RETRIEVE of 64 MiB through a real server, beside a plain copy.

Run as `python tests/benchmarks/bandwidth.py [rounds]`: for pieces of 32 KiB, 4 KiB and
512 B, scattered, prints GB/s from call to reply and the share of a plain copy of the
same bytes between warm shared memory in the same process and round.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import numpy as np
from wire import served

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import PosixShm, RegisterKVCache
from kvcore.shm import Segment

NUM_LAYERS = 8
BLOCK_SIZE = 16
MOVED = 64 << 20
CACHE = 256 << 20


class Bench:
    """One cache whose pieces have a size, registered with a server."""

    def __init__(self, client: KVClient, segment: Segment, piece: int) -> None:
        self.client = client
        self.piece = piece
        plane = 2 * NUM_LAYERS * piece
        self.num_blocks = CACHE // plane
        self.num_moved = MOVED // plane
        token = piece // BLOCK_SIZE
        shape = (2, self.num_blocks, BLOCK_SIZE, 1, token // 2)
        strides = (self.num_blocks * piece, piece, token, token, 2)
        step = 2 * self.num_blocks * piece
        views = tuple(
            TensorView(0, layer * step, shape, strides) for layer in range(NUM_LAYERS)
        )
        self.name = f"piece-{piece}"
        group = CacheGroup("KNSHD", "float16", BLOCK_SIZE, views)
        handle = PosixShm(segment.name, 0, segment.num_bytes)
        client.register_kv_cache(
            RegisterKVCache(self.name, "bench", self.name, 1, 0, (handle,), (group,))
        )
        self.rng = np.random.default_rng(piece)

    def round(self, number: int) -> tuple[float, float]:
        """Store a new prompt, retrieve it; return seconds of each."""
        num_tokens = self.num_moved * BLOCK_SIZE
        tokens = self.rng.integers(0, 128000, num_tokens, dtype=np.uint32)
        order = self.rng.permutation(self.num_blocks).astype(np.int32)
        session = SessionKey("bench", f"{self.name}-{number}")
        # The scheduler's lookup has brought the tokens, as with a real engine.
        self.client.lookup(session, self.name, 1, tokens)
        start = time.perf_counter()
        stored = self.client.store(
            session, self.name, 0, num_tokens, [order[: self.num_moved]], tokens
        )
        middle = time.perf_counter()
        self.client.retrieve(
            session, self.name, 0, num_tokens, [order[-self.num_moved :]], tokens
        )
        end = time.perf_counter()
        self.client.end_session(session)
        if stored.num_dropped or stored.num_present:
            raise SystemExit(f"not everything was stored: {stored}")
        return middle - start, end - middle


def plain(source: np.ndarray, target: np.ndarray) -> float:
    """Copy as much in one piece; return seconds."""
    start = time.perf_counter()
    np.copyto(target[:MOVED], source[:MOVED])
    return time.perf_counter() - start


def gbs(seconds: list[float]) -> float:
    """Median rate."""
    return MOVED / statistics.median(seconds) / 1e9


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    name = f"kvbench-{os.getpid()}"
    with (
        served("--l1-size", "512MiB") as address,
        KVClient(address) as client,
        Segment.create(name, CACHE, touch=True) as cache,
        Segment.create(f"{name}-b", MOVED, touch=True) as other,
    ):
        cache.array[:] = 1
        for piece in (32 << 10, 4 << 10, 512):
            bench = Bench(client, cache, piece)
            rows = []
            for number in range(rounds + 3):
                copy = plain(cache.array, other.array)
                rows.append((copy, *bench.round(number)))
            copies, stores, retrieves = (
                list(column) for column in zip(*rows[3:], strict=True)
            )
            share = [
                statistics.median(c / t for c, t in zip(copies, times, strict=True))
                for times in (stores, retrieves)
            ]
            print(
                f"{piece:6d} B pieces: plain copy {gbs(copies):.2f} GB/s, STORE "
                f"{gbs(stores):.2f} ({share[0]:.0%}), RETRIEVE {gbs(retrieves):.2f} "
                f"({share[1]:.0%})",
                flush=True,
            )
            client.unregister_kv_cache(bench.name)
        cache.unlink()
        other.unlink()


if __name__ == "__main__":
    main()
