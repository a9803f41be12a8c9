"""A cache on a GPU is filled and checked like one in host memory."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import pytest
from msgspec.structs import replace

from kvctl.lab.config.model_geometry import (
    CACHE_SHAPES,
    PRESETS,
    BlockGrid,
    Geometry,
    handle_starts,
)
from kvctl.lab.rank.byte_patterns import HostPattern, chunk_seeds

if TYPE_CHECKING:
    from kvctl.lab.rank.gpu_cache import DevicePattern

pytestmark = pytest.mark.torch

CHUNK_BLOCKS = 4
SEEDS = chunk_seeds(b"".join(sha256(bytes([i])).digest() for i in range(3)))
BLOCKS = np.array([11, 3, -1, 0, 5, 9, 2, 14, -1, 13, 6, 10], np.int32)


def pair(geometry: Geometry, rank: int | None) -> tuple[HostPattern, DevicePattern]:
    """Return a pattern in host memory and one in torch's memory."""
    import torch

    from kvctl.lab.rank.gpu_cache import DevicePattern, device_view

    cache = geometry.groups(16, 0, 1)
    starts = handle_starts(cache)
    memory = np.zeros(sum(cache.handle_bytes), np.uint8)
    tensor = torch.zeros(memory.size, dtype=torch.uint8)
    group = cache.groups[0]
    view = device_view(tensor, BlockGrid.of(group, starts))
    return (
        HostPattern(BlockGrid.of(group, starts).view(memory), 0, rank, CHUNK_BLOCKS),
        DevicePattern(view, 0, rank, CHUNK_BLOCKS),
    )


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mla", "tiny-hybrid"])
@pytest.mark.parametrize("shape", CACHE_SHAPES)
def test_both_kinds_write_the_same_bytes(shape: str, name: str) -> None:
    """Holds in every shape, except for null blocks; no byte is wrong."""
    host, device = pair(replace(PRESETS[name], cache_shape=shape), 3)
    host.write(SEEDS, BLOCKS)
    device.write(SEEDS, BLOCKS)
    written = device.view.numpy().view(host.view.dtype)
    assert np.array_equal(host.view, written)
    assert device.count_wrong_bytes(SEEDS, BLOCKS) == 0


def test_rows_of_partial_words_are_equal() -> None:
    """Such rows consist of single bytes."""
    odd = Geometry("odd", num_layers=2, num_kv_heads=1, head_dim=6, dtype="int8")
    host, device = pair(odd, None)
    host.write(SEEDS, BLOCKS)
    device.write(SEEDS, BLOCKS)
    assert np.array_equal(host.view, device.view.numpy())
    assert device.count_wrong_bytes(SEEDS, BLOCKS) == 0


def test_every_wrong_byte_counts() -> None:
    """A changed byte and swapped blocks are detected."""
    host, device = pair(PRESETS["small-llama"], 0)
    del host
    device.write(SEEDS, BLOCKS)
    device.view[11, 0, 0, 0, 0, 0] ^= 1 << 40
    assert device.count_wrong_bytes(SEEDS, BLOCKS) == 1
    swapped = BLOCKS.copy()
    swapped[:2] = swapped[1::-1]
    assert device.count_wrong_bytes(SEEDS, swapped) > 1
