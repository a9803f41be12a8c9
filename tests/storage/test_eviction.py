"""The contract of eviction policies, for every policy in the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import SetupError
from kvcore.keys import ChunkHash
from kvcore.storage.eviction import (
    LRU,
    POLICIES,
    S3FIFO,
    EvictionPolicy,
    UsesLRU,
    make_policy,
)

A, B, C, D = (ChunkHash(letter) for letter in (b"a", b"b", b"c", b"d"))
keys = st.sampled_from([ChunkHash(bytes([i])) for i in range(12)])


def _any(key: ChunkHash) -> bool:
    return bool(key)


def drain(policy: EvictionPolicy) -> list[ChunkHash]:
    """Evict everything."""
    victims = []
    while (victim := policy.evict(_any)) is not None:
        victims.append(victim)
    return victims


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    """Return a policy."""
    return make_policy(request.param)


def test_each_chunk_is_evicted_once(policy: EvictionPolicy) -> None:
    """All admitted and touched chunks are evicted, each once."""
    policy.admit(A)
    for key in (A, B, A, C):
        policy.touch(key)
    policy.admit(D)
    policy.admit(A)
    assert sorted(drain(policy)) == [A, B, C, D]


def test_discarded_chunks_are_forgotten(policy: EvictionPolicy) -> None:
    """Discarded and unknown chunks are not evicted."""
    policy.touch(A)
    policy.discard(A)
    policy.discard(B)
    assert policy.evict(_any) is None
    assert policy.coming(5) == []


def test_held_chunks_are_passed_over_once(policy: EvictionPolicy) -> None:
    """A held chunk is offered once, until it is admitted again."""
    asked: list[ChunkHash] = []

    def evictable(key: ChunkHash) -> bool:
        asked.append(key)
        return key == C

    for key in (A, B, C):
        policy.touch(key)
    assert policy.evict(evictable) == C
    assert len(asked) == len(set(asked))
    assert policy.evict(_any) in {None, A, B}.difference(asked)
    policy.admit(A)
    assert policy.evict(lambda key: key == A) == A


def test_the_first_touch_is_not_a_second_use(policy: EvictionPolicy) -> None:
    """Admission followed by a touch equals a touch alone."""
    other = type(policy)()
    for key in (A, B, C, D):
        policy.admit(key)
        policy.touch(key)
        other.touch(key)
    for each in (policy, other):
        each.touch(A)
    assert drain(policy) == drain(other)


def test_what_is_coming_goes_next(policy: EvictionPolicy) -> None:
    """`coming` returns the next victims without changing the order."""
    for key in (A, B, C, D):
        policy.touch(key)
    coming = policy.coming(2)
    assert policy.coming(2) == coming
    assert len(coming) == 2
    assert drain(policy)[:2] == coming


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(
    steps=st.lists(st.tuples(st.sampled_from("atde"), keys, st.sets(keys, max_size=4)))
)
def test_random_use_loses_and_doubles_nothing(
    name: str, steps: list[tuple[str, ChunkHash, set[ChunkHash]]]
) -> None:
    """After random operations a policy holds exactly the model's chunks."""
    policy, known = make_policy(name), set[ChunkHash]()
    for step, key, held in steps:
        if step in "at":
            (policy.admit if step == "a" else policy.touch)(key)
            known.add(key)
        elif step == "d":
            policy.discard(key)
            known.discard(key)
        else:
            asked = _evict_beside(policy, held)
            assert len(asked) == len(set(asked))
            assert known.issuperset(asked)
            assert not held.intersection(asked[-1:]) or known == set(asked)
            known.difference_update(asked)
    assert sorted(drain(policy)) == sorted(known)


def _evict_beside(policy: EvictionPolicy, held: set[ChunkHash]) -> list[ChunkHash]:
    """Evict once; return the offered chunks, the victim last."""
    asked: list[ChunkHash] = []

    def evictable(key: ChunkHash) -> bool:
        asked.append(key)
        return key not in held

    victim = policy.evict(evictable)
    assert victim is None or victim == asked[-1]
    return asked


