"""Every tier over a real store: the contract, and all that a store can do wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kvcore.extents import checksum_of
from kvcore.layout import Fingerprint
from kvcore.shm import Segment
from kvcore.tiers.tier import LoadItem, LoadOutcome, LoadResult, StoreResult, Tier
from tests.tiers.part_factory import (
    PAGE,
    key_of,
    load_checked,
    outcome,
    store_item,
    view,
)
from tests.tiers.store_servers import Damage, Engine, wait_until

ROOMY = 32 << 20
"""Where in the arena the tests load to; they store from its start."""
END_S = 20.0
"""Bound on a future that must end in its tier's few seconds: far beyond, and far
below what an engine that hangs would take."""


@pytest.mark.parametrize(
    "sizes",
    [(1,), (4095,), (4096,), (PAGE, 5), (PAGE, PAGE, 4097), (8 * PAGE,), (5 << 20, 3)],
)
def test_parts_of_any_size_come_back(
    tier: Tier, arena: Segment, sizes: tuple[int, ...]
) -> None:
    """What is stored from several extents comes back into as many others."""
    offsets = [index * (6 << 20) for index in range(len(sizes))]
    blob = store_item(
        1, *(view(arena, o, s) for o, s in zip(offsets, sizes, strict=True))
    )
    into = [view(arena, ROOMY + o, s) for o, s in zip(offsets, sizes, strict=True)]
    assert tier.store([blob]).result() == [StoreResult.DONE]
    assert load_checked(tier, blob, *into)


@pytest.mark.not_with("mooncake")  # It moves bytes within registered memory only.
def test_memory_outside_the_arena_serves_too(tier: Tier, arena: Segment) -> None:
    """Unaligned private memory is stored and filled as well."""
    source, target = bytearray(b"k" * 100_001), bytearray(100_001)
    blob = store_item(1, memoryview(source)[1:], view(arena, 3, 500))
    assert tier.store([blob]).result() == [StoreResult.DONE]
    assert load_checked(tier, blob, memoryview(target)[1:], view(arena, ROOMY + 7, 500))


def test_many_parts_in_one_call(tier: Tier, arena: Segment) -> None:
    """Outcomes stand in the order that was asked for, missing ones among them."""
    blobs = [store_item(n, view(arena, n * PAGE, PAGE - n)) for n in range(40)]
    assert tier.store(blobs).result() == [StoreResult.DONE] * 40
    found = tier.contains([key_of(n) for n in range(60)]).result()
    assert found == [n < 40 for n in range(60)]
    slots = [
        LoadItem(key_of(n), (view(arena, ROOMY + n * PAGE, PAGE - n % 40),))
        for n in reversed(range(50))
    ]
    loaded = tier.load(slots).result()
    expected = [
        LoadResult(LoadOutcome.DONE, blobs[n].checksum)
        if n < 40
        else LoadResult(LoadOutcome.MISSING)
        for n in reversed(range(50))
    ]
    assert loaded == expected
    assert all(
        checksum_of(slot.buffers) == one.checksum
        for slot, one in zip(slots, loaded, strict=True)
        if one.outcome is LoadOutcome.DONE
    )


def test_nothing_asked_is_nothing_answered(tier: Tier) -> None:
    """Empty calls end with empty answers."""
    assert tier.contains([]).result() == []
    assert tier.load([]).result() == []
    assert tier.store([]).result() == []
    assert tier.delete([]).result() is None


def test_what_is_present_stays(tier: Tier, arena: Segment) -> None:
    """A second store of a key says so and changes nothing."""
    first, second = (
        store_item(1, view(arena, 0, PAGE)),
        store_item(1, view(arena, PAGE, PAGE)),
    )
    new = store_item(2, view(arena, PAGE, PAGE))
    assert tier.store([first]).result() == [StoreResult.DONE]
    assert tier.store([second, new]).result() == [StoreResult.PRESENT, StoreResult.DONE]
    assert load_checked(tier, first, view(arena, ROOMY, PAGE))


def test_deleted_parts_are_gone(tier: Tier, arena: Segment) -> None:
    """Deleting removes a key, passes over an absent one, and lets it be stored anew."""
    blob, kept = (
        store_item(1, view(arena, 0, PAGE)),
        store_item(2, view(arena, 0, PAGE)),
    )
    tier.store([blob, kept]).result()
    tier.delete([key_of(1), key_of(9)]).result()
    assert tier.contains([key_of(1), key_of(2)]).result() == [False, True]
    assert outcome(tier, key_of(1), view(arena, ROOMY, PAGE)) is LoadOutcome.MISSING
    assert tier.store([blob]).result() == [StoreResult.DONE]


def test_another_layout_is_another_part(tier: Tier, arena: Segment) -> None:
    """Same chunk with another rank or layout is missing."""
    tier.store([store_item(1, view(arena, 0, PAGE))]).result()
    others = [key_of(1, rank=1), key_of(1, layout=Fingerprint("f" * 16))]
    assert tier.contains(others).result() == [False, False]
    for key in others:
        assert outcome(tier, key, view(arena, ROOMY, PAGE)) is LoadOutcome.MISSING


@pytest.mark.parametrize("size", [PAGE - 1, PAGE + 1, 2 * PAGE])
def test_another_length_is_rejected(tier: Tier, arena: Segment, size: int) -> None:
    """A record of another length than the slot is removed, and can be stored anew."""
    blob = store_item(1, view(arena, 0, PAGE))
    tier.store([blob]).result()
    assert outcome(tier, key_of(1), view(arena, ROOMY, size)) is LoadOutcome.REJECTED
    assert tier.health().counters.rejected == 1
    assert tier.contains([key_of(1)]).result() == [False]
    assert tier.store([blob]).result() == [StoreResult.DONE]


@pytest.mark.parametrize("damage", [Damage.HALF, Damage.FOREIGN])
def test_what_is_no_record_is_rejected(
    engine: Engine, tier: Tier, arena: Segment, damage: Damage
) -> None:
    """Half a record, or none at all, is removed; its neighbours are served."""
    blobs = [store_item(n, view(arena, n * PAGE, PAGE)) for n in range(3)]
    tier.store(blobs).result()
    engine.damage(key_of(1), damage)
    slots = [
        LoadItem(key_of(n), (view(arena, ROOMY + n * PAGE, PAGE),)) for n in range(3)
    ]
    done, rejected = LoadOutcome.DONE, LoadOutcome.REJECTED
    loaded = tier.load(slots).result()
    assert [one.outcome for one in loaded] == [done, rejected, done]
    assert tier.contains([key_of(1)]).result() == [False]
    assert tier.store([blobs[1]]).result() == [StoreResult.DONE]
    assert load_checked(tier, blobs[1], view(arena, ROOMY, PAGE))


def test_wrong_bytes_do_not_match_their_checksum(
    engine: Engine, tier: Tier, arena: Segment
) -> None:
    """A flipped bit shows; after a delete the part can be stored and served again."""
    blob = store_item(1, view(arena, 0, PAGE))
    tier.store([blob]).result()
    engine.damage(key_of(1), Damage.BYTES)
    into = view(arena, ROOMY, PAGE)
    (loaded,) = tier.load([LoadItem(key_of(1), (into,))]).result()
    assert loaded.outcome is LoadOutcome.DONE
    assert loaded.checksum == blob.checksum != checksum_of([into])
    tier.delete([key_of(1)]).result()
    assert tier.store([blob]).result() == [StoreResult.DONE]
    assert load_checked(tier, blob, into)


def test_down_at_start_then_up(
    engine: Engine, opened: Callable[[], Tier], arena: Segment
) -> None:
    """A tier opens on a store that is not there, and serves once it is."""
    tier = opened()
    blob = store_item(1, view(arena, 0, PAGE))
    assert tier.store([blob]).result(END_S) == [StoreResult.FAILED]
    health = tier.health()
    assert (health.up, health.counters.failures) == (False, 1)
    assert health.last_error
    assert tier.contains([blob.key]).result(END_S) == [False]
    assert outcome(tier, blob.key, view(arena, ROOMY, PAGE)) is LoadOutcome.FAILED
    engine.start()
    wait_until(lambda: tier.store([blob]).result() == [StoreResult.DONE], "up again")
    assert load_checked(tier, blob, view(arena, ROOMY, PAGE))
    assert tier.health().up


def test_a_probe_tells_the_truth(engine: Engine, opened: Callable[[], Tier]) -> None:
    """Nobody asks it for parts, and it is shown as it is: gone, there, gone again."""
    tier = opened()

    def shows(up: bool) -> bool:
        tier.probe()
        health = tier.health()
        return health.up is up and health.counters.failures == num_failures

    num_failures = 1
    wait_until(lambda: shows(up=False), "down at the start")
    assert tier.health().last_error
    engine.start()
    wait_until(lambda: shows(up=True), "up")
    engine.kill()
    num_failures = 2
    wait_until(lambda: shows(up=False), "down")


def test_dies_under_load_and_comes_back(
    engine: Engine, tier: Tier, arena: Segment
) -> None:
    """Calls under way end as outcomes; what was there is a miss; then it serves."""
    size = 1 << 20
    blobs = [store_item(n, view(arena, n * size, size)) for n in range(16)]
    assert set(tier.store(blobs).result()) == {StoreResult.DONE}
    slots = [
        LoadItem(key_of(n), (view(arena, ROOMY + n * size, size),)) for n in range(16)
    ]
    seen: list[LoadOutcome] = []
    loading, failed = threading.Event(), threading.Event()

    def load_on() -> None:
        while not failed.is_set():
            outcomes = [one.outcome for one in tier.load(slots).result(END_S)]
            seen.extend(outcomes)
            loading.set()
            if LoadOutcome.FAILED in outcomes:
                failed.set()

    thread = threading.Thread(target=load_on)
    thread.start()
    assert loading.wait(END_S)
    engine.kill()
    assert failed.wait(END_S)
    thread.join()
    assert LoadOutcome.REJECTED not in seen
    # Not that it is down now: a call that began before may have ended well since.
    assert tier.health().counters.failures
    engine.start()
    blob = store_item(99, view(arena, 0, size))
    wait_until(lambda: tier.store([blob]).result() == [StoreResult.DONE], "up again")
    assert load_checked(tier, blob, view(arena, ROOMY, size))


@pytest.mark.not_with("file")
def test_a_store_that_hangs_fails_in_time(
    engine: Engine, tier: Tier, arena: Segment
) -> None:
    """Every future ends though the store does not, and no buffer changes later."""
    size = 1 << 20
    blobs = [store_item(n, view(arena, n * size, size)) for n in range(8)]
    assert set(tier.store(blobs).result()) == {StoreResult.DONE}
    engine.pause()
    target = view(arena, ROOMY, 8 * size)
    slots = [
        LoadItem(b.key, (target[n * size : (n + 1) * size],))
        for n, b in enumerate(blobs)
    ]
    found = tier.contains([b.key for b in blobs])
    loads = tier.load(slots)
    new = store_item(9, view(arena, 0, size))
    store = tier.store([new])
    delete = tier.delete([blobs[0].key])
    outcomes = {one.outcome for one in loads.result(END_S)}
    target[:] = bytes(target.nbytes)
    assert outcomes == {LoadOutcome.FAILED}
    assert found.result(END_S) == [False] * 8
    assert store.result(END_S) == [StoreResult.FAILED]
    assert delete.result(END_S) is None
    assert not tier.health().up
    engine.resume()
    wait_until(lambda: tier.store([new]).result()[0] in _THERE, "up again")
    assert bytes(target) == bytes(target.nbytes)
    assert load_checked(tier, new, view(arena, ROOMY, size))


_THERE = (StoreResult.DONE, StoreResult.PRESENT)


@pytest.mark.not_with("s3")  # SeaweedFS fills the disk; the fake says what S3 would.
def test_a_full_store_says_so_and_still_serves(
    engine: Engine, tier: Tier, arena: Segment
) -> None:
    """What has no room is FULL or takes the place of old parts; the rest is served."""
    size = 8 << 20
    assert engine.capacity is not None
    blobs = [
        store_item(n, view(arena, 0, size)) for n in range(engine.capacity // size + 4)
    ]
    outcomes = [tier.store([blob]).result()[0] for blob in blobs]
    assert set(outcomes) <= {StoreResult.DONE, StoreResult.FULL}
    assert outcomes[0] is StoreResult.DONE
    health = tier.health()
    assert health.up
    assert health.counters.full + health.counters.evicted > 0
    done = [b for b, o in zip(blobs, outcomes, strict=True) if o is StoreResult.DONE]
    found = tier.contains([blob.key for blob in done]).result()
    kept = [blob for blob, there in zip(done, found, strict=True) if there]
    assert kept
    assert load_checked(tier, kept[-1], view(arena, ROOMY, size))
    tier.delete([blob.key for blob in done]).result()
    wait_until(
        lambda: tier.store([blobs[-1]]).result() == [StoreResult.DONE], "room again"
    )


def test_closed_tiers_answer_as_if_down(tier: Tier, arena: Segment) -> None:
    """After close nothing is there, nothing raises, and closing again does nothing."""
    blob = store_item(1, view(arena, 0, PAGE))
    tier.store([blob]).result()
    under_way = tier.load([LoadItem(blob.key, (view(arena, ROOMY, PAGE),))])
    tier.close()
    tier.close()
    assert under_way.done()
    assert tier.contains([blob.key]).result() == [False]
    assert outcome(tier, blob.key, view(arena, ROOMY, PAGE)) is LoadOutcome.FAILED
    assert tier.store([blob]).result() == [StoreResult.FAILED]
    assert tier.delete([blob.key]).result() is None
    assert not tier.health().up


def test_health_counts_what_happened(tier: Tier, arena: Segment) -> None:
    """Counters tell keys asked and found, parts and bytes moved, and misses."""
    blob = store_item(1, view(arena, 0, PAGE))
    tier.store([blob, store_item(2, view(arena, 0, 10))]).result()
    tier.store([blob]).result()
    tier.contains([key_of(n) for n in range(5)]).result()
    outcome(tier, key_of(7), view(arena, ROOMY, PAGE))
    load_checked(tier, blob, view(arena, ROOMY, PAGE))
    counters = tier.health().counters
    assert (counters.stored, counters.stored_bytes) == (2, PAGE + 10)
    assert (counters.present, counters.asked, counters.found) == (1, 5, 2)
    assert (counters.loaded, counters.loaded_bytes) == (1, PAGE)
    assert (counters.missing, counters.failures) == (1, 0)
