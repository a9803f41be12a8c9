"""L1: parts are readable after commit, and held chunks are not evicted."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import Internal
from kvcore.keys import ChunkHash, SessionKey
from kvcore.storage.arena import Arena
from kvcore.storage.eviction import LRU
from kvcore.storage.l1 import L1, Chunk, PartId

PAGE = 64
RANK0, RANK1 = PartId(0), PartId(1)


def chain(name: str, length: int) -> list[ChunkHash]:
    """Hashes of a prompt's chunks."""
    return [ChunkHash(f"{name}{i}".encode()) for i in range(length)]


def store(l1: L1, hashes: Sequence[ChunkHash], part: PartId = RANK0) -> int:
    """Reserve and commit a page for each chunk; return their number."""
    return l1.commit(l1.reserve(hashes, part, PAGE).reservations)


def names(chunks: Sequence[Chunk | None]) -> list[str]:
    """Hashes as text."""
    return [chunk.hash.decode() for chunk in chunks if chunk is not None]


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Eight pages."""
    arena = Arena(8 * PAGE, PAGE)
    yield arena
    arena.close()


@pytest.fixture
def l1(arena: Arena) -> Iterator[L1]:
    """An L1 of eight pages; its state is checked after the test."""
    l1 = L1(arena, LRU())
    yield l1
    l1.check()


def test_reserved_parts_are_not_readable(l1: L1) -> None:
    """A part is present only after commit."""
    hashes = chain("a", 3)
    reserved = l1.reserve(hashes, RANK0, PAGE)
    assert [r.index for r in reserved.reservations] == [0, 1, 2]
    assert l1.present(hashes, 1) == []
    assert l1.acquire_leading(hashes, 1) == []
    assert l1.commit(reserved.reservations) == 3
    assert names(l1.present(hashes, 1)) == ["a0", "a1", "a2"]


def test_chunk_is_present_when_all_needed_parts_are(l1: L1) -> None:
    """A chunk that lacks a rank's part ends the leading run."""
    hashes = chain("a", 3)
    store(l1, hashes, RANK0)
    store(l1, hashes[:2], RANK1)
    assert names(l1.present(hashes, 0b11)) == ["a0", "a1"]
    assert names(l1.present(hashes, 0b01)) == ["a0", "a1", "a2"]
    assert l1.present(hashes, 0b100) == []


def test_second_writer_finds_parts_present(l1: L1) -> None:
    """A part that is committed or being written is not reserved again."""
    first = l1.reserve(chain("a", 2), RANK0, PAGE)
    second = l1.reserve(chain("a", 3), RANK0, PAGE)
    assert (second.num_present, second.num_dropped) == (2, 0)
    assert [r.index for r in second.reservations] == [2]
    l1.commit(first.reservations)
    l1.abort(second.reservations)
    assert store(l1, chain("a", 3)) == 1


def test_aborted_parts_vanish(l1: L1) -> None:
    """An abort frees the pages, and a chunk without parts is removed."""
    store(l1, chain("a", 1), RANK1)
    l1.abort(l1.reserve(chain("a", 3), RANK0, 100).reservations)
    stats = l1.stats()
    assert (stats.num_chunks, stats.num_parts, stats.num_reserved) == (1, 1, 0)
    assert stats.used_bytes == PAGE


def test_settling_twice_is_harmless(l1: L1) -> None:
    """A second settlement does not affect a later reservation of the part."""
    stale = l1.reserve(chain("a", 1), RANK0, PAGE).reservations
    l1.abort(stale)
    fresh = l1.reserve(chain("a", 1), RANK0, PAGE).reservations
    assert l1.commit(stale) == 0
    l1.abort(stale)
    assert l1.present(chain("a", 1), 1) == []
    assert l1.commit(fresh) == 1


