"""Cost of the storage layer's calls by the number of stored chunks.

`pytest tests/benchmarks/test_storage.py`; figures in docs/performance.md. A lookup
of 128k tokens has 512 chunks. "same" looks up one prompt repeatedly; "any" another one
each round, whose entries are not in the CPU's caches: the only difference at a million
chunks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvcore.engine.leases import LeaseTable
from kvcore.keys import ChunkHash, SessionKey
from kvcore.storage.arena import Arena, PageAllocator
from kvcore.storage.eviction import LRU
from kvcore.storage.l1 import L1, PartId

PAGE = 64
PROMPT = 512
PART = PartId(0)
OWNER = SessionKey("engine", "request")


@dataclass
class Filled:
    """An L1 that is full of chunks of one page each."""

    l1: L1
    hashes: list[ChunkHash]
    chooser: random.Random

    def prompt(self, which: str) -> list[ChunkHash]:
        """Hashes of 512 adjacent chunks, as a request brings them: fresh objects."""
        last = len(self.hashes) - PROMPT
        start = self.chooser.randrange(last) if which == "any" else last // 2
        chosen = self.hashes[start : start + PROMPT]
        return [ChunkHash(bytes(bytearray(key))) for key in chosen]


def _fresh(count: int) -> list[ChunkHash]:
    return [ChunkHash(os.urandom(32)) for _ in range(count)]


@pytest.fixture(scope="module", params=[1_000, 100_000, 1_000_000])
def filled(request: pytest.FixtureRequest) -> Iterator[Filled]:
    """An L1 with 1k, 100k and 1M chunks."""
    arena = Arena(request.param * PAGE, PAGE)
    l1 = L1(arena, LRU())
    hashes = _fresh(request.param)
    for start in range(0, len(hashes), PROMPT):
        part = hashes[start : start + PROMPT]
        l1.commit(l1.reserve(part, PART, PAGE).reservations)
    yield Filled(l1, hashes, random.Random(1))
    arena.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", ["same", "any"])
def test_look_up_and_end(
    benchmark: BenchmarkFixture, filled: Filled, which: str
) -> None:
    """Acquire 512 chunks, grant the lease and end it."""
    table = LeaseTable(filled.l1, 60.0)

    def cycle(hashes: list[ChunkHash]) -> None:
        table.grant(OWNER, "model", filled.l1.acquire_leading(hashes, 1), 1, "client")
        table.end(OWNER)

    benchmark.pedantic(
        cycle, setup=lambda: ((filled.prompt(which),), {}), rounds=300, warmup_rounds=20
    )
    assert table.num_granted == sum(table.num_ended.values())


@pytest.mark.timeout(300)
def test_acquire_alone(benchmark: BenchmarkFixture, filled: Filled) -> None:
    """Find and hold 512 chunks: L1's part of a lookup."""
    hashes = filled.prompt("same")
    l1 = filled.l1
    result = benchmark.pedantic(
        l1.acquire_leading,
        args=(hashes, 1),
        teardown=lambda hashes, needs: l1.release(l1.present(hashes, needs)),
        rounds=300,
    )
    assert len(result) == PROMPT


@pytest.mark.timeout(300)
def test_store_into_a_full_l1(benchmark: BenchmarkFixture, filled: Filled) -> None:
    """Evict, reserve and commit 32 chunks."""

    def store(hashes: list[ChunkHash]) -> int:
        return filled.l1.commit(filled.l1.reserve(hashes, PART, PAGE).reservations)

    stored = benchmark.pedantic(
        store, setup=lambda: ((_fresh(32),), {}), rounds=300, warmup_rounds=20
    )
    assert stored == 32


@pytest.mark.parametrize("num_pages", [1_000, 100_000, 1_000_000])
def test_allocate_and_free(benchmark: BenchmarkFixture, num_pages: int) -> None:
    """Allocate and free a part of 8 pages, with scattered free pages."""
    pages = PageAllocator(num_pages)
    runs = [pages.allocate(4 + i % 9) for i in range(num_pages // 9)]
    for run in runs[::2]:
        pages.free(run or [])

    def cycle() -> None:
        pages.free(pages.allocate(8) or [])

    benchmark(cycle)
