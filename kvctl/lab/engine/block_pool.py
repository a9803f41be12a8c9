"""The paged blocks of a played engine."""

from __future__ import annotations

import threading

import numpy as np

from kvcore.errors import SetupError
from kvctl.lab.rank.rank_cache import Indices


class BlockPool:
    """Hands out block ids; every rank of an engine uses the same.

    The pool starts shuffled, as an engine's is after some hours: ids of one request
    are scattered, and copies find nothing to coalesce that they would not find there.
    """

    def __init__(self, num_blocks: int, num_groups: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.num_blocks = num_blocks
        self._free: Indices = rng.permutation(num_blocks).astype(np.int32)
        self._num_free = num_blocks
        self._changed = threading.Condition()
        self._by_group = [
            rng.permutation(num_blocks).astype(np.int32) for _ in range(num_groups)
        ]

    def allocate(self, num_blocks: int) -> Indices:
        """Take blocks, waiting until so many are free.

        Raises:
            SetupError: more than there are at all.
        """
        if num_blocks > self.num_blocks:
            raise SetupError(
                f"a request needs {num_blocks} blocks, the cache has "
                f"{self.num_blocks}: raise cache_blocks"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._num_free >= num_blocks)
            self._num_free -= num_blocks
            return self._free[self._num_free : self._num_free + num_blocks].copy()

    def free(self, blocks: Indices) -> None:
        """Give blocks back."""
        with self._changed:
            self._free[self._num_free : self._num_free + blocks.size] = blocks
            self._num_free += blocks.size
            self._changed.notify_all()

    def of_groups(self, blocks: Indices) -> tuple[Indices, ...]:
        """Name the blocks in each cache group, differently in each."""
        return tuple(ids[blocks] for ids in self._by_group)