def test_room_is_made_by_evicting_leaves_first(l1: L1) -> None:
    """The evicted chunk is the last one of the least recently used prompt."""
    store(l1, chain("old", 4))
    store(l1, chain("new", 4))
    store(l1, chain("x", 2))
    assert names(l1.present(chain("old", 4), 1)) == ["old0", "old1"]
    assert names(l1.present(chain("new", 4), 1)) == ["new0", "new1", "new2", "new3"]
    assert l1.stats().num_evicted == 2


def test_touched_prompts_stay(l1: L1) -> None:
    """A touch moves a request's chunks to the end, its leaves first to go."""
    store(l1, chain("old", 4))
    store(l1, chain("new", 4))
    l1.touch(chain("old", 4))
    store(l1, chain("x", 5))
    assert l1.present(chain("new", 4), 1) == []
    assert names(l1.present(chain("old", 4), 1)) == ["old0", "old1", "old2"]


def test_parts_of_a_chunk_go_together(l1: L1) -> None:
    """Eviction removes all parts of a chunk."""
    for part in (RANK0, RANK1):
        store(l1, chain("a", 4), part)
    store(l1, chain("b", 1))
    stats = l1.stats()
    assert (stats.num_chunks, stats.num_parts) == (4, 7)
    assert names(l1.present(chain("a", 4), 0b11)) == ["a0", "a1", "a2"]


def test_own_prefix_is_not_evicted_for_its_suffix(l1: L1) -> None:
    """Of a prompt larger than L1, the leading chunks are kept."""
    store(l1, chain("a", 6))
    reserved = l1.reserve(chain("a", 12), RANK0, PAGE)
    assert [r.index for r in reserved.reservations] == [6, 7]
    assert (reserved.num_present, reserved.num_dropped) == (6, 4)
    l1.commit(reserved.reservations)
    assert len(l1.present(chain("a", 12), 1)) == 8
    l1.touch(chain("a", 8))
    store(l1, chain("b", 1))
    assert len(l1.present(chain("a", 12), 1)) == 7


def test_held_and_reserved_chunks_are_never_victims(l1: L1) -> None:
    """An L1 full of held chunks stores nothing, and evicts after the holds end."""
    store(l1, chain("a", 4))
    held = l1.acquire_leading(chain("a", 4), 1)
    writing = l1.reserve(chain("b", 4), RANK0, PAGE)
    for _ in range(2):
        assert l1.reserve(chain("c", 2), RANK0, PAGE).num_dropped == 2
    assert (l1.stats().num_held, l1.stats().num_reserved) == (4, 4)
    l1.release(held)
    l1.commit(writing.reservations)
    assert store(l1, chain("c", 5)) == 5
    assert names(l1.present(chain("b", 4), 1)) == ["b0", "b1", "b2"]


def test_passed_over_chunks_return_with_their_leaves_first(l1: L1) -> None:
    """Held chunks that eviction met are evictable again after their last hold."""
    store(l1, chain("a", 8))
    twice = [l1.acquire_leading(chain("a", 8), 1) for _ in range(2)]
    assert store(l1, chain("b", 1)) == 0
    l1.release(twice[0])
    assert store(l1, chain("b", 1)) == 0
    l1.release(twice[1])
    assert store(l1, chain("b", 2)) == 2
    assert len(l1.present(chain("a", 8), 1)) == 6


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_chunk_that_a_second_rank_writes_is_no_victim(l1: L1, end: str) -> None:
    """Its first part is not evicted until the second is written."""
    store(l1, chain("a", 4))
    writing = l1.reserve(chain("a", 4), RANK1, PAGE).reservations
    assert store(l1, chain("b", 1)) == 0
    assert len(l1.present(chain("a", 4), 1)) == 4
    getattr(l1, end)(writing)
    assert store(l1, chain("b", 8)) == 8
    assert l1.present(chain("a", 4), 1) == []


def test_impossible_part_evicts_nothing(l1: L1) -> None:
    """A part larger than the arena is dropped and evicts nothing."""
    store(l1, chain("a", 8))
    assert l1.reserve(chain("b", 1), RANK0, 9 * PAGE).num_dropped == 1
    assert l1.stats().num_chunks == 8


