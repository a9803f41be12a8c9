"""Eviction policies against libCacheSim (Yang et al.).

Requests have one block, so that prefix rules have no effect. LRU hits are equal. The
paper of S3-FIFO does not define how an empty cache fills: until the first eviction,
libCacheSim puts blocks that the small queue cannot hold into the main queue; this
project keeps all in the small queue. Filled in libCacheSim's order, hits are equal but
for a few.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.keys import ChunkHash
from kvcore.storage.eviction import LRU, NEW, S3FIFO, SMALL_SHARE, EvictionPolicy
from kvctl.lab.workload.cache_simulation import SimulatedL1

pytestmark = pytest.mark.tiers

NUM_ACCESSES = 200_000
NUM_POPULAR = 20_000
CAPACITIES = (200, 1000, 4000)


@pytest.fixture(scope="module", params=range(3))
def trace(request: pytest.FixtureRequest) -> list[int]:
    """Popular blocks by Zipf's law; every seventh access is never repeated."""
    rng = np.random.default_rng(request.param)
    blocks = (rng.zipf(1.2, NUM_ACCESSES) - 1) % NUM_POPULAR
    blocks[::7] = NUM_POPULAR + np.arange(len(blocks[::7]))
    return blocks.tolist()


class FilledTheirWay(S3FIFO):
    """S3-FIFO that fills an empty cache in libCacheSim's order."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.small_blocks = int(capacity * SMALL_SHARE)
        self.has_evicted = False

    def admit(self, key: ChunkHash) -> None:
        """See above."""
        is_full = len(self._small) >= self.small_blocks and key not in self._small
        if is_full and not self.has_evicted:
            self._main.setdefault(key, NEW)
        else:
            super().admit(key)

    def evict(self, evictable) -> ChunkHash | None:  # type: ignore[no-untyped-def]
        """Continue as the normal policy."""
        self.has_evicted = True
        return super().evict(evictable)


def ours(policy: EvictionPolicy, capacity: int, trace: list[int]) -> int:
    """Hits of our simulation over requests of one block."""
    cache = SimulatedL1(policy, capacity)
    return sum(cache.serve([block]) for block in trace)  # type: ignore[list-item]


def theirs(policy: str, capacity: int, trace: list[int]) -> int:
    """Hits of libCacheSim's policy."""
    simulator = pytest.importorskip("libcachesim")
    cache, access = getattr(simulator, policy)(capacity), simulator.Request()
    access.obj_size, hits = 1, 0
    for block in trace:
        access.obj_id = block
        hits += cache.get(access)
    return hits


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_lru_hits_the_same(capacity: int, trace: list[int]) -> None:
    """The number of hits is equal."""
    assert ours(LRU(), capacity, trace) == theirs("LRU", capacity, trace)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_s3fifo_filled_alike_hits_the_same(capacity: int, trace: list[int]) -> None:
    """Hits differ by at most 1 in 10,000; with our order by 1 in 100."""
    expected = theirs("S3FIFO", capacity, trace)
    alike = ours(FilledTheirWay(capacity), capacity, trace)
    assert abs(alike - expected) <= NUM_ACCESSES / 10_000
    assert abs(ours(S3FIFO(), capacity, trace) - expected) <= expected / 100
