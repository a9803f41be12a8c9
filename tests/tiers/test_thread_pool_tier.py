"""What a tier makes of a blocking store: threads, deadlines, back-off, counters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcore.shm import Segment
from kvcore.tiers.thread_pool_tier import CircuitBreaker
from kvcore.tiers.tier import LoadItem, LoadOutcome, StoreResult, Tier
from tests.tiers.fake_store import FakeBackend, FakeEngine
from tests.tiers.part_factory import PAGE, key_of, store_item, view
from tests.tiers.store_servers import wait_until


class Clock:
    """Time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        """Return it."""
        return self.now


@pytest.fixture
def fake() -> FakeEngine:
    """A store that runs."""
    engine = FakeEngine(Path())
    engine.start()
    return engine


@pytest.fixture
def tier(fake: FakeEngine) -> Iterator[Tier]:
    """A tier on it."""
    tier = fake.open()
    yield tier
    fake.resume()
    tier.close()


def test_one_probe_ends_a_back_off() -> None:
    """Back-off admits no call, then one probe; its success admits all."""
    clock = Clock()
    breaker = CircuitBreaker(1.0, 5.0, clock)
    assert breaker.admit()
    assert breaker.fail("gone")
    assert not breaker.admit()
    clock.now += 1
    assert [breaker.admit(), breaker.admit()] == [True, False]
    breaker.succeed()
    assert [breaker.admit(), breaker.admit()] == [True, True]
    assert breaker.state.last_error == "gone"


def test_back_off_doubles_to_a_bound() -> None:
    """Every failed probe doubles the wait, up to 16 times the first."""
    clock = Clock()
    breaker = CircuitBreaker(1.0, 5.0, clock)
    breaker.fail("gone")
    for wait in (1, 2, 4, 8, 16, 16):
        clock.now += wait - 0.5
        assert not breaker.admit()
        clock.now += 0.5
        assert breaker.admit()
        assert not breaker.fail("still gone")
    assert breaker.state.num_failures == 1


def test_one_failure_met_by_many_counts_once() -> None:
    """Calls that were under way when the store died do not lengthen the back-off."""
    clock = Clock()
    breaker = CircuitBreaker(1.0, 5.0, clock)
    assert [breaker.fail("gone") for _ in range(9)] == [True] + [False] * 8
    clock.now += 1
    assert breaker.admit()


def test_a_lost_probe_does_not_end_all_trying() -> None:
    """A probe that never reports is followed by another."""
    clock = Clock()
    breaker = CircuitBreaker(1.0, 5.0, clock)
    breaker.fail("gone")
    clock.now += 1
    assert breaker.admit()
    clock.now += 5
    assert breaker.admit()


def test_questions_do_not_wait_for_transfers(
    fake: FakeEngine, tier: Tier, arena: Segment
) -> None:
    """A lookup is answered while loads and stores stand."""
    fake.pause()
    tier.store([store_item(n, view(arena, 0, PAGE)) for n in range(8)])
    load = tier.load(
        [LoadItem(key_of(n), (view(arena, PAGE, PAGE),)) for n in range(8)]
    )
    for _ in range(4):
        fake.backend.entered.acquire()
    found = tier.contains([key_of(1)])
    assert fake.backend.entered.acquire(timeout=10)  # It got there beside the others.
    fake.resume()
    assert found.result() in ([False], [True])
    assert len(load.result()) == 8


def test_expired_queue_time_does_not_trip_the_breaker(
    fake: FakeEngine, tier: Tier, arena: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts dequeued after their deadline fail, and the tier stays up."""
    tier.contains([key_of(1)]).result()
    monkeypatch.setattr(tier, "timeout_s", -1.0)
    assert tier.store([store_item(1, view(arena, 0, PAGE))]).result() == [
        StoreResult.FAILED
    ]
    health = tier.health()
    assert health.up
    assert (health.counters.late, health.counters.store_failed) == (1, 1)


def test_a_full_store_is_left_alone_for_a_while(
    fake: FakeEngine, tier: Tier, arena: Segment
) -> None:
    """After FULL nothing is sent until the back-off is over."""
    fake.backend.max_bytes = 0
    blob = store_item(1, view(arena, 0, PAGE))
    monotonic = Clock()
    tier._clock = monotonic  # type: ignore[attr-defined]
    assert tier.store([blob]).result() == [StoreResult.FULL]
    fake.backend.max_bytes = 1 << 20
    assert tier.store([blob]).result() == [StoreResult.FULL]
    assert not fake.backend.records
    monotonic.now += 1
    assert tier.store([blob]).result() == [StoreResult.DONE]
    assert tier.health().counters.full == 2


def test_a_defect_is_a_failure_and_is_logged(
    fake: FakeEngine,
    tier: Tier,
    arena: Segment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error that no store should raise ends the future, and leaves a trace."""

    def broken(*_: object) -> list[bool]:
        raise ZeroDivisionError

    monkeypatch.setattr(fake.backend, "contains", broken)
    assert tier.contains([key_of(1)]).result() == [False]
    assert "defect" in caplog.text
    assert not tier.health().up


def test_probe_is_asynchronous(fake: FakeEngine, tier: Tier) -> None:
    """Until the first reply, health has no usage and the tier is not up."""
    fake.pause()
    for _ in range(9):
        tier.probe()
    health = tier.health()
    assert (health.up, health.used_bytes, health.counters.failures) == (False, None, 0)
    assert health.last_error == "it has not answered yet"
    fake.resume()
    wait_until(lambda: tier.health().up, "an answer")
    health = tier.health()
    assert (health.used_bytes, health.max_bytes) == (0, FakeEngine.capacity)
    assert health.last_error == ""
    assert fake.backend.entered.acquire(blocking=False)
    assert not fake.backend.entered.acquire(blocking=False)  # Nine probes are one.


def test_a_probe_ends_with_its_time(
    fake: FakeEngine, tier: Tier, arena: Segment
) -> None:
    """Questions behind a store that hangs wait no longer for it having been probed."""
    tier.contains([key_of(1)]).result()
    fake.pause()
    tier.probe()
    assert tier.contains([key_of(1)]).result() == [False]
    assert not tier.health().up


def test_a_batch_fails_only_where_it_broke(
    fake: FakeEngine, tier: Tier, arena: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts done before the store failed are done; the others are failed."""
    blobs = [store_item(n, view(arena, 0, PAGE)) for n in range(2)]
    assert set(tier.store(blobs).result()) == {StoreResult.DONE}
    enter = FakeBackend._enter
    calls: list[int] = []

    def once(backend: FakeBackend, deadline: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            fake.backend.alive.clear()
        enter(backend, deadline)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeBackend, "_enter", once)
    monkeypatch.setattr(tier, "_threads", 1)
    slots = [LoadItem(blob.key, (view(arena, PAGE, PAGE),)) for blob in blobs]
    outcomes = [one.outcome for one in tier.load(slots).result()]
    assert outcomes == [LoadOutcome.DONE, LoadOutcome.FAILED]


def test_work_waits_for_a_thread_that_cannot_be_had(
    tier: Tier, arena: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with all the threads it may have: the next call gets both done."""

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    blob = store_item(1, view(arena, 0, PAGE))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        first = tier.store([blob])
        assert not first.done()
    assert tier.store([blob]).result() == [StoreResult.PRESENT]
    assert first.result() == [StoreResult.DONE]
