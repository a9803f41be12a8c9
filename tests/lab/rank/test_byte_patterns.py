"""The byte pattern detects bytes in any wrong place."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import numpy as np
import pytest
from msgspec.structs import replace

from kvctl.lab.config.model_geometry import CACHE_SHAPES, PRESETS, BlockGrid
from kvctl.lab.rank.byte_patterns import HostPattern, chunk_seeds, mix
from kvctl.lab.rank.rank_cache import HostCache

CHUNK_BLOCKS = 4
SEEDS = chunk_seeds(b"".join(sha256(bytes([i])).digest() for i in range(3)))
BLOCKS = np.array([11, 3, 7, 0, 5, 9, 2, 14, 1, 13, 6, 10], np.int32)


def make(
    shape: str = "KNSHD", name: str = "tiny-llama", rank: int | None = 0
) -> HostPattern:
    """Return a pattern that has been written to host memory."""
    geometry = replace(PRESETS[name], cache_shape=shape)
    cache = geometry.groups(16, 0, 1)
    starts = np.cumsum((0, *cache.handle_bytes[:-1])).tolist()
    memory = np.zeros(sum(cache.handle_bytes), np.uint8)
    view = BlockGrid.of(cache.groups[0], starts).view(memory)
    pattern = HostPattern(view, 0, rank, CHUNK_BLOCKS)
    pattern.write(SEEDS, BLOCKS)
    return pattern


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mla", "tiny-hybrid"])
@pytest.mark.parametrize("shape", CACHE_SHAPES)
def test_written_chunks_have_no_wrong_byte(name: str, shape: str) -> None:
    """Holds in every cache shape, for chunks in scattered blocks."""
    pattern = make(shape, name)
    assert pattern.count_wrong_bytes(SEEDS, BLOCKS) == 0
    assert pattern.view[4].max() == 0


@pytest.mark.parametrize("axis", [1, 2, 3, 4, 5])
def test_a_swap_inside_a_block_is_detected(axis: int) -> None:
    """Swaps of K and V, layers, slots, heads, and words of a row."""
    pattern = make(name="small-hybrid")
    pattern.view[:] = np.flip(pattern.view, axis).copy()
    assert pattern.count_wrong_bytes(SEEDS, BLOCKS) > 0


def test_a_swapped_block_or_chunk_is_detected() -> None:
    """Swaps of a chunk's blocks, and of whole chunks."""
    pattern = make()
    swapped = BLOCKS.copy()
    swapped[:2] = swapped[1::-1]
    assert pattern.count_wrong_bytes(SEEDS, swapped) > 0
    assert pattern.count_wrong_bytes(SEEDS[::-1], BLOCKS) > 0


def test_bytes_of_another_rank_or_group_are_detected() -> None:
    """The pattern depends on the rank and on the group."""
    pattern = make()
    for group, rank in ((0, 1), (1, 0), (0, None)):
        other = HostPattern(pattern.view, group, rank, CHUNK_BLOCKS)
        assert other.count_wrong_bytes(SEEDS, BLOCKS) > 0


def test_a_single_wrong_byte_is_counted() -> None:
    """A changed byte counts once."""
    pattern = make()
    pattern.view[7, 0, 1, 3, 1, 0] ^= 0xFF00
    assert pattern.count_wrong_bytes(SEEDS, BLOCKS) == 1


def test_rows_of_partial_words_are_checked() -> None:
    """Rows of 10 bytes are compared byte by byte."""
    geometry = replace(PRESETS["tiny-llama"], head_dim=5)
    cache = geometry.groups(16, 0, 1)
    memory = np.zeros(sum(cache.handle_bytes), np.uint8)
    view = BlockGrid.of(cache.groups[0], [0, cache.handle_bytes[0]]).view(memory)
    pattern = HostPattern(view, 0, 0, CHUNK_BLOCKS)
    pattern.write(SEEDS, BLOCKS)
    assert pattern.count_wrong_bytes(SEEDS, BLOCKS) == 0
    view[7, 0, 1, 3, 1, 9] ^= 1
    assert pattern.count_wrong_bytes(SEEDS, BLOCKS) == 1


def test_null_blocks_are_neither_written_nor_checked() -> None:
    """Blocks outside a sliding window are -1."""
    pattern = make()
    pattern.view[:] = 0
    blocks = BLOCKS.copy()
    blocks[:5] = -1
    pattern.write(SEEDS, blocks)
    assert pattern.view[BLOCKS[:5]].max() == 0
    assert pattern.count_wrong_bytes(SEEDS, blocks) == 0
    assert pattern.count_wrong_bytes(SEEDS, BLOCKS) > 0


def test_mixing_separates_neighbours() -> None:
    """Seeds one apart differ in about half of their bits."""
    ours, theirs = mix(np.array([1, 2], np.uint64))
    assert 16 < int(ours ^ theirs).bit_count() < 48


@pytest.fixture
def cache() -> Iterator[HostCache]:
    """Yield a small cache in shared memory."""
    cache = HostCache("kvlab-test-paged", PRESETS["tiny-llama"].groups(16, 0, 1))
    yield cache
    cache.close()


def test_poison_overwrites_blocks(cache: HostCache) -> None:
    """A retrieve that writes nothing leaves poison, which counts as wrong."""
    pattern = HostPattern(cache.views[0], 0, 0, CHUNK_BLOCKS)
    pattern.write(SEEDS, BLOCKS)
    cache.poison(0, BLOCKS)
    assert pattern.count_wrong_bytes(SEEDS, BLOCKS) > 0
    pattern.write(SEEDS, BLOCKS)
    assert pattern.count_wrong_bytes(SEEDS, BLOCKS) == 0
