"""Page allocation: no page is used twice, and all are freed."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import Closed, SetupError
from kvcore.extents import Extent
from kvcore.shm import SHM_DIR
from kvcore.storage.arena import Arena, PageAllocator, PageRun


@given(
    num_pages=st.integers(1, 200),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 70)), max_size=120),
)
def test_pages_never_overlap_and_all_come_back(
    num_pages: int, steps: list[tuple[bool, int]]
) -> None:
    """Random allocations and frees agree with a set of pages, step by step."""
    pages = PageAllocator(num_pages)
    held: list[list[PageRun]] = []
    free = set(range(num_pages))
    for take, number in steps:
        if take:
            runs = pages.allocate(number)
            assert (runs is None) == (number > len(free))
            if runs is None:
                continue
            taken = [
                page for start, count in runs for page in range(start, start + count)
            ]
            assert len(taken) == number
            assert free.issuperset(taken)
            assert len(set(taken)) == number
            free.difference_update(taken)
            held.append(runs)
        elif held:
            runs = held.pop(number % len(held))
            pages.free(runs)
            free.update(p for start, count in runs for p in range(start, start + count))
        assert pages.num_free == len(free)
        assert _pages_of(pages) == sorted(free)
        assert _is_merged(pages)
    for runs in held:
        pages.free(runs)
    assert pages.free_runs() == [(0, num_pages)]


def _pages_of(pages: PageAllocator) -> list[int]:
    runs = pages.free_runs()
    return [page for start, count in runs for page in range(start, start + count)]


def _is_merged(pages: PageAllocator) -> bool:
    runs = pages.free_runs()
    return all(a[0] + a[1] < b[0] for a, b in pairwise(runs))


@given(st.integers(1, 64), st.integers(2, 40))
def test_equal_parts_stay_contiguous(count: int, num_parts: int) -> None:
    """Parts of one size are contiguous after frees in any order."""
    pages = PageAllocator(count * num_parts)
    parts = [pages.allocate(count) for _ in range(num_parts)]
    for part in parts[::2] + parts[1::2]:
        assert part is not None
        pages.free(part)
    assert all(len(pages.allocate(count) or ()) == 1 for _ in range(num_parts))


def test_gathers_the_largest_runs_only_when_it_must() -> None:
    """A request that no run can serve takes few runs, and a small one takes one."""
    pages = PageAllocator(32)
    runs = [pages.allocate(size) for size in (1, 1, 8, 1, 8, 1, 12)]
    assert pages.num_free == 0
    for index in (0, 2, 4):
        pages.free(runs[index] or [])
    assert len(pages.allocate(1) or ()) == 1
    assert [count for _, count in pages.allocate(16) or ()] == [8, 8]


def test_parts_cover_their_bytes_and_waste_under_a_page() -> None:
    """Extents sum to the part's size and the last one is cut to it."""
    arena = Arena(1_000, 64)
    try:
        assert (arena.total_bytes, arena.used_bytes) == (960, 0)
        first = arena.allocate(100)
        assert first == (Extent(0, 100),)
        assert arena.used_bytes == 128
        second, third = arena.allocate(256), arena.allocate(500)
        assert second is not None
        assert third is not None
        assert arena.allocate(65) is None
        arena.free(first)
        assert arena.free_bytes == 64 + 128
        spread = arena.allocate(130)
        assert spread is not None
        assert len(spread) == 2
        assert sum(extent.length for extent in spread) == 130
        for part in (second, third, spread):
            arena.free(part)
        assert arena.used_bytes == 0
        assert arena.allocate(960) == (Extent(0, 960),)
    finally:
        arena.close()


def test_arena_is_shared_memory_until_closed() -> None:
    """Its name can be attached until it is closed."""
    arena = Arena(4_096, 1_024)
    assert arena.name.startswith(f"kvcore-{os.getpid()}-")
    assert (SHM_DIR / arena.name).stat().st_size == 4_096
    assert arena.array.nbytes == 4_096
    arena.close()
    arena.close()
    assert not (SHM_DIR / arena.name).exists()
    with pytest.raises(Closed):
        _ = arena.array


def test_arena_without_a_page_is_refused() -> None:
    """An arena smaller than its page raises an error that says so."""
    with pytest.raises(SetupError, match="holds no page"):
        Arena(100, 4_096)
