"""CPU time of planning copies of a GPU's cache, without the driver's calls.

    pytest tests/benchmarks/test_plans.py --benchmark-json=plans.json

Chunks of 32 MiB of Llama-3.1-8B in blocks of 16, scattered: 1,024 pieces of 32 KiB per
chunk. `extra_info` has the microseconds per chunk; the target is 100 with the driver.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
import pytest

from kvcore.copy.block_arrays import ChunkSpans
from kvcore.cuda.calibration import choose_method
from kvcore.cuda.copy_plan import CopyPlan, PartRows
from kvcore.cuda.cuda_cache import loads
from kvcore.cuda.staging import StagingSizes
from kvcore.extents import Extent
from kvcore.layout import CacheGroup, KVLayout, TensorView
from tests.cuda.cuda_fixture import published

BLOCKS = 4096


def layout_of() -> KVLayout:
    """Return the model's cache, one tensor a layer."""
    shape = (2, BLOCKS, 16, 8, 128)
    strides = tuple(2 * int(np.prod(shape[n + 1 :])) for n in range(5))
    tensors = tuple(
        TensorView(0, n * 2 * int(np.prod(shape)), shape, strides) for n in range(32)
    )
    group = CacheGroup("KNSHD", "bfloat16", 16, tensors)
    return KVLayout.derive(group, [64 * int(np.prod(shape))], 256)


def spans_of(layout: KVLayout, count: int, extents: int) -> ChunkSpans:
    """Return scattered chunks, each part in this many pieces of the arena."""
    size = layout.part.num_bytes // extents
    ids = np.random.default_rng(1).permutation(BLOCKS).astype(np.int32)
    return ChunkSpans(
        [
            tuple(Extent((2 * (n * extents + e)) * size, size) for e in range(extents))
            for n in range(count)
        ],
        ids[: 16 * count].reshape(count, 16),
        np.array([[0, 256]] * count, np.int64),
    )


@pytest.mark.parametrize("extents", [1, 16])
@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("way", ["staged", "direct"])
def test_plan(benchmark: Any, way: str, count: int, extents: int) -> None:
    """Check, choose, and list what is to be copied."""
    layout = layout_of()
    planes = layout.plane_offsets + (1 << 44)
    rows, rates = PartRows.of(layout, planes), published().to_host
    spans = spans_of(layout, count, extents)

    def plan() -> None:
        spans.check(layout, nulls=False)
        made = CopyPlan.of(layout, rows, planes, spans, 1 << 40)
        choose_method(rates, made.num_bytes, made.num_pieces, row_bytes=32768, word=16)
        if way == "staged":
            loads(made, StagingSizes().slot_bytes)
        else:
            _ = made.pieces

    benchmark.pedantic(plan, rounds=50, warmup_rounds=3)
    if benchmark.stats is not None:
        taken = median(benchmark.stats.stats.data)
        benchmark.extra_info["us_a_chunk"] = round(taken * 1e6 / count, 1)
