"""Lookups answered from L1, while tiers load and store for other clients.

Run as `PYTHONPATH=. python tests/benchmarks/beside.py FOLDER [rounds [rate]]`, with
FOLDER on the disk to measure. Lookups run back to back, or at `rate` per second. Quiet
and busy periods of half a second alternate:

- prefetch: another client looks up chunks that only the file tier has, in prompts of 64
  MiB; no client stores;
- reads elsewhere: an unrelated process reads the same files, which shows the machine's
  share of the first;
- write-back: 192 MiB stored before are written to the tier; no client stores;
- tiers: another client stores 64 MiB ten times per second and looks up evicted chunks,
  at a server with a file tier, and at one without, which is the quiet side.

Each line has the median over rounds of the ratios of medians and of 99th percentiles.
"""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import PosixShm, RegisterKVCache
from kvcore.shm import Segment
from tests.benchmarks.wire import Cycles, register, served, store

NUM_TOKENS = 16384
"""Of a prompt of the load: 64 chunks of 1 MiB."""
NUM_PROMPTS = 16
"""Twice what L1 holds."""
PERIOD_S = 0.5
READERS = 4
"""Threads, as many as the file tier loads with."""
L1 = ("--l1-size", "512MiB", "--set", "log_level=error")


class Load:
    """A client with a cache of 64 MiB that it stores as one prompt or another."""

    def __init__(self, address: str, name: str) -> None:
        self.client, self.name = KVClient(address), name
        shape = (2, NUM_TOKENS // 16, 16, 2048)
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(4))
        self.segment = Segment.create(
            f"kvbench-{os.getpid()}-{name}", int(np.prod(shape)), touch=True
        )
        self.segment.array[:] = 7
        handle = PosixShm(self.segment.name, 0, self.segment.num_bytes)
        group = CacheGroup("KNSD", "uint8", 16, (TensorView(0, 0, shape, strides),))
        self.client.register_kv_cache(
            RegisterKVCache(name, name, name, 1, 0, (handle,), (group,))
        )
        self.blocks = np.random.default_rng(1).permutation(shape[1]).astype(np.int32)

    def tokens(self, number: int) -> np.ndarray:
        """A prompt of its own for each number."""
        return np.full(NUM_TOKENS, number, np.uint32)

    def store(self, number: int) -> None:
        """Store a prompt."""
        session, tokens = SessionKey(self.name, f"s{number}"), self.tokens(number)
        self.client.store(session, self.name, 0, NUM_TOKENS, [self.blocks], tokens)
        self.client.end_session(session)

    def look_up(self, number: int) -> int:
        """Look a prompt up; return how many chunks were there or were loaded."""
        session = SessionKey(self.name, f"l{number}")
        reply = self.client.lookup(session, self.name, 1, self.tokens(number))
        self.client.end_session(session)
        return reply.num_chunks

    def settle(self) -> None:
        """Wait until no tier has anything to do."""
        while True:
            status = self.client.status()
            waiting = sum(tier.write_back.num_parts for tier in status.tiers)
            if not waiting and not status.num_prefetches:
                return
            time.sleep(0.005)

    def close(self) -> None:
        """Remove the cache."""
        self.client.close()
        self.segment.unlink()
        self.segment.close()


def say_ready() -> None:
    """Tell who started this process, and stand still until wanted."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    signal.raise_signal(signal.SIGSTOP)


def read_files(folder: str) -> None:
    """Read a tier's files until killed, as it does, into memory of this process."""
    files = list(Path(folder).glob("*/*"))

    def read(first: int) -> None:
        room = mmap.mmap(-1, files[0].stat().st_size)
        for index in itertools.count(first, READERS):
            fd = os.open(files[index % len(files)], os.O_RDONLY | os.O_DIRECT)
            os.preadv(fd, [room], 0)
            os.close(fd)

    say_ready()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))


def load(kind: str, address: str) -> None:
    """Act as the other client until killed; print a line when ready."""
    with_load = Load(address, "load")
    for number in range(NUM_PROMPTS if kind == "prefetch" else 0):
        with_load.store(number)
        with_load.settle()
    number = 0
    say_ready()
    while True:
        if kind == "tiers":
            with_load.store(number)
            with_load.look_up(max(0, number - 10))
            time.sleep(0.1)
        else:
            with_load.look_up(number % NUM_PROMPTS)
        number += 1


