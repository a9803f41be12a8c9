"""The contract of eviction policies, for every policy in the table."""

from __future__ import annotations

import pytest

from kvcore.keys import ChunkHash
from kvcore.storage.eviction import LRU, POLICIES, EvictionPolicy

A, B, C = (ChunkHash(letter) for letter in (b"a", b"b", b"c"))


def _any(key: ChunkHash) -> bool:
    return bool(key)


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    """One of each."""
    return POLICIES[request.param]()


def test_each_chunk_is_evicted_once(policy: EvictionPolicy) -> None:
    """Touched chunks all come out, each once, and then nothing."""
    for key in (A, B, A, C):
        policy.touch(key)
    victims = [policy.evict(_any) for _ in range(4)]
    assert sorted(victim for victim in victims if victim) == [A, B, C]
    assert victims[3] is None


def test_discarded_chunks_are_forgotten(policy: EvictionPolicy) -> None:
    """Neither a discarded nor an unknown chunk comes back."""
    policy.touch(A)
    policy.discard(A)
    policy.discard(B)
    assert policy.evict(_any) is None


def test_held_chunks_are_passed_over_once(policy: EvictionPolicy) -> None:
    """A chunk that cannot go is asked about once, until it is touched again."""
    asked: list[ChunkHash] = []

    def evictable(key: ChunkHash) -> bool:
        asked.append(key)
        return key == C

    for key in (A, B, C):
        policy.touch(key)
    assert policy.evict(evictable) == C
    assert len(asked) == len(set(asked))
    assert policy.evict(_any) in {None, A, B}.difference(asked)
    policy.touch(A)
    assert policy.evict(lambda key: key == A) == A


def test_lru_evicts_the_least_recently_touched() -> None:
    """A touch moves a chunk to the safe end."""
    lru = LRU()
    for key in (A, B, C, A):
        lru.touch(key)
    assert [lru.evict(_any) for _ in range(3)] == [B, C, A]
    assert len(lru) == 0
