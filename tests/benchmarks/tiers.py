"""Prefetch against plain direct reads, checksums of stores, lookups beside it all.

Run as `PYTHONPATH=. python tests/benchmarks/tiers.py FOLDER`, with FOLDER on the disk
that is meant. Ratios are of rounds that take turns. A script and not a test, since it
decides nothing.
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from kvcore.client import KVClient
from kvcore.config import PrefetchConfig, WriteBackConfig
from kvcore.errors import KVError
from kvcore.keys import ChunkHash, SessionKey
from kvcore.layout import CacheGroup, Fingerprint, TensorView
from kvcore.parts import buffers_of, checksum_of
from kvcore.protocol import PosixShm, RegisterKVCache
from kvcore.shm import Segment
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import PartId, PartName
from kvcore.storage.eviction import make_policy
from kvcore.storage.l1 import L1
from kvcore.storage.manager import Manager, open_tiers
from kvcore.storage.needs import Needs, PartNeed
from tests.benchmarks.wire import Cycles, p50_us, register, served, store

CHUNK_BYTES = 1 << 20
NUM_CHUNKS = 128
THREADS = 4
"""Of the file tier's loads, and of the plain reads."""
ROUNDS = 7
NAME = PartName("bench", 1, 0, 0, Fingerprint("0" * 16))
NEEDS = Needs(1, (), (PartNeed(PartId(0), NAME, CHUNK_BYTES, None),))
HASHES = [ChunkHash(i.to_bytes(32, "little")) for i in range(NUM_CHUNKS)]