@contextmanager
def other_client(kind: str, address: str) -> Iterator[int]:
    """Start the load, stopped; yield its process id."""
    command = [sys.executable, __file__, "--load", kind, address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit("the load did not start")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        for path in Path("/dev/shm").glob(f"kvbench-{process.pid}-*"):
            path.unlink()


class Lookups:
    """A client whose prompt of 8k tokens is in L1 and stays there by use."""

    pause_s = 0.0
    """Seconds between the due times of lookups."""

    def __init__(self, address: str) -> None:
        self.client = KVClient(address)
        self.segment = Segment.create(
            f"kvbench-{time.monotonic_ns()}", 16 << 20, touch=True
        )
        register(self.client, self.segment)
        store(self.client, 8192)
        self.cycles = Cycles(self.client, 8192, "hits")

    def measure(self, goes_on: Callable[[], bool]) -> list[float]:
        """Look up while a condition holds; return the seconds of each lookup."""
        self.cycles.lookups = []
        due = time.monotonic()
        while goes_on():
            for _ in range(10 if self.pause_s else 50):
                due = max(time.monotonic(), due + self.pause_s)
                time.sleep(max(0, due - time.monotonic()))
                self.cycles()
        return self.cycles.lookups

    def period(self) -> list[float]:
        """Look up for a fixed time."""
        end = time.monotonic() + PERIOD_S
        return self.measure(lambda: time.monotonic() < end)

    def close(self) -> None:
        """Remove the cache."""
        self.client.close()
        self.segment.unlink()
        self.segment.close()


Round = tuple[list[float], list[float]]
"""Quiet and busy lookups."""


def beside_prefetch(folder: str, rounds: int) -> Iterator[Round]:
    """Yield lookups when quiet, and while others' chunks are loaded."""
    with served(*L1, "--tier", f"file://{folder}/prefetch") as address:
        lookups, watch = Lookups(address), Load(address, "watch")
        with other_client("prefetch", address) as pid:

            def loaded() -> int:
                return watch.client.status().counters["bytes_prefetched"]

            yield from beside_another(lookups, pid, rounds, loaded, watch.settle)
        lookups.close()
        watch.close()


def beside_reads(folder: str, rounds: int) -> Iterator[Round]:
    """Yield lookups when quiet, and while another process reads."""
    with served(*L1) as address:
        lookups = Lookups(address)
        with other_client("reads", f"{folder}/prefetch") as pid:

            def read() -> int:
                told = Path(f"/proc/{pid}/io").read_text()
                return int(told.split("read_bytes: ")[1].split()[0])

            yield from beside_another(lookups, pid, rounds, read, lambda: None)
        lookups.close()


def beside_another(
    lookups: Lookups,
    pid: int,
    rounds: int,
    moved: Callable[[], int],
    settle: Callable[[], None],
) -> Iterator[Round]:
    """Yield lookups while a process is stopped, and while it runs."""
    num_bytes, seconds = 0, 0.0
    for _ in range(rounds):
        settle()
        quiet = lookups.period()
        os.kill(pid, signal.SIGCONT)
        time.sleep(PERIOD_S / 5)
        before, start = moved(), time.monotonic()
        busy = lookups.period()
        num_bytes += moved() - before
        seconds += time.monotonic() - start
        os.kill(pid, signal.SIGSTOP)
        yield quiet, busy
    print(f"read {num_bytes / seconds / 1e9:.2f} GB/s")


def beside_write_back(folder: str, rounds: int) -> Iterator[Round]:
    """Yield lookups after and during the writes of a queue."""
    with served(*L1, "--tier", f"file://{folder}/back?max=2GiB") as address:
        lookups, stores = Lookups(address), Load(address, "stores")
        number = 0
        for _ in range(rounds):
            for _ in range(3):
                stores.store(number)
                number += 1

            def is_writing() -> bool:
                tiers = stores.client.status().tiers
                return any(tier.write_back.num_parts for tier in tiers)

            busy = lookups.measure(is_writing)
            yield lookups.period(), busy
        written = stores.client.status().counters["bytes_written"]
        print(f"written back {written >> 20} MiB")
        lookups.close()
        stores.close()


def beside_tiers(folder: str, rounds: int) -> Iterator[Round]:
    """Yield lookups beside stores and lookups at a server without tiers, and with."""
    tier = ("--tier", f"file://{folder}/tiers?max=2GiB")
    with ExitStack() as stack:
        addresses = [stack.enter_context(served(*L1, *t)) for t in ((), tier)]
        sides = [Lookups(address) for address in addresses]
        pids = [stack.enter_context(other_client("tiers", a)) for a in addresses]
        for _ in range(rounds):
            taken = []
            for side, pid in zip(sides, pids, strict=True):
                os.kill(pid, signal.SIGCONT)
                time.sleep(PERIOD_S / 5)
                taken.append(side.period())
                os.kill(pid, signal.SIGSTOP)
                time.sleep(PERIOD_S / 5)
            yield taken[0], taken[1]
        for side in sides:
            side.close()


def spread(values: list[float]) -> str:
    """Return median and range as text."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f} [{low:.2f}..{high:.2f}]"


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--load"]:
        kind, at = sys.argv[2:]
        read_files(at) if kind == "reads" else load(kind, at)
        return
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    Lookups.pause_s = 1 / float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    kinds = {
        "prefetch": beside_prefetch,
        "reads elsewhere": beside_reads,
        "write-back": beside_write_back,
        "stores, with tiers or without": beside_tiers,
    }
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        for name, kind in kinds.items():
            medians, tails, quiets = [], [], []
            for quiet, busy in kind(folder, rounds):
                quiets.append(statistics.median(quiet) * 1e6)
                medians.append(statistics.median(busy) / statistics.median(quiet))
                tails.append(np.quantile(busy, 0.99) / np.quantile(quiet, 0.99))
            print(
                f"8k lookup in L1 beside {name} / quiet: p50 {spread(medians)}, "
                f"p99 {spread(tails)}; quiet p50 {statistics.median(quiets):.0f} us",
                flush=True,
            )


if __name__ == "__main__":
    main()