def test_an_unknown_policy_names_the_known_ones() -> None:
    """The error lists the registered policies."""
    with pytest.raises(SetupError, match="'zzz': known policies are lru, lru-uses"):
        make_policy("zzz")


# -- each against its definition ------------------------------------------------------


def test_lru_evicts_the_least_recently_touched() -> None:
    """A touch moves a chunk to the end; a second admission does not."""
    lru = LRU()
    for key in (A, B, C, A):
        lru.touch(key)
    lru.admit(B)
    assert drain(lru) == [B, C, A]
    assert len(lru) == 0


class NaiveS3FIFO:
    """The paper's pseudocode over plain lists, with a fixed capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.small: list[ChunkHash] = []
        self.main: list[ChunkHash] = []
        self.ghosts: list[ChunkHash] = []
        self.freq: dict[ChunkHash, int] = {}

    def access(self, key: ChunkHash) -> bool:
        """Read a key; return whether it was a hit."""
        if key in self.freq:
            self.freq[key] = min(self.freq[key] + 1, 3)
            return True
        while len(self.freq) >= self.capacity:
            self._evict()
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)
        self.freq[key] = 0
        return False

    def _evict(self) -> None:
        if not self.main or len(self.small) * 10 >= len(self.freq):
            key = self.small.pop(0)
            if self.freq[key] > 1:
                self.freq[key] = 0
                self.main.append(key)
                return
            self.ghosts.append(key)
        else:
            key = self.main.pop(0)
            if self.freq[key]:
                self.freq[key] -= 1
                self.main.append(key)
                return
        del self.freq[key]
        self.ghosts = self.ghosts[-(9 * len(self.freq) // 10 + 1) :]


def hits(
    policy: EvictionPolicy, capacity: int, accesses: list[ChunkHash]
) -> list[bool]:
    """Read keys through a policy, one at a time."""
    present: set[ChunkHash] = set()
    found = []
    for key in accesses:
        found.append(key in present)
        if key not in present and len(present) >= capacity:
            victim = policy.evict(_any)
            assert victim is not None
            present.remove(victim)
        present.add(key)
        policy.touch(key)
    return found


@given(st.lists(keys, max_size=300), st.integers(1, 10))
def test_s3fifo_hits_what_the_paper_says(
    accesses: list[ChunkHash], capacity: int
) -> None:
    """Each access has the same result as the paper's pseudocode."""
    naive = NaiveS3FIFO(capacity)
    expected = [naive.access(key) for key in accesses]
    assert hits(S3FIFO(), capacity, accesses) == expected


@given(st.lists(keys, max_size=300), st.integers(1, 10))
def test_lru_uses_hits_what_its_worth_says(
    accesses: list[ChunkHash], capacity: int
) -> None:
    """Each access has the same result as a minimum over all resident chunks."""
    resident: dict[ChunkHash, tuple[int, int]] = {}
    ghosts: dict[ChunkHash, int] = {}
    expected = []
    for now, key in enumerate(accesses, 1):
        expected.append(key in resident)
        if key not in resident and len(resident) >= capacity:
            victim = min(resident, key=_worth(resident))
            ghosts[victim] = resident.pop(victim)[0]
            while len(ghosts) > len(resident) + 1:
                del ghosts[next(iter(ghosts))]
        uses = resident[key][0] if key in resident else ghosts.pop(key, 0)
        resident[key] = (min(uses + 1, 4), now)
    assert hits(UsesLRU(), capacity, accesses) == expected


def _worth(
    resident: dict[ChunkHash, tuple[int, int]],
) -> Callable[[ChunkHash], tuple[int, int]]:
    def worth(key: ChunkHash) -> tuple[int, int]:
        uses, last = resident[key]
        level = uses.bit_length() - 1
        return last + level * len(resident), level

    return worth
