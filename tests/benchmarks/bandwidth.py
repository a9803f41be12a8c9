"""STORE and RETRIEVE of 64 MiB through a real server, against a plain copy.

Run as `python tests/benchmarks/bandwidth.py [rounds]`: for pieces of 32 KiB, 4 KiB and
512 B, scattered, prints GB/s from call to reply and the share of a plain copy of the
same bytes between warm shared memory in the same process and round. Four servers
alternate: without checksums, with them (it has a tier that receives no writes), and
both with one thread per copy.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from wire import served

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import PosixShm, RegisterKVCache
from kvcore.shm import Segment
from kvcore.worker.copying_client import CopyingClient

NUM_LAYERS = 8
BLOCK_SIZE = 16
MOVED = 64 << 20
CACHE = 256 << 20
WARM_UP = 12
"""Rounds until a server has touched all pages of the cache."""


class Bench:
    """A registered cache with one size of contiguous pieces."""

    def __init__(
        self, client: KVClient, segment: Segment, piece: int, name: str = "piece"
    ) -> None:
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
        self.name = f"{name}-{piece}"
        group = CacheGroup("KNSHD", "float16", BLOCK_SIZE, views)
        handle = PosixShm(segment.name, 0, segment.num_bytes)
        request = RegisterKVCache(
            self.name, "bench", self.name, 1, 0, (handle,), (group,)
        )
        if isinstance(client, CopyingClient):
            client.register_kv_cache(request, (segment.array,))
        else:
            client.register_kv_cache(request)
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
    """Copy as many bytes at once; return seconds."""
    start = time.perf_counter()
    np.copyto(target[:MOVED], source[:MOVED])
    return time.perf_counter() - start


def shares(copies: list[float], times: list[float]) -> str:
    """Return median and range of the shares of each round's plain copy."""
    each = [copy / took for copy, took in zip(copies, times, strict=True)]
    return f"{statistics.median(each):.0%} [{min(each):.0%}..{max(each):.0%}]"


@contextmanager
def servers(folder: str) -> Iterator[dict[str, KVClient]]:
    """Start a server of each kind and connect to it."""
    with ExitStack() as stack:
        clients = {}
        for threads in (2, 1):
            for kind in ("", " with checksums"):
                options = ["--l1-size", "512MiB", "--set", f"copy_threads={threads}"]
                if kind:
                    options += ["--tier", f"file://{folder}/{threads}?max=1GiB"]
                    options += ["--set", "write_back.policy=on_second_use"]
                address = stack.enter_context(served(*options))
                client = stack.enter_context(KVClient(address))
                clients[f"{threads} thread(s){kind}"] = client
        yield clients


def compare(
    clients: dict[str, KVClient], cache: Segment, other: Segment, piece: int, num: int
) -> None:
    """Alternate between the servers for `num` measured rounds; print the results."""
    benches = {kind: Bench(client, cache, piece) for kind, client in clients.items()}
    rows: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in benches}
    for number in range(WARM_UP + num):
        for kind, bench in benches.items():
            row = plain(cache.array, other.array), *bench.round(number)
            if number >= WARM_UP:
                rows[kind].append(row)
    for kind, bench in benches.items():
        copies, stores, retrieves = map(list, zip(*rows[kind], strict=True))
        print(
            f"{piece:6d} B, {kind}: STORE {shares(copies, stores)}, RETRIEVE "
            f"{shares(copies, retrieves)} of "
            f"{MOVED / statistics.median(copies) / 1e9:.1f} GB/s",
            flush=True,
        )
        bench.client.unregister_kv_cache(bench.name)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    name = f"kvbench-{os.getpid()}"
    with (
        tempfile.TemporaryDirectory() as folder,
        servers(folder) as clients,
        Segment.create(name, CACHE, touch=True) as cache,
        Segment.create(f"{name}-b", MOVED, touch=True) as other,
    ):
        cache.array[:] = 1
        for piece in (32 << 10, 4 << 10, 512):
            compare(clients, cache, other, piece, rounds)
        cache.unlink()
        other.unlink()


if __name__ == "__main__":
    main()
