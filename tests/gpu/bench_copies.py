"""Speed of copies on a GPU, compared with raw copies of the same run.

    python -m tests.gpu.bench_copies > copies.jsonl

Prints one JSON line for the device, one for each size and method, and one for each
method during matrix products. Values are medians over repetitions; a share is relative
to a raw page-locked copy of as many bytes in the same repetition. Matrix products need
torch; without it, those lines are left out.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import median
from threading import Event as Flag
from threading import Thread
from time import perf_counter, thread_time
from typing import Any

import msgspec
import numpy as np

from kvcore.copy.block_arrays import ChunkSpans
from kvcore.cuda.calibration import CopyMethod
from kvcore.cuda.cuda_cache import CudaCache
from kvcore.cuda.ipc import open_caches
from kvcore.cuda.kernel_launches import PROGRAMS
from kvcore.extents import Extent
from kvcore.layout import CacheGroup, KVLayout, TensorView
from tests.cuda.cuda_fixture import favouring

PART = 32 << 20
NUM_CHUNKS = 8
TOTAL = NUM_CHUNKS * PART
PIECES = (4096, 8192, 16384, 24576, 32768, 65536, 262144, 2 << 20)
BLOCKS = 16
"""Blocks per chunk. A piece is one plane's bytes of a block."""
REPEATS = 5
BUSY_S = 1.5
MATRIX = 8192