def test_acquire_is_all_or_nothing(l1: L1) -> None:
    """With a missing part nothing is held; unneeded chunks are not held."""
    hashes = chain("a", 3)
    store(l1, hashes, RANK0)
    store(l1, hashes[2:], RANK1)
    assert l1.acquire(hashes, [1, 1, 0b100]) is None
    assert l1.acquire([*hashes, ChunkHash(b"unknown")], [1, 1, 1, 1]) is None
    assert l1.stats().num_held == 0
    some = l1.acquire([*hashes, ChunkHash(b"unknown")], [0, 1, 0b11, 0])
    assert some is not None
    assert [chunk is not None for chunk in some] == [False, True, True, False]
    assert l1.stats().num_held == 2
    l1.release(some)
    assert l1.stats().num_held == 0


def test_peek_shows_what_is_known(l1: L1) -> None:
    """Unknown chunks are None; reserved ones have no ready part."""
    store(l1, chain("a", 1))
    writing = l1.reserve(chain("a", 2)[1:], RANK0, PAGE)
    first, second, third = l1.peek(chain("a", 3))
    assert first is not None
    assert second is not None
    assert (first.ready, second.ready, third) == (1, 0, None)
    l1.abort(writing.reservations)


def test_clear_keeps_what_is_used(l1: L1) -> None:
    """Held and reserved chunks stay; all others are dropped and freed."""
    store(l1, chain("a", 4))
    held = l1.acquire_leading(chain("a", 1), 1)
    writing = l1.reserve(chain("b", 1), RANK0, PAGE)
    assert l1.drop(l1.hashes()) == 3
    assert l1.stats().num_chunks == 2
    assert l1.stats().used_bytes == 2 * PAGE
    l1.release(held)
    l1.abort(writing.reservations)
    assert l1.drop(l1.hashes()) == 1
    assert l1.stats().used_bytes == 0


def test_closed_l1_is_harmless(arena: Arena) -> None:
    """After close nothing is found, reserved or committed; no call raises."""
    l1 = L1(arena, LRU())
    store(l1, chain("a", 2))
    held = l1.acquire_leading(chain("a", 2), 1)
    writing = [l1.reserve(chain(name, 1), RANK0, PAGE) for name in "bc"]
    l1.close()
    assert l1.commit(writing[0].reservations) == 0
    l1.abort(writing[1].reservations)
    l1.release(held)
    assert l1.reserve(chain("d", 2), RANK0, PAGE).num_dropped == 2
    assert l1.present(chain("a", 2), 1) == []
    assert (l1.stats().num_held, l1.stats().num_reserved) == (0, 0)


def test_check_sees_a_contradiction(l1: L1) -> None:
    """`check` finds a wrong mask."""
    store(l1, chain("a", 1))
    (chunk,) = l1.present(chain("a", 1), 1)
    chunk.ready = 3
    with pytest.raises(Internal):
        l1.check()
    chunk.ready = 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=30))
def test_what_remains_of_a_prompt_is_its_prefix(uses: list[tuple[str, int]]) -> None:
    """Leaves are evicted first, in any order of use."""
    arena = Arena(8 * PAGE, PAGE)
    try:
        l1 = L1(arena, LRU())
        for name, length in uses:
            store(l1, chain(name, length))
            l1.touch(chain(name, length))
            for each in "abc":
                known = [chunk is not None for chunk in l1.peek(chain(each, 6))]
                assert known == sorted(known, reverse=True)
        l1.check()
    finally:
        arena.close()


