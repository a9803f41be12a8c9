"""Server-driven and worker-driven copies, alternating in one run.

Run as `python tests/benchmarks/drivers.py [rounds]`: a STORE and a RETRIEVE of 1, 8 and
64 MiB in scattered pieces of 32 KiB by each driver, and a plain copy of as many bytes,
in each round. Prints median and quartiles of the rounds' ratios.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
from bandwidth import BLOCK_SIZE, CACHE, NUM_LAYERS, Bench
from wire import served

from kvcore.client import KVClient
from kvcore.shm import Bytes, Segment
from kvcore.worker.copying_client import CopyingClient

PIECE = 32 << 10
BLOCK_BYTES = 2 * NUM_LAYERS * PIECE
WARM_UP = 5


def copied(memory: Bytes, size: int) -> float:
    """Copy as many bytes at once; return seconds."""
    start = time.perf_counter()
    np.copyto(memory[:size], memory[-size:])
    return time.perf_counter() - start


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """Return median and quartiles of the ratios of two series."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def compare(size: int, rounds: int, server: Bench, worker: Bench, cache: Bytes) -> None:
    """Measure one size and print it."""
    series: dict[str, list[float]] = {}
    for number in range(rounds + WARM_UP):
        series.setdefault("copy", []).append(copied(cache, size))
        pair = (server, worker) if number % 2 else (worker, server)
        for bench in pair:
            bench.num_moved = size // BLOCK_BYTES
            store, retrieve = bench.round(number + size)
            by = "server" if bench is server else "worker"
            series.setdefault(f"store by {by}", []).append(store)
            series.setdefault(f"retrieve by {by}", []).append(retrieve)
    warm = {name: times[WARM_UP:] for name, times in series.items()}
    print(f"{size >> 20} MiB, {rounds} rounds:")
    for what in ("store", "retrieve"):
        ours, theirs = warm[f"{what} by worker"], warm[f"{what} by server"]
        print(f"  {what:8} worker / server {ratio(ours, theirs)}")
        print(f"  {what:8} copy / worker   {ratio(warm['copy'], ours)}")
        print(f"  {what:8} copy / server   {ratio(warm['copy'], theirs)}", flush=True)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    options = ("--l1-size", "512MiB", "--chunk-size", str(2 * BLOCK_SIZE))
    with (
        served(*options) as address,
        KVClient(address) as one,
        CopyingClient(address) as other,
        Segment.create(f"kvbench-{os.getpid()}", CACHE, touch=True) as cache,
    ):
        cache.array[:] = 1
        server = Bench(one, cache, PIECE, "server")
        worker = Bench(other, cache, PIECE, "worker")
        for size in (1 << 20, 8 << 20, 64 << 20):
            compare(size, rounds, server, worker, cache.array)
        other.unregister_kv_cache(worker.name)


if __name__ == "__main__":
    main()
