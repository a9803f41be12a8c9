"""Prefetch from the file tier, with checksums, against plain direct reads.

Run as `PYTHONPATH=. python tests/benchmarks/prefetch.py FOLDER`, with FOLDER on the
disk to measure. Ratios are of alternating rounds.
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvcore.config import PrefetchConfig, WriteBackConfig
from kvcore.extents import buffers_of, checksum_of
from kvcore.keys import ChunkHash, SessionKey
from kvcore.layout import Fingerprint
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import PartId, PartName
from kvcore.storage.eviction import make_policy
from kvcore.storage.l1 import L1
from kvcore.storage.required_parts import RequiredPart, RequiredParts
from kvcore.tiers.direct_io import PAGE, file_bytes
from kvcore.tiers.tier_manager import TierManager, open_tiers

CHUNK_BYTES = 1 << 20
NUM_CHUNKS = 128
THREADS = 4
"""Threads of the file tier's loads, and of the plain reads."""
ROUNDS = 7
NAME = PartName("bench", 1, 0, 0, Fingerprint("0" * 16))
NEEDS = RequiredParts(1, (), (RequiredPart(PartId(0), NAME, CHUNK_BYTES, None),))
HASHES = [ChunkHash(i.to_bytes(32, "little")) for i in range(NUM_CHUNKS)]


def spread(values: list[float]) -> str:
    """Return median and range as text."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f} [{low:.2f}..{high:.2f}]"


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll a condition until it is true."""
    while not condition():
        time.sleep(0.002)


@contextmanager
def filled(folder: Path) -> Iterator[tuple[Arena, L1, TierManager]]:
    """A manager whose file tier has all chunks."""
    arena = Arena(2 * NUM_CHUNKS * CHUNK_BYTES, 64 << 10)
    l1 = L1(arena, make_policy("lru"))
    tiers = open_tiers([f"file://{folder}/tier?threads={THREADS}&timeout=60"])
    manager = TierManager(l1, arena, tiers, PrefetchConfig(), WriteBackConfig())
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


def prefetch_s(l1: L1, manager: TierManager) -> float:
    """Return the seconds from the task until all chunks are in L1."""
    wait_for(lambda: l1.stats().num_held == 0)
    l1.drop(HASHES)
    start = time.perf_counter()
    job = manager.prefetch(
        HASHES,
        NEEDS,
        chunk_size=256,
        deadline=time.monotonic() + 60,
        owner=SessionKey("bench", "bench"),
    )
    job.future.result()
    took = time.perf_counter() - start
    if len(l1.present(HASHES, 1)) != NUM_CHUNKS:
        raise SystemExit("not everything was loaded")
    manager.prefetcher.settle(job)
    return took


def direct_s(files: list[Path], targets: list[list[memoryview]]) -> float:
    """Return the seconds to read the files with O_DIRECT, with as many threads."""

    def read(index: int) -> None:
        fd = os.open(files[index], os.O_RDONLY | os.O_DIRECT)
        try:
            if os.preadv(fd, targets[index], 0) != file_bytes(CHUNK_BYTES):
                raise SystemExit("a short read")
        finally:
            os.close(fd)

    with ThreadPoolExecutor(THREADS) as pool:
        start = time.perf_counter()
        list(pool.map(read, range(len(files))))
        return time.perf_counter() - start


def targets_in(arena: Arena, l1: L1, headers: memoryview) -> list[list[memoryview]]:
    """Return each file's buffers: its header aside, its chunk in L1's memory."""
    return [
        [
            headers[index * PAGE : (index + 1) * PAGE],
            *buffers_of(arena.array.data, chunk.parts[PartId(0)].extents),
        ]
        for index, chunk in enumerate(l1.present(HASHES, 1))
    ]


def prefetch_share(folder: Path) -> None:
    """Prefetch of 128 MiB against plain reads of the same files to the same memory.

    The location of files on the disk and of memory changes the speed by up to a factor
    of three, so both sides of a run use the same.
    """
    headers = memoryview(mmap.mmap(-1, NUM_CHUNKS * PAGE))
    with filled(folder) as (arena, l1, manager):
        files = sorted((folder / "tier").glob("??/*"))
        os.sync()
        shares, speeds = [], []
        for number in range(ROUNDS):
            # The first of a pair alternates.
            if number % 2:
                plain = direct_s(files, targets_in(arena, l1, headers))
                ours = prefetch_s(l1, manager)
            else:
                ours = prefetch_s(l1, manager)
                plain = direct_s(files, targets_in(arena, l1, headers))
            shares.append(plain / ours)
            speeds.append(NUM_CHUNKS * CHUNK_BYTES / ours / 1e9)
    print(f"prefetch / plain O_DIRECT read: {spread(shares)}, {spread(speeds)} GB/s")


def main() -> None:
    """Measure and print."""
    # A tier filled by an earlier run would write nothing.
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        prefetch_share(Path(folder))


if __name__ == "__main__":
    main()