def spread(values: list[float]) -> str:
    """Median and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f} [{low:.2f}..{high:.2f}]"


def wait_for(condition: Callable[[], bool]) -> None:
    """Ask until it is so."""
    while not condition():
        time.sleep(0.002)


@contextmanager
def filled(folder: Path) -> Iterator[tuple[Arena, L1, Manager]]:
    """A manager whose file tier has all chunks."""
    arena = Arena(2 * NUM_CHUNKS * CHUNK_BYTES, 64 << 10)
    l1 = L1(arena, make_policy("lru"))
    tiers = open_tiers([f"file://{folder}/tier?threads={THREADS}&timeout=60"])
    manager = Manager(l1, arena, tiers, PrefetchConfig(), WriteBackConfig())
    arena.array[:] = np.random.default_rng(0).integers(0, 256, arena.total_bytes, "u1")
    got = l1.reserve(HASHES, PartId(0), CHUNK_BYTES, name=NAME)
    for each in got.reservations:
        each.checksum = checksum_of(buffers_of(arena.array.data, each.extents))
    l1.commit(got.reservations)
    manager.stored([each.chunk for each in got.reservations])
    counters = manager.write_back.counters
    wait_for(lambda: counters.parts_written == NUM_CHUNKS)
    try:
        yield arena, l1, manager
    finally:
        manager.close()
        l1.close()
        arena.close()


def prefetch_s(l1: L1, manager: Manager) -> float:
    """Seconds from the task to all chunks in L1."""
    wait_for(lambda: l1.stats().num_held == 0)
    l1.drop(HASHES)
    start = time.perf_counter()
    job = manager.submit_prefetch_task(
        HASHES,
        NEEDS,
        chunk_size=256,
        deadline=time.monotonic() + 60,
        owner=SessionKey("bench", "bench"),
        wait=True,
    )
    job.future.result()
    took = time.perf_counter() - start
    if len(l1.present(HASHES, 1)) != NUM_CHUNKS:
        raise SystemExit("not everything was loaded")
    manager.prefetcher.settle(job)
    return took


def direct_s(files: list[Path], targets: list[mmap.mmap]) -> float:
    """Seconds to read the same bytes with O_DIRECT, in as many threads."""

    def read(index: int) -> None:
        fd = os.open(files[index], os.O_RDONLY | os.O_DIRECT)
        try:
            if os.preadv(fd, [targets[index]], 0) != CHUNK_BYTES:
                raise SystemExit("a short read")
        finally:
            os.close(fd)

    with ThreadPoolExecutor(THREADS) as pool:
        start = time.perf_counter()
        list(pool.map(read, range(len(files))))
        return time.perf_counter() - start


def prefetch_share(folder: Path) -> None:
    """Prefetch of 128 MiB against plain reads of files of the same size."""
    files, targets = [], []
    for index in range(NUM_CHUNKS):
        path = folder / f"plain-{index}"
        path.write_bytes(os.urandom(CHUNK_BYTES))
        files.append(path)
        targets.append(mmap.mmap(-1, CHUNK_BYTES))
        targets[-1][:] = bytes(CHUNK_BYTES)
    os.sync()
    with filled(folder) as (_, l1, manager):
        shares, speeds = [], []
        for number in range(ROUNDS):
            # Taking turns at being first.
            if number % 2:
                plain = direct_s(files, targets)
                ours = prefetch_s(l1, manager)
            else:
                ours = prefetch_s(l1, manager)
                plain = direct_s(files, targets)
            shares.append(plain / ours)
            speeds.append(NUM_CHUNKS * CHUNK_BYTES / ours / 1e9)
    print(f"prefetch / plain O_DIRECT read: {spread(shares)}, {spread(speeds)} GB/s")


class Copies:
    """Stores 64 MiB in blocks of 32 KiB, again and again."""

    def __init__(self, client: KVClient, name: str) -> None:
        self.client, self.name = client, name
        num_blocks = 1024
        shape = (2, num_blocks, 16, 2048)
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(4))
        self.segment = Segment.create(
            f"kvbench-{os.getpid()}-{name}", int(np.prod(shape)), touch=True
        )
        self.segment.array[:] = 7
        handle = PosixShm(self.segment.name, 0, self.segment.num_bytes)
        group = CacheGroup("KNSD", "uint8", 16, (TensorView(0, 0, shape, strides),))
        client.register_kv_cache(
            RegisterKVCache(name, name, name, 1, 0, (handle,), (group,))
        )
        self.blocks = np.random.default_rng(1).permutation(num_blocks).astype(np.int32)
        self.count = 0

    def __call__(self) -> float:
        """Store a new prompt; return seconds."""
        self.count += 1
        tokens = np.full(1024 * 16, self.count, np.uint32)
        session = SessionKey(self.name, str(self.count))
        start = time.perf_counter()
        self.client.store(session, self.name, 0, len(tokens), [self.blocks], tokens)
        took = time.perf_counter() - start
        self.client.end_session(session)
        return took

    def close(self) -> None:
        """Remove the cache."""
        self.segment.unlink()
        self.segment.close()


def checksum_cost() -> None:
    """A store with checksums against one without, on two servers in turn."""
    size = ("--l1-size", "512MiB")
    with (
        served(*size) as plain,
        served(*size, "--set", "l1.verify=true") as summing,
        KVClient(plain) as first,
        KVClient(summing) as second,
    ):
        sides = Copies(first, "plain"), Copies(second, "sums")
        target = np.empty_like(sides[0].segment.array)
        for _ in range(10):
            sides[0](), sides[1]()
        ratios, shares = [], []
        for _ in range(20):
            without, with_sums = sides[0](), sides[1]()
            start = time.perf_counter()
            np.copyto(target, sides[0].segment.array)
            shares.append((time.perf_counter() - start) / with_sums)
            ratios.append(without / with_sums)
        for side in sides:
            side.close()
    print(f"STORE speed with checksums / without: {spread(ratios)}")
    print(f"STORE with checksums / plain copy: {spread(shares)}")


def load(address: str, stop: threading.Event) -> None:
    """Store new prompts, which are written back, and look up evicted ones."""
    with suppress(KVError), KVClient(address) as client:
        copies = Copies(client, "load")
        while not stop.is_set():
            copies()
            old = np.full(1024 * 16, max(1, copies.count - 6), np.uint32)
            session = SessionKey("load", f"again-{copies.count}")
            client.lookup(session, "load", 1, old)
            client.end_session(session)
            stop.wait(0.05)
        copies.close()


def lookups_beside(folder: Path) -> None:
    """An 8k lookup of L1 alone, beside stores, and beside stores with a tier."""
    for tiers in ((), ("--tier", f"file://{folder}/beside?max=2GiB")):
        with (
            served("--l1-size", "512MiB", *tiers) as address,
            KVClient(address) as client,
        ):
            segment = Segment.create(f"kvbench-{os.getpid()}", 16 << 20, touch=True)
            register(client, segment)
            store(client, 8192)
            cycles = Cycles(client, 8192, "hits")
            p50_us(cycles, 0.5)
            medians = []
            for _ in range(ROUNDS):
                alone = lookup_us(cycles)
                process = os.fork()
                if not process:
                    os.execv(
                        sys.executable,
                        [sys.executable, __file__, "--load", address],
                    )
                lookup_us(cycles)  # Until the load is under way.
                lookup_us(cycles)
                beside = lookup_us(cycles)
                os.kill(process, 15)
                os.waitpid(process, 0)
                medians.append(beside / alone)
            what = "stores, write-back and prefetch" if tiers else "stores alone"
            print(f"8k lookup in L1 beside {what} / alone: {spread(medians)}")
            if tiers:
                counters = client.status().counters
                print(
                    f"  meanwhile {counters['bytes_written'] >> 20} MiB written back, "
                    f"{counters['bytes_prefetched'] >> 20} MiB prefetched"
                )
            segment.unlink()
            segment.close()


def lookup_us(cycles: Cycles) -> float:
    """Median of a lookup over a second."""
    cycles.lookups.clear()
    p50_us(cycles, 1.0)
    return statistics.median(cycles.lookups) * 1e6


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2], threading.Event())
        return
    folder = Path(sys.argv[1])
    prefetch_share(folder)
    checksum_cost()
    lookups_beside(folder)


if __name__ == "__main__":
    main()
