"""Leases: each ends exactly once, counted by its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kvcore.engine.leases import EndReason, LeaseTable
from kvcore.keys import ChunkHash, SessionKey
from kvcore.storage.arena import Arena
from kvcore.storage.eviction import LRU
from kvcore.storage.l1 import L1, PartId

HASHES = [ChunkHash(bytes([i])) for i in range(6)]
ALICE, BOB = SessionKey("engine", "alice"), SessionKey("engine", "bob")
RANKS = 0b11


@dataclass
class Clock:
    """A clock that tests set."""

    now: float = 100.0

    def __call__(self) -> float:
        """Return the set time."""
        return self.now


class Bench:
    """An L1 of six stored chunks, a table with leases of 10 s, and a clock."""

    def __init__(self, arena: Arena) -> None:
        self.clock = Clock()
        self.l1 = L1(arena, LRU())
        self.l1.commit(self.l1.reserve(HASHES, PartId(0), 64).reservations)
        self.table = LeaseTable(self.l1, 10.0, self.clock)

    def grant(self, owner: SessionKey, num_chunks: int = 6, client: str = "c") -> None:
        """Hold and lease chunks, as the engine does."""
        chunks = self.l1.acquire_leading(HASHES[:num_chunks], 1)
        self.table.grant(owner, "model", chunks, RANKS, client)

    @property
    def num_held(self) -> int:
        """Return the number of held chunks."""
        return self.l1.stats().num_held

    def ended(self) -> dict[str, int]:
        """Return the non-zero numbers of ended leases by reason."""
        return {r.value: n for r, n in self.table.num_ended.items() if n}


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench; the counts and L1 are checked at the end."""
    arena = Arena(64 * 8, 64)
    bench = Bench(arena)
    yield bench
    bench.l1.check()
    table = bench.table
    assert table.num_granted == sum(table.num_ended.values()) + len(table)
    arena.close()


def test_lease_ends_when_every_rank_has_read(bench: Bench) -> None:
    """The chunks are held until the last reader has read."""
    bench.grant(ALICE)
    bench.table.read(ALICE, 0, 6, 0)
    assert (bench.num_held, len(bench.table)) == (6, 1)
    bench.table.read(ALICE, 0, 6, 0)
    assert bench.num_held == 6
    bench.table.read(ALICE, 0, 6, 1)
    assert (bench.num_held, bench.ended()) == (0, {"read": 1})


def test_reads_take_readers_off_a_range(bench: Bench) -> None:
    """Each chunk is released when its last reader has read it."""
    bench.grant(ALICE)
    bench.table.read(ALICE, 2, 4, 0)
    bench.table.read(ALICE, 0, 3, 1)
    assert [c.holds if c else None for c in bench.l1.peek(HASHES)] == [1, 1, 0, 1, 1, 1]
    (status,) = bench.table.status(9)
    assert (status.num_chunks, status.waiting_readers) == (5, (0, 1))
    bench.table.read(ALICE, 0, 99, 0)
    bench.table.read(ALICE, 3, 6, 1)
    assert (bench.num_held, bench.ended()) == (0, {"read": 1})


def test_free_ends_a_range_for_all_readers(bench: Bench) -> None:
    """No rank has to read released chunks."""
    bench.grant(ALICE)
    bench.table.free(ALICE, 4, 6)
    bench.table.free(ALICE, 3, 3)
    bench.table.free(ALICE, 5, 2)
    assert bench.num_held == 4
    bench.table.free(ALICE, 0, 4)
    assert (bench.num_held, bench.ended()) == (0, {"released": 1})


def test_a_later_lookup_replaces_the_lease(bench: Bench) -> None:
    """One lease per session; chunks of both are never free in between."""
    bench.grant(ALICE, 6)
    bench.grant(ALICE, 2)
    assert (bench.num_held, len(bench.table)) == (2, 1)
    assert bench.ended() == {"replaced": 1}
    bench.grant(ALICE, 0)
    assert (bench.num_held, bench.ended()) == (0, {"replaced": 2})


def test_leases_of_two_sessions_are_apart(bench: Bench) -> None:
    """The end of one session keeps the other's hold on the same chunks."""
    bench.grant(ALICE)
    bench.grant(BOB, 3)
    bench.table.end(ALICE)
    bench.table.end(ALICE)
    assert (bench.num_held, bench.ended()) == (3, {"session_end": 1})
    bench.table.end(BOB)
    assert bench.num_held == 0


