"""Copies between a GPU's memory and page-locked host memory, byte for byte."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from kvcore.blend.key_rotation import RAW_DTYPES, BlockRotation, rotate_cached_keys
from kvcore.copy.block_arrays import ChunkSpans
from kvcore.copy.host_cache import HostCache
from kvcore.cuda.calibration import CopyMethod
from kvcore.cuda.cuda_cache import CudaCache, CudaCaches
from kvcore.cuda.kernel_launches import TritonKernels
from kvcore.cuda.staging import StagingSizes
from kvcore.extents import Extent
from kvcore.layout import CacheGroup, KVLayout, TensorView
from kvcore.rope import Rope
from kvcore.status import DeviceRates
from tests.blend.test_key_rotation import ROPES
from tests.copy.chunk_spans import stack_spans
from tests.cuda.cuda_fixture import favouring
from tests.cuda.layout_cases import (
    DTYPES,
    LAYOUTS,
    arena_of,
    gathered,
    job,
    numbers,
    places_apart,
    scattered,
    with_nulls,
)
from tests.gpu import bench_copies

pytestmark = pytest.mark.gpu
ROOM = 1 << 20
SMALL = StagingSizes(slot_bytes=4096, table_bytes=4096, max_buffers=2)


@lru_cache
def kernels_of(device: Any) -> TritonKernels:
    """Return the kernels, loaded once for all tests."""
    return TritonKernels(device)


class Bench:
    """A device's caches, and page-locked memory for an arena and for reading back."""

    def __init__(
        self, device: Any, way: CopyMethod, sizes: StagingSizes, room: int = ROOM
    ) -> None:
        self.device = device
        self.caches = CudaCaches(
            device, kernels_of(device), rates=favouring(way), sizes=sizes
        )
        self.stream, self.event = device.stream(), device.event()
        self.hosts = [device.allocate_host(room) for _ in range(2)]
        pointers = [(ctypes.c_uint8 * room).from_address(at) for at in self.hosts]
        self.arena, self.mirror = map(np.ctypeslib.as_array, pointers)
        self.placed: list[tuple[CudaCache, list[int]]] = []

    def place(self, layout: KVLayout, handles: Sequence[np.ndarray]) -> CudaCache:
        """Return a cache on the device, with the handles' bytes."""
        addresses = [self.device.allocate(handle.size) for handle in handles]
        for address, handle in zip(addresses, handles, strict=True):
            self.mirror[: handle.size] = handle
            self.copy(address, self.hosts[1], handle.size)
        cache = self.caches.cache(layout, addresses)
        self.placed.append((cache, addresses))
        return cache

    def bytes(self, number: int, sizes: Sequence[int]) -> list[np.ndarray]:
        """Return the bytes of a cache's handles."""
        read = []
        for address, size in zip(self.placed[number][1], sizes, strict=True):
            self.copy(self.hosts[1], address, size)
            read.append(self.mirror[:size].copy())
        return read

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Copy and wait."""
        self.stream.copy(destination, source, num_bytes)
        self.stream.record(self.event)
        self.event.wait()

    def close(self) -> None:
        """Free all memory."""
        for cache, addresses in self.placed:
            cache.close()
            for address in addresses:
                self.device.free(address)
        self.caches.close()
        self.stream.close()
        self.event.close()
        for host in self.hosts:
            self.device.free_host(host)


@pytest.fixture
def bench(device: Any, way: CopyMethod) -> Iterator[Bench]:
    """A bench whose copies all use one method."""
    bench = Bench(device, way, SMALL)
    yield bench
    bench.close()


@pytest.mark.parametrize("way", CopyMethod)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_dtype(bench: Bench, name: str, dtype: str) -> None:
    """Random blocks, split parts, ranges and null blocks; no other byte is written."""
    move = job(name, dtype, seed=len(name))
    cache = bench.place(move.case.layout, move.handles())
    arena = bench.arena[: move.arena_bytes]
    arena[:] = move.arena()
    cache.gather(stack_spans(move.spans), arena)
    assert np.array_equal(arena, gathered(move))
    sizes = move.case.handle_bytes
    assert all(map(np.array_equal, bench.bytes(0, sizes), move.handles()))
    move = with_nulls(move)
    arena[:] = arena_of(move)
    cache.scatter(stack_spans(move.spans), arena)
    expected = scattered(move, arena_of(move))
    assert all(map(np.array_equal, bench.bytes(0, sizes), expected))


@pytest.mark.parametrize("way", CopyMethod)
def test_four_lanes_at_once(bench: Bench) -> None:
    """Two stores and two retrieves share streams and buffers, but no bytes."""
    works = [job("block first", "bfloat16", seed=n) for n in range(4)]
    caches = [bench.place(work.case.layout, work.handles()) for work in works]
    size = works[0].arena_bytes
    arenas = [bench.arena[n * size : (n + 1) * size] for n in range(4)]
    for number, (work, arena) in enumerate(zip(works, arenas, strict=True)):
        arena[:] = arena_of(work) if number % 2 else work.arena()
    with ThreadPoolExecutor(4) as lanes:
        running = [
            lanes.submit(
                cache.scatter if number % 2 else cache.gather,
                stack_spans(w.spans),
                arena,
            )
            for number, (cache, w, arena) in enumerate(
                zip(caches, works, arenas, strict=True)
            )
        ]
        for each in running:
            each.result(30)
    for number in (0, 2):
        assert np.array_equal(arenas[number], gathered(works[number]))
    for number in (1, 3):
        work = works[number]
        read = bench.bytes(number, work.case.handle_bytes)
        assert all(map(np.array_equal, read, scattered(work, arena_of(work))))


def large(num_blocks: int) -> KVLayout:
    """Return the layout of Llama-3.1-8B: 32 layers, 8 heads of 128; 32 MiB chunks."""
    shape = (2, num_blocks, 16, 8, 128)
    strides = tuple(2 * int(np.prod(shape[n + 1 :])) for n in range(5))
    size = 2 * int(np.prod(shape))
    tensors = tuple(TensorView(0, n * size, shape, strides) for n in range(32))
    group = CacheGroup("KNSHD", "bfloat16", 16, tensors)
    return KVLayout.derive(group, [32 * size], 256)


@pytest.mark.parametrize("way", CopyMethod)
def test_large_chunks_by_buffers_of_full_size(device: Any, way: CopyMethod) -> None:
    """Two chunks of 32 MiB are stored and retrieved into other blocks."""
    layout = large(96)
    part = layout.part.num_bytes
    bench = Bench(device, way, StagingSizes(), room=4 * part)
    try:
        noise = np.random.default_rng(5)
        handle = noise.integers(0, 256, 3 * part * 2, dtype=np.uint8)
        ids = noise.permutation(96).astype(np.int32).reshape(6, 16)
        addresses = [device.allocate(handle.size)]
        bench.mirror[: 4 * part] = handle[: 4 * part]
        bench.copy(addresses[0], bench.hosts[1], 4 * part)
        bench.mirror[: 2 * part] = handle[4 * part :]
        bench.copy(addresses[0] + 4 * part, bench.hosts[1], 2 * part)
        cache = bench.caches.cache(layout, addresses)
        bench.placed.append((cache, addresses))
        extents = [(Extent(n * part, part),) for n in (1, 0)]
        whole = np.array([[0, 256]] * 2, np.int64)
        spans = ChunkSpans(extents, ids[:2], whole)
        back = ChunkSpans(extents, ids[2:4], whole)
        cache.gather(spans, bench.arena)
        expected = np.empty(2 * part, np.uint8)
        HostCache(layout, [handle]).gather(spans, expected)
        assert np.array_equal(bench.arena[: 2 * part], expected)
        cache.scatter(back, bench.arena)
        bench.arena[:] = 0
        cache.gather(back, bench.arena)
        assert np.array_equal(bench.arena[: 2 * part], expected)
    finally:
        bench.close()


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    """The benchmark returns every figure; only a GPU makes them meaningful."""
    for name, value in {"PART": 1 << 20, "NUM_CHUNKS": 2, "TOTAL": 2 << 20}.items():
        monkeypatch.setattr(bench_copies, name, value)
    monkeypatch.setattr(bench_copies, "REPEATS", 1)
    with ExitStack() as stack:
        bench = bench_copies.Bench(device, stack)
        measured = bench_copies.copies(bench, 4096, CopyMethod.BATCHED, scattered=True)
    assert measured["ways"] == ["batched_to_device", "batched_to_host"]
    for what in ("store", "retrieve", "both"):
        assert measured[what]["share"] > 0


@pytest.mark.parametrize("way", [CopyMethod.STAGED])
@pytest.mark.parametrize("dtype", RAW_DTYPES)
@pytest.mark.parametrize("name", ROPES)
def test_keys_are_rotated_on_the_gpu(bench: Bench, name: str, dtype: str) -> None:
    """As in host memory, except for last places of numbers rounded twice or fused."""
    rope: Rope = ROPES[name]
    move = job("blend buffer", dtype, seed=1, width=2 * rope.head_dim)
    handles = numbers(move)
    cache = bench.place(move.case.layout, handles)
    turns = [
        BlockRotation(1, 9, 3),
        BlockRotation(9, 11, 0),
        BlockRotation(11, 20, -700),
    ]
    cache.rotate_keys(rope, turns)
    rotate_cached_keys(rope, turns, [HostCache(move.case.layout, handles)])
    for got, expected in zip(
        bench.bytes(0, move.case.handle_bytes), handles, strict=True
    ):
        apart = places_apart(got, expected, dtype)
        assert apart.max() <= 1
        assert (apart != 0).mean() < 0.01


def test_a_gpu_is_measured(device: Any) -> None:
    """Every rate is measured."""
    caches = CudaCaches(device, kernels_of(device))
    rates: DeviceRates = caches.rates
    caches.close()
    for one in (rates.to_host, rates.to_device):
        assert min(one.link_bytes_s, one.start_s, one.call_s, one.staged_start_s) > 0
        assert (len(one.batched), len(one.kernels)) == (5, 3)
        assert all(rate.bytes_s > 0 for rate in (*one.batched, *one.kernels))
