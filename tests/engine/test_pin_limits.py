"""Limits of pinned bytes per engine, per cache salt, and for all."""

from __future__ import annotations

import pytest

from kvcore.engine.pin_limits import (
    EVERYONE,
    RECOUNT_PAUSE,
    Owner,
    PinLimits,
    owners_of,
)


class LimitsFixture:
    """Limits on 1,000 bytes, with an exact count and a clock that tests set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.counted: dict[Owner, int] = {}
        self.num_counts = 0
        self.limits = PinLimits(1000, 0.5, self.count, lambda: self.now)

    def count(self, owner: Owner) -> int:
        """Return the exact number of leased bytes that the test has set."""
        self.num_counts += 1
        self.now += 1.0
        return self.counted.get(owner, 0)


@pytest.fixture
def bench() -> LimitsFixture:
    """Limits without a pin."""
    return LimitsFixture()


ONE, TWO = owners_of(b"one", None), owners_of(b"two", None)


def test_one_engine_pins_at_most_its_share(bench: LimitsFixture) -> None:
    """And all of them at most nine tenths."""
    assert bench.limits.room(ONE, 400) == 400
    bench.limits.add_ticket(ONE, 400)
    assert bench.limits.room(ONE, 400) == 100
    assert bench.limits.room(TWO, 600) == 500
    bench.limits.add_ticket(TWO, 500)
    assert bench.limits.room(owners_of(b"three", None), 400) == 0
    bench.limits.end_ticket(TWO, 500)
    assert bench.limits.room(owners_of(b"three", None), 400) == 400


def test_one_salt_of_several_engines_pins_at_most_its_share(
    bench: LimitsFixture,
) -> None:
    """Another salt is not concerned."""
    bench.limits.add_ticket(owners_of(b"one", "tenant"), 300)
    bench.limits.add_ticket(owners_of(b"two", "tenant"), 150)
    assert bench.limits.room(owners_of(b"three", "tenant"), 200) == 50
    assert bench.limits.room(owners_of(b"three", "other"), 200) == 200


def test_chunks_of_several_leases_count_once(bench: LimitsFixture) -> None:
    """They are counted where the sum of the leases exceeds the limit."""
    first = bench.limits.add_lease(ONE, 300)
    bench.limits.add_lease(ONE, 300)
    bench.counted = {b"one": 300, EVERYONE: 300}
    assert bench.limits.room(ONE, 200) == 200
    assert bench.num_counts == 1
    bench.limits.end_lease(first)
    assert bench.limits.room(ONE, 300) == 200
    assert bench.num_counts == 1
    bench.now += RECOUNT_PAUSE
    bench.counted = {}
    assert bench.limits.room(ONE, 300) == 300


def test_an_owner_without_pins_is_forgotten(bench: LimitsFixture) -> None:
    """Its leases and tickets have ended."""
    charge = bench.limits.add_lease(ONE, 300)
    bench.limits.add_ticket(ONE, 200)
    bench.limits.end_ticket(ONE, 200)
    bench.limits.end_lease(charge)
    assert bench.limits.room(ONE, 500) == 500
    assert not bench.limits._pins