def test_leases_expire_in_order(bench: Bench) -> None:
    """The deadline is the lookup's time plus the limit; a new lookup renews it."""
    assert bench.table.next_deadline() is None
    bench.grant(ALICE)
    bench.clock.now = 105.0
    bench.grant(BOB)
    bench.grant(ALICE)
    bench.clock.now = 106.0
    bench.grant(ALICE)
    assert bench.table.next_deadline() == 115.0
    bench.clock.now = 114.9
    assert bench.table.expire() == 0
    bench.clock.now = 115.0
    assert bench.table.expire() == 1
    assert bench.table.next_deadline() == 116.0
    bench.clock.now = 1000.0
    assert bench.table.expire() == 1
    assert (bench.num_held, bench.ended()) == (0, {"replaced": 2, "expired": 2})


def test_a_client_that_is_gone_takes_its_leases_along(bench: Bench) -> None:
    """Only the leases that were granted to that client end."""
    bench.grant(ALICE, client="gone")
    bench.grant(BOB, client="stays")
    for _ in range(2):
        bench.table.end_client("gone")
    assert (len(bench.table), bench.ended()) == (1, {"client_gone": 1})
    bench.table.end(BOB)


def test_a_worker_that_is_gone_is_not_waited_for(bench: Bench) -> None:
    """Its rank is removed from its own engine's leases."""
    other = SessionKey("another engine", "alice")
    bench.grant(ALICE)
    bench.grant(other)
    bench.table.read(ALICE, 0, 2, 1)
    bench.table.drop_reader(b"", "engine", 0)
    (mine, theirs) = bench.table.status(9)
    assert (mine.num_chunks, mine.waiting_readers) == (4, (1,))
    assert (theirs.num_chunks, theirs.waiting_readers) == (6, (0, 1))
    bench.table.drop_reader(b"", "engine", 1)
    assert bench.ended() == {"client_gone": 1}
    bench.table.end(other)


def test_a_lease_that_nobody_reads_is_none(bench: Bench) -> None:
    """Without readers or chunks the hold ends at once and no lease is granted."""
    bench.table.grant(ALICE, "model", bench.l1.acquire_leading(HASHES, 1), 0, "c")
    bench.table.grant(BOB, "model", [], RANKS, "c")
    assert (bench.num_held, len(bench.table), bench.table.num_granted) == (0, 0, 0)


def test_chunks_that_are_not_needed_have_a_place_in_a_lease(bench: Bench) -> None:
    """Windows leave gaps: indices count them, holds do not."""
    chunks = bench.l1.acquire(HASHES[:4], [0, 0, 1, 1])
    assert chunks is not None
    bench.table.grant(ALICE, "model", chunks, RANKS, "c")
    assert bench.num_held == 2
    bench.table.free(ALICE, 2, 3)
    assert bench.num_held == 1
    bench.table.end(ALICE)


def test_leaves_of_an_ended_lease_go_first(bench: Bench) -> None:
    """In whatever order chunks are read, the last ones are evicted first."""
    bench.grant(ALICE)
    bench.table.read(ALICE, 2, 4, 0)
    others = [ChunkHash(bytes([i])) for i in range(10, 14)]
    dropped = bench.l1.reserve(others, PartId(0), 64)
    assert (len(dropped.reservations), dropped.num_dropped) == (2, 2)
    bench.table.end(ALICE)
    assert len(bench.l1.reserve(others[2:], PartId(0), 64).reservations) == 2
    assert len(bench.l1.present(HASHES, 1)) == 4


def test_unknown_sessions_are_no_error(bench: Bench) -> None:
    """A read or an end after the lease's end does nothing."""
    bench.table.read(BOB, 0, 3, 0)
    bench.table.free(BOB, 0, 3)
    bench.table.end(BOB)
    bench.table.end_client("nobody")
    assert all(bench.table.num_ended[reason] == 0 for reason in EndReason)


def test_status_tells_age_and_is_cut(bench: Bench) -> None:
    """The oldest leases come first, up to the limit."""
    bench.grant(ALICE)
    bench.clock.now = 103.0
    bench.grant(BOB, 2)
    (status,) = bench.table.status(1)
    assert (status.engine_id, status.request_id) == ("engine", "alice")
    assert (status.model, status.num_chunks) == ("model", 6)
    assert (status.age_s, status.expires_in_s) == (3.0, 7.0)
    assert len(bench.table.status(10)) == 2
