"""The block pool of a played engine."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvcore.errors import SetupError
from kvctl.lab.engine.block_pool import BlockPool


def test_blocks_are_handed_out_once() -> None:
    """All blocks, each once; what is freed can be had again."""
    pool = BlockPool(8, 1, 0)
    first, second = pool.allocate(3), pool.allocate(5)
    assert sorted(np.concatenate((first, second)).tolist()) == list(range(8))
    pool.free(first)
    assert sorted(pool.allocate(3).tolist()) == sorted(first.tolist())


def test_who_asks_for_too_many_waits_for_others() -> None:
    """An allocation ends when another's blocks come back."""
    pool = BlockPool(4, 1, 0)
    held = pool.allocate(3)
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(pool.allocate(2).size))
    waiter.start()
    pool.free(held)
    waiter.join(10)
    assert got == [2]


def test_more_than_there_are_is_an_error() -> None:
    """Nobody waits for what can never be."""
    with pytest.raises(SetupError, match="needs 5 blocks, the cache has 4"):
        BlockPool(4, 1, 0).allocate(5)


def test_groups_name_blocks_differently() -> None:
    """Two groups' ids differ, so that a swapped group shows; each is one to one."""
    pool = BlockPool(64, 2, 0)
    full, window = pool.of_groups(pool.allocate(64))
    assert sorted(full.tolist()) == sorted(window.tolist()) == list(range(64))
    assert full.tolist() != window.tolist()