class Traffic:
    """Threads that write, read, evict and clear the chunks of one prompt."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.l1 = L1(arena, LRU())
        self.wrong: list[Chunk] = []

    def run(self, num_threads: int) -> None:
        """Run every thread to its end."""
        threads = [
            threading.Thread(target=self._work, args=(random.Random(seed),))
            for seed in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, chooser: random.Random) -> None:
        for _ in range(400):
            hashes = chain("a", chooser.randint(1, 10))
            chooser.choice([self._write, self._read])(hashes, chooser.random() < 0.1)

    def _write(self, hashes: list[ChunkHash], rarely: bool) -> None:
        reservations = self.l1.reserve(hashes, RANK0, PAGE).reservations
        for reservation in reservations:
            self._bytes(reservation.chunk)[:] = reservation.chunk.hash[1]
        (self.l1.abort if rarely else self.l1.commit)(reservations)

    def _read(self, hashes: list[ChunkHash], rarely: bool) -> None:
        chunks = self.l1.acquire_leading(hashes, 1)
        if rarely:
            self.l1.drop(self.l1.hashes())
        for chunk in chunks:
            if np.any(self._bytes(chunk) != chunk.hash[1]):
                self.wrong.append(chunk)
        self.l1.release(chunks)

    def _bytes(self, chunk: Chunk) -> npt.NDArray[np.uint8]:
        (extent,) = chunk.parts[RANK0].extents
        return self.arena.array[extent.offset : extent.offset + extent.length]


def test_readers_see_whole_parts_beside_writers_and_eviction(arena: Arena) -> None:
    """A held chunk keeps its committed bytes beside other threads."""
    traffic = Traffic(arena)
    traffic.run(num_threads=4)
    assert traffic.wrong == []
    traffic.l1.check()
    assert (traffic.l1.stats().num_held, traffic.l1.stats().num_reserved) == (0, 0)


def test_watchers_hear_of_every_chunk_that_leaves(l1: L1) -> None:
    """Watchers receive the reason and the owner of the evicting store."""
    heard: list[tuple[bytes, str, object]] = []
    l1.on_removed(
        lambda one: heard.append((one.chunk.hash, one.reason.value, one.owner))
    )
    store(l1, chain("a", 8))
    who = SessionKey("e", "r")
    l1.abort(l1.reserve(chain("b", 1), RANK0, PAGE, owner=who).reservations)
    l1.drop(chain("a", 1))
    [chunk] = l1.present(chain("a", 2)[1:], 1)
    assert l1.condemn(chunk)
    assert not l1.condemn(chunk)
    assert heard == [
        (b"a7", "evicted", who),
        (b"a0", "cleared", None),
        (b"a1", "corrupt", None),
    ]


def test_a_condemned_chunk_keeps_its_memory_until_its_last_hold_ends(l1: L1) -> None:
    """No reader finds it, and the pages of a held chunk are not reused."""
    [held] = store_and_hold(l1, "a")
    writing = l1.reserve(chain("a", 1), RANK1, PAGE).reservations
    assert l1.condemn(held)
    assert l1.present(chain("a", 1), 1) == []
    assert l1.commit(writing) == 0
    assert l1.stats().used_bytes == 2 * PAGE
    l1.check()
    l1.release([held])
    assert l1.stats().used_bytes == 0


def test_a_prefix_is_not_evicted_for_its_suffix(l1: L1) -> None:
    """A prefix stays although it is the least recently used."""
    store(l1, chain("a", 4))
    store(l1, chain("b", 4))
    prompt = chain("a", 8)
    reserved = l1.reserve(prompt[4:], RANK0, PAGE, prefix=prompt[:4])
    l1.commit(reserved.reservations)
    assert names(l1.present(prompt, 1)) == names_of(prompt)


def test_commit_can_hold_what_it_makes_readable(l1: L1) -> None:
    """No eviction happens between commit and hold."""
    [held] = store_and_hold(l1, "a")
    assert held.holds == 1
    l1.release([held])


def store_and_hold(l1: L1, name: str) -> list[Chunk]:
    """Store one chunk; it is held when it becomes readable."""
    reservations = l1.reserve(chain(name, 1), RANK0, PAGE).reservations
    assert l1.commit(reservations, hold=True) == 1
    return [reservation.chunk for reservation in reservations]


def names_of(hashes: Sequence[ChunkHash]) -> list[str]:
    """Hashes as text."""
    return [key.decode() for key in hashes]