def layout_of(piece: int) -> KVLayout:
    """Return a cache of twice the copied bytes, with pieces of one size."""
    planes = max(PART // (BLOCKS * piece), 1)
    num_blocks = 2 * NUM_CHUNKS * BLOCKS
    tensors = tuple(
        TensorView(0, n * num_blocks * piece, (num_blocks, piece), (piece, 1))
        for n in range(planes)
    )
    group = CacheGroup("NP", "uint8", 16, tensors, "pages")
    return KVLayout.derive(group, [planes * num_blocks * piece], 16 * BLOCKS)


def spans_of(layout: KVLayout, first_part: int, *, scattered: bool) -> ChunkSpans:
    """Return chunks in distinct blocks, with adjacent parts."""
    size = layout.part.num_bytes
    ids = np.arange(NUM_CHUNKS * BLOCKS, dtype=np.int32)
    if scattered:
        ids = np.random.default_rng(1).permutation(2 * ids.size)[: ids.size]
    rows = ids.astype(np.int32).reshape(NUM_CHUNKS, BLOCKS)
    return ChunkSpans(
        [(Extent((first_part + n) * size, size),) for n in range(NUM_CHUNKS)],
        rows,
        np.array([[0, layout.part.chunk_size]] * NUM_CHUNKS, np.int64),
    )


class Bench:
    """A device, an arena for both directions, and streams for the raw copies."""

    def __init__(self, device: Any, stack: ExitStack) -> None:
        self.device = device
        self.caches: Any = open_caches(device)
        stack.callback(self.caches.close)
        self.host = device.allocate_host(2 * TOTAL)
        stack.callback(device.free_host, self.host)
        pointer = (ctypes.c_uint8 * (2 * TOTAL)).from_address(self.host)
        self.arena = np.ctypeslib.as_array(pointer)
        self.arena[:] = 1
        self.memory = device.allocate(4 * TOTAL)
        stack.callback(device.free, self.memory)
        self._streams = [device.stream() for _ in range(2)]
        self._events = [device.event() for _ in range(2)]
        for one in (*self._streams, *self._events):
            stack.callback(one.close)

    def raw(self, *, to_host: bool) -> None:
        """Copy as many bytes in one piece, and wait."""
        number = int(to_host)
        at = (self.host + number * TOTAL, self.memory + number * TOTAL)
        destination, source = at if to_host else at[::-1]
        self._streams[number].copy(destination, source, TOTAL)
        self._streams[number].record(self._events[number])
        self._events[number].wait()

    @property
    def ways(self) -> tuple[CopyMethod, ...]:
        """Copy methods of this device; without kernels none is staged."""
        has_kernels = self.caches.rates.to_host.kernels
        return tuple(
            way for way in CopyMethod if has_kernels or way is not CopyMethod.STAGED
        )

    @contextmanager
    def cache(self, layout: KVLayout, way: CopyMethod | None) -> Iterator[CudaCache]:
        """Return a cache that copies by one method, or by the fastest one if None."""
        caches = self.caches
        measured = caches.rates
        caches.rates = favouring(way) if way else measured
        cache = caches.cache(layout, [self.memory])
        try:
            yield cache
        finally:
            cache.close()
            caches.rates = measured


def timed(work: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    begun = perf_counter()
    work()
    return perf_counter() - begun


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """Return a function that runs both concurrently."""

    def run() -> None:
        with ThreadPoolExecutor(2) as pool:
            for each in [pool.submit(first), pool.submit(second)]:
                each.result(60)

    return run


def compared(work: Callable[[], None], raw: Callable[[], None], num_bytes: int) -> Any:
    """Return the speed of some work, and its share of the raw copy's speed."""
    work()
    pairs = [(timed(raw), timed(work)) for _ in range(REPEATS)]
    shares = sorted(a / b for a, b in pairs)
    return {
        "GB_s": round(num_bytes / median(b for _, b in pairs) / 1e9, 2),
        "raw_GB_s": round(num_bytes / median(a for a, _ in pairs) / 1e9, 2),
        "share": round(median(shares), 3),
        "share_least": round(shares[0], 3),
    }


def cpu_us_per_chunk(work: Callable[[], None]) -> float:
    """Return the calling thread's CPU microseconds per 32 MiB."""
    begun = thread_time()
    for _ in range(REPEATS):
        work()
    return round((thread_time() - begun) * 1e6 / (REPEATS * TOTAL / PART), 1)


def copies(bench: Bench, piece: int, way: CopyMethod | None, *, scattered: bool) -> Any:
    """Measure one size of pieces: each direction alone, then both at once."""
    layout = layout_of(piece)
    stored = spans_of(layout, 0, scattered=scattered)
    loaded = spans_of(layout, NUM_CHUNKS, scattered=scattered)
    with bench.cache(layout, way) as cache, bench.cache(layout, way) as other:

        def store() -> None:
            cache.gather(stored, bench.arena)

        def retrieve() -> None:
            other.scatter(loaded, bench.arena)

        def to_host() -> None:
            bench.raw(to_host=True)

        def to_device() -> None:
            bench.raw(to_host=False)

        total = NUM_CHUNKS * layout.part.num_bytes
        before = dict(bench.caches.status().copies)
        measured = {
            "piece_bytes": piece,
            "scattered": scattered,
            "store": compared(store, to_host, total),
            "retrieve": compared(retrieve, to_device, total),
            "both": compared(
                both(store, retrieve), both(to_host, to_device), 2 * total
            ),
            "store_cpu_us_per_chunk": cpu_us_per_chunk(store),
            "retrieve_cpu_us_per_chunk": cpu_us_per_chunk(retrieve),
        }
        after = bench.caches.status().copies
    taken = sorted(name for name, count in after.items() if count != before.get(name))
    return {"ways": taken, **measured}


def matrix_products(work: Callable[[], None] | None) -> float:
    """Return products per second, with or without concurrent work."""
    import torch

    a, b = (torch.randn(MATRIX, MATRIX, device="cuda").bfloat16() for _ in range(2))
    torch.matmul(a, b)
    torch.cuda.synchronize()
    stop = Flag()

    def beside() -> None:
        while work is not None and not stop.is_set():
            work()

    thread = Thread(target=beside)
    thread.start()
    begun, count = perf_counter(), 0
    while perf_counter() - begun < BUSY_S:
        for _ in range(8):
            torch.matmul(a, b)
        torch.cuda.synchronize()
        count += 8
    taken = perf_counter() - begun
    stop.set()
    thread.join(60)
    return count / taken


def slowdown(bench: Bench, way: CopyMethod) -> Any:
    """Measure the slowdown of matrix products by copies in both directions."""
    layout = layout_of(16384)
    stored = spans_of(layout, 0, scattered=True)
    loaded = spans_of(layout, NUM_CHUNKS, scattered=True)
    with bench.cache(layout, way) as cache, bench.cache(layout, way) as other:
        beside = both(
            lambda: cache.gather(stored, bench.arena),
            lambda: other.scatter(loaded, bench.arena),
        )
        raws = both(lambda: bench.raw(to_host=True), lambda: bench.raw(to_host=False))
        alone = matrix_products(None)
        with_raw, with_copies = matrix_products(raws), matrix_products(beside)
        again = matrix_products(None)
    base = (alone + again) / 2
    return {
        "way": way,
        "alone_per_s": round(base, 1),
        "alone_spread": round(abs(alone - again) / base, 3),
        "slower_by_raw_copies": round(1 - with_raw / base, 3),
        "slower_by_copies": round(1 - with_copies / base, 3),
    }


def run() -> Iterator[Any]:
    """Measure on the first GPU; the most important values come first."""
    with ExitStack() as stack:
        # Imported here: tests import this module without the bindings installed.
        from kvcore.cuda.driver import open_devices

        bench = Bench(open_devices()[0], stack)
        yield {
            "device": bench.device.name,
            "programs_a_launch": PROGRAMS,
            "rates": msgspec.to_builtins(bench.caches.rates),
        }
        for way in (None, *bench.ways):
            for piece in PIECES:
                if way is CopyMethod.SINGLE and piece < 65536:
                    continue
                for scattered in (True, False):
                    yield copies(bench, piece, way, scattered=scattered)
        try:
            for way in bench.ways:
                if way is not CopyMethod.SINGLE:
                    yield slowdown(bench, way)
        except ImportError as error:
            yield {"matrix_product": f"not measured: {error}"}


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line), flush=True)
