"""Round trips against a bare ZeroMQ echo, and lookups by prompt length.

Run as `python tests/benchmarks/wire.py [seconds per point]`: starts a server and an
echo process, alternates between them, and prints medians and ratios.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import zmq

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import EndSession, FreeLookupLocks, PosixShm, RegisterKVCache
from kvcore.shm import Segment

LENGTHS = (1024, 8192, 32768, 131072)
BLOCK_BYTES = 16 * 64


@contextmanager
def served(*options: str) -> Iterator[str]:
    """Run `kvctl serve` and yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        command = [sys.executable, "-m", "kvctl", "serve", "--port", "0"]
        server = subprocess.Popen(
            [*command, "--ready-file", str(ready), *options], stdout=subprocess.DEVNULL
        )
        try:
            while not (ready.exists() and ready.read_text()):
                time.sleep(0.01)
            yield ready.read_text().strip()
        finally:
            server.terminate()
            server.wait()


def echo(address: str) -> None:
    """Echo messages with a bare ROUTER."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(address)
    while True:
        socket.send_multipart(socket.recv_multipart())


@contextmanager
def echoed() -> Iterator[zmq.Socket[bytes]]:
    """Run an echo process and yield a socket connected to it."""
    address = "tcp://127.0.0.1:15999"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=echo, args=(address,), daemon=True)
    process.start()
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(address)
    socket.send(b"up")
    socket.recv()
    try:
        yield socket
    finally:
        process.kill()
        process.join()
        socket.close(0)


def p50_us(call: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call over some seconds."""
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def register(client: KVClient, segment: Segment) -> None:
    """Register a cache of 64 bytes per token, which lookups require."""
    shape = (2, segment.num_bytes // (2 * 16 * 32), 16, 16)
    strides = tuple(int(np.prod(shape[i + 1 :])) * 2 for i in range(4))
    view = TensorView(0, 0, shape, strides)
    group = CacheGroup("KNSD", "float16", 16, (view,))
    handle = PosixShm(segment.name, 0, segment.num_bytes)
    client.register_kv_cache(
        RegisterKVCache("bench", "bench", "bench", 1, 0, (handle,), (group,))
    )


def prompt(num_tokens: int) -> np.ndarray:
    """Return the tokens of the prompt of a length."""
    return np.random.default_rng(num_tokens).integers(
        0, 128000, num_tokens, dtype=np.uint32
    )


def store(client: KVClient, num_tokens: int) -> None:
    """Put a prompt's chunks into L1."""
    session = SessionKey("bench", f"store-{num_tokens}")
    blocks = np.arange(num_tokens // 16, dtype=np.int32)
    client.store(session, "bench", 0, num_tokens, [blocks], prompt(num_tokens))
    client.end_session(session)


class Cycles:
    """Lookup, release, end: one request of a scheduler."""

    def __init__(self, client: KVClient, num_tokens: int, name: str) -> None:
        self.client = client
        self.tokens = prompt(num_tokens)
        self.name = name
        self.count = 0
        self.lookups: list[float] = []

    def __call__(self) -> None:
        """Run one cycle and check that everything was a hit."""
        self.count += 1
        session = SessionKey("bench", f"{self.name}-{len(self.tokens)}-{self.count}")
        start = time.perf_counter()
        reply = self.client.lookup(session, "bench", 1, self.tokens)
        self.lookups.append(time.perf_counter() - start)
        if reply.num_tokens != len(self.tokens):
            raise SystemExit(f"expected a hit of {len(self.tokens)}, got {reply}")
        self.client.call_all(
            [FreeLookupLocks(session, 0, len(self.tokens)), EndSession(session)]
        )


def cycle_worker(
    address: str, num_tokens: int, seconds: float, start: Event, name: str, out: object
) -> None:
    """Run cycles in another process and report cycles per second."""
    with KVClient(address, label=name) as client:
        cycles = Cycles(client, num_tokens, name)
        cycles()
        start.wait()
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            cycles()
        out.put(  # type: ignore[attr-defined]
            (
                (cycles.count - 1) / (time.perf_counter() - begin),
                statistics.median(cycles.lookups) * 1e3,
            )
        )


def beside(address: str, num_tokens: int, measure: Callable[[], float]) -> float:
    """Measure something while another process looks up long prompts."""
    context = multiprocessing.get_context("spawn")
    start, queue = context.Event(), context.Queue()
    process = context.Process(
        target=cycle_worker, args=(address, num_tokens, 3.0, start, "load", queue)
    )
    process.start()
    time.sleep(1.5)
    start.set()
    result = measure()
    queue.get()
    process.join()
    return result


def many(address: str, num_tokens: int, seconds: float) -> float:
    """Return the cycles per second of four processes together."""
    context = multiprocessing.get_context("spawn")
    start, queue = context.Event(), context.Queue()
    processes = [
        context.Process(
            target=cycle_worker,
            args=(address, num_tokens, seconds, start, f"c{i}", queue),
        )
        for i in range(4)
    ]
    for process in processes:
        process.start()
    time.sleep(3)
    start.set()
    rates = [queue.get()[0] for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    with served("--l1-size", "256MiB") as address, KVClient(address) as client:
        segment = Segment.create(f"kvbench-{os.getpid()}", 16 << 20, touch=True)
        register(client, segment)
        with echoed() as bare:
            message = b"x" * 64
            ratios, pings = [], []
            for _ in range(9):
                raw = p50_us(lambda: (bare.send(message), bare.recv()), seconds / 4)
                pings.append(p50_us(client.ping, seconds / 4))
                ratios.append(pings[-1] / raw)
        print(
            f"PING p50 {statistics.median(pings):.0f} us, "
            f"{statistics.median(ratios):.2f} x a bare echo "
            f"[{min(ratios):.2f}..{max(ratios):.2f}]"
        )
        for num_tokens in LENGTHS:
            store(client, num_tokens)
            cycles = Cycles(client, num_tokens, "one")
            cycle_ms = p50_us(cycles, seconds) / 1e3
            lookup_ms = statistics.median(cycles.lookups) * 1e3
            print(
                f"{num_tokens:7d} tokens: lookup {lookup_ms:.3f} ms, "
                f"cycle {cycle_ms:.3f} ms"
            )
        short = Cycles(client, 1024, "short")
        alone = (
            p50_us(client.ping, 1),
            p50_us(short, 1) and statistics.median(short.lookups),
        )
        short.lookups.clear()
        ping = beside(address, 131072, lambda: p50_us(client.ping, 2))
        beside(address, 131072, lambda: p50_us(short, 2))
        print(
            f"beside 128k lookups: PING {alone[0]:.0f} -> {ping:.0f} us "
            f"({ping / alone[0]:.1f} x), 1k lookup {alone[1] * 1e3:.2f} -> "
            f"{statistics.median(short.lookups) * 1e3:.2f} ms "
            f"({statistics.median(short.lookups) / alone[1]:.1f} x)"
        )
        for num_tokens in LENGTHS[:3]:
            rate = many(address, num_tokens, 2)
            print(f"4 clients, {num_tokens} tokens: {rate:.0f} cycles/s")
        segment.close()
        segment.unlink()


if __name__ == "__main__":
    main()
