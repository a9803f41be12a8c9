"""Host gathers and scatters of 64 MiB, each as a share of a plain copy.

    pytest tests/benchmarks/test_copies.py --benchmark-json=copies.json

The plain copy, one `np.copyto` of as many contiguous bytes, runs before every round
of the measured one; `extra_info` holds GB/s and the median share of the round's own
plain copy, because a shared machine's speed changes by the second.
"""

from __future__ import annotations

from collections.abc import Callable
from secrets import token_hex
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from kvcore.copy.host_cache import HostCache
from kvcore.extents import Extent
from kvcore.layout import CacheGroup, KVLayout, TensorView
from kvcore.shm import Segment
from tests.copy.chunk_spans import ChunkSpan, stack_spans

TOTAL = 64 << 20
BLOCK, CHUNK, LAYERS = 16, 256, 32
PIECES = [512, 4096, 32768, 262144]
WAYS = ["gather", "scatter"]
ORDERS = ["scattered", "fours", "consecutive"]
SHAPES = ["kv-outermost", "block-outermost", "across-layers"]


def described(piece: int, shape: str, layers: int, room: int) -> KVLayout:
    """K and V of `layers` layers in one handle; a block of a plane is `piece` bytes."""
    blocks = room // (2 * layers * piece)
    token = piece // BLOCK
    sizes = {"K": 2, "N": blocks, "S": BLOCK, "D": token}
    axes = {"kv-outermost": "KNSD", "block-outermost": "NKSD", "across-layers": "NLKSD"}
    sizes["L"] = layers
    dims = tuple(sizes[axis] for axis in axes[shape])
    strides = tuple(int(np.prod(dims[i + 1 :])) for i in range(len(dims)))
    count = 1 if "L" in axes[shape] else layers
    tensors = tuple(
        TensorView(0, i * (room // layers), dims, strides) for i in range(count)
    )
    group = CacheGroup(axes[shape], "uint8", BLOCK, tensors)
    return KVLayout.derive(group, [room], CHUNK)


def block_ids(order: str, count: int, limit: int) -> np.ndarray:
    """Return distinct ids: shuffled, shuffled in fours, or in order."""
    noise = np.random.default_rng(7)
    if order == "consecutive":
        return np.arange(count, dtype=np.int32)
    if order == "fours":
        fours = noise.permutation(limit // 4)[: count // 4]
        return (fours[:, np.newaxis] * 4 + np.arange(4)).ravel().astype(np.int32)
    return noise.permutation(limit)[:count].astype(np.int32)


def mapped(num_bytes: int) -> np.ndarray:
    """Return touched shared memory; its views keep it alive."""
    with Segment.create(f"bench-{token_hex(8)}", num_bytes, touch=True) as segment:
        array = segment.array
        segment.unlink()
    array.fill(1)
    return array


def measure(benchmark: Any, copy: Callable[[], None], num_bytes: int) -> None:
    """Time `copy`, and a plain copy before each round."""
    source, target = mapped(num_bytes), mapped(num_bytes)
    plain_s: list[float] = []

    def plain() -> None:
        start = perf_counter()
        np.copyto(target, source)
        plain_s.append(perf_counter() - start)

    benchmark.pedantic(copy, setup=plain, rounds=15, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable
        return
    rounds = benchmark.stats.stats.data
    pairs = zip(plain_s[-len(rounds) :], rounds, strict=True)
    benchmark.extra_info["GB_s"] = round(num_bytes / median(rounds) / 1e9, 2)
    benchmark.extra_info["share"] = round(median(p / c for p, c in pairs), 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS)
def test_copy(benchmark: Any, way: str, order: str, piece: int, shape: str) -> None:
    """64 MiB in whole chunks of 16 blocks."""
    layers = LAYERS if piece <= 32768 else LAYERS // 4
    layout = described(piece, shape, layers, 2 * TOTAL)
    size = layout.part.num_bytes
    count = TOTAL // size
    ids = block_ids(order, count * CHUNK // BLOCK, layout.num_blocks)
    spans = [
        ChunkSpan((Extent(i * size, size),), blocks, 0, CHUNK)
        for i, blocks in enumerate(ids.reshape(count, -1))
    ]
    cache = HostCache(layout, [mapped(2 * TOTAL)])
    arena = mapped(TOTAL)
    copy, stacked = getattr(cache, way), stack_spans(spans)
    measure(benchmark, lambda: copy(stacked, arena), TOTAL)


@pytest.mark.parametrize("way", WAYS)
def test_split_parts(benchmark: Any, way: str) -> None:
    """64 MiB of 32 KiB pieces into parts scattered over 64 KiB pages."""
    layout = described(32768, "kv-outermost", LAYERS, 2 * TOTAL)
    size, page = layout.part.num_bytes, 65536
    pages = np.random.default_rng(7).permutation(TOTAL // page) * page
    rows = pages.reshape(TOTAL // size, -1).tolist()
    ids = block_ids("scattered", len(rows) * CHUNK // BLOCK, layout.num_blocks)
    spans = [
        ChunkSpan(tuple(Extent(offset, page) for offset in row), blocks, 0, CHUNK)
        for row, blocks in zip(rows, ids.reshape(len(rows), -1), strict=True)
    ]
    cache = HostCache(layout, [mapped(2 * TOTAL)])
    arena = mapped(TOTAL)
    copy, stacked = getattr(cache, way), stack_spans(spans)
    measure(benchmark, lambda: copy(stacked, arena), TOTAL)


@pytest.mark.parametrize("way", WAYS)
def test_small_request(benchmark: Any, way: str) -> None:
    """8 chunks of 8 KiB parts: the cost of planning."""
    layout = described(512, "kv-outermost", 1, 1 << 20)
    part = layout.part.num_bytes
    ids = block_ids("scattered", 8 * CHUNK // BLOCK, layout.num_blocks)
    spans = [
        ChunkSpan((Extent(i * 65536, part),), blocks, 0, CHUNK)
        for i, blocks in enumerate(ids.reshape(8, -1))
    ]
    cache = HostCache(layout, [mapped(1 << 20)])
    arena = mapped(8 * 65536)
    copy, stacked = getattr(cache, way), stack_spans(spans)
    measure(benchmark, lambda: copy(stacked, arena), 8 * part)
