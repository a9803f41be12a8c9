"""The block pool of a simulated engine."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvcore.errors import SetupError
from kvctl.lab.engine.engine_state import BlockPool


def test_each_block_is_allocated_once() -> None:
    """All blocks are allocated once; freed ones can be allocated again."""
    pool = BlockPool(8, 1, 0)
    first, second = pool.allocate(3), pool.allocate(5)
    assert sorted(np.concatenate((first, second)).tolist()) == list(range(8))
    pool.free(first)
    assert sorted(pool.allocate(3).tolist()) == sorted(first.tolist())


def test_an_allocation_waits_for_free_blocks() -> None:
    """It returns when another request frees its blocks."""
    pool = BlockPool(4, 1, 0)
    allocated = pool.allocate(3)
    sizes: list[int] = []
    thread = threading.Thread(target=lambda: sizes.append(pool.allocate(2).size))
    thread.start()
    pool.free(allocated)
    thread.join(10)
    assert sizes == [2]


def test_more_blocks_than_the_cache_has_are_an_error() -> None:
    """The call raises instead of waiting forever."""
    with pytest.raises(SetupError, match="needs 5 blocks, the cache has 4"):
        BlockPool(4, 1, 0).allocate(5)


def test_block_ids_differ_between_groups() -> None:
    """Ids of two groups differ, so that a swap is detected; both are one to one."""
    pool = BlockPool(64, 2, 0)
    full, window = pool.ids_by_group(pool.allocate(64))
    assert sorted(full.tolist()) == sorted(window.tolist()) == list(range(64))
    assert full.tolist() != window.tolist()
