"""Prefetch and write-back between L1 and manual tiers, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvcore.config import PrefetchConfig, WriteBackConfig
from kvcore.extents import buffers_of, checksum_of
from kvcore.keys import ChunkHash, SessionKey
from kvcore.layout import Fingerprint
from kvcore.option_structs import ByteSize
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import PartId, PartName
from kvcore.storage.l1 import L1
from kvcore.storage.quotas import make_order
from kvcore.storage.recovery import arena_name, recover
from kvcore.storage.required_parts import (
    RequiredPart,
    RequiredParts,
    RequiredWindow,
    count_hits,
)
from kvcore.tiers.prefetch import JobState, PrefetchJob
from kvcore.tiers.tier import Tier
from kvcore.tiers.tier_manager import TierManager
from kvcore.tiers.timer_thread import TimerThread
from tests.tiers.manual_tier import ManualTier

PAGE = 64
PART_BYTES = 100
"""Two pages."""
CHUNK_SIZE = 4


def name(rank: int, group: int = 0) -> PartName:
    """A part of the model."""
    return PartName("m", 2, rank, group, Fingerprint("f" * 16))


ONE = RequiredParts(1, (), (RequiredPart(PartId(0), name(0), PART_BYTES, None),))
TWO = RequiredParts(
    0b11,
    (),
    tuple(RequiredPart(PartId(r), name(r), PART_BYTES, None) for r in range(2)),
)
WINDOWED = RequiredParts(
    0b1,
    (RequiredWindow(0b10, CHUNK_SIZE + 1),),
    (
        RequiredPart(PartId(0), name(0), PART_BYTES, None),
        RequiredPart(PartId(1), name(0, 1), PART_BYTES, CHUNK_SIZE + 1),
    ),
)
"""The window reaches into two chunks."""


def chain(number: int, length: int) -> list[ChunkHash]:
    """Hashes of a prompt's chunks."""
    return [ChunkHash(bytes([number, i] * 16)) for i in range(length)]


def content(key: ChunkHash, part: PartName) -> bytes:
    """The right bytes of a part."""
    return bytes([key[0] * 32 + key[1] * 4 + part.rank + 2 * part.group]) * PART_BYTES


@dataclass
class TierFixture:
    """A manager over a small L1, run by hand."""

    num_pages: int = 16
    num_tiers: int = 1
    policy: str = "write_through"
    max_bytes: int = 1 << 20
    write_bytes: int = 1 << 20
    max_jobs: int = 10
    now: float = 0.0
    over: Sequence[Tier] = ()
    """Instead of manual tiers of its own."""
    kept_at: Path | None = None
    """The journal of an L1 that a later fixture opens."""
    quotas: Mapping[str, int] = field(default_factory=dict)
    tiers: list[ManualTier] = field(init=False)

    def __post_init__(self) -> None:
        self._open_l1()
        self.over = self.over or [ManualTier(f"t{i}") for i in range(self.num_tiers)]
        self.tiers = [tier for tier in self.over if isinstance(tier, ManualTier)]
        self.coordinator = TimerThread("test", lambda: self.now)
        self.manager = TierManager(
            self.l1,
            self.arena,
            self.over,
            PrefetchConfig(max_jobs=self.max_jobs, max_bytes=ByteSize(self.max_bytes)),
            WriteBackConfig(
                policy=self.policy,
                max_bytes=ByteSize(self.write_bytes),
                watermark=0.5,
            ),
            self.coordinator,
        )
        self.prefetched = self.manager.prefetcher.counters
        self.written = self.manager.write_back.counters

    def _open_l1(self) -> None:
        order = make_order("lru", self.quotas, lambda owner: owner.request_id)
        num_bytes = self.num_pages * PAGE
        if self.kept_at is None:
            self.arena = Arena(num_bytes, PAGE)
            self.l1 = L1(self.arena, order)
            return
        self.arena = Arena(num_bytes, PAGE, arena_name(self.kept_at), kept=True)
        recovered = recover(self.kept_at, self.arena)
        self.journal = recovered.journal
        self.l1 = L1(self.arena, order, self.journal)
        self.l1.restore(recovered.parts)
        self.arena.keep()

    @property
    def tier(self) -> ManualTier:
        """The first tier."""
        return self.tiers[0]

    def keep(
        self, hashes: Sequence[ChunkHash], needs: RequiredParts = ONE, tier: int = 0
    ) -> None:
        """Have a tier hold all parts of chunks."""
        for key in hashes:
            for need in needs.parts:
                kept = self.tiers[tier].kept
                kept[need.name.key(key)] = content(key, need.name)

    def store(
        self,
        hashes: Sequence[ChunkHash],
        needs: RequiredParts = ONE,
        owner: SessionKey | None = None,
    ) -> None:
        """Store as a worker would, all parts."""
        for need in needs.parts:
            got = self.l1.reserve(
                hashes, need.part, PART_BYTES, name=need.name, owner=owner
            )
            for reservation in got.reservations:
                buffers = buffers_of(self.arena.array.data, reservation.extents)
                rest = content(reservation.chunk.hash, need.name)
                for buffer in buffers:
                    buffer[:] = rest[: len(buffer)]
                    rest = rest[len(buffer) :]
                reservation.checksum = checksum_of(buffers)
            self.l1.commit(got.reservations)
            self.manager.stored([r.chunk for r in got.reservations])
        self.run()

    def submit(
        self,
        hashes: Sequence[ChunkHash],
        needs: RequiredParts = ONE,
    ) -> PrefetchJob:
        """Begin a job with ten seconds' time."""
        job = self.manager.prefetch(
            hashes,
            needs,
            chunk_size=CHUNK_SIZE,
            deadline=self.now + 10,
            owner=SessionKey("e", str(hashes[0][0])),
        )
        self.run()
        return job

    def run(self) -> None:
        """Have the coordinator do what there is."""
        self.coordinator.run_due()

    def answer_all(self) -> None:
        """Have every tier answer until there is nothing more to answer."""
        while any(tier.pending for tier in self.tiers):
            for tier in self.tiers:
                tier.answer_all()
            self.run()

    def num_present(
        self, hashes: Sequence[ChunkHash], needs: RequiredParts = ONE
    ) -> int:
        """Leading chunks in L1, whose bytes must be right."""
        chunks = self.l1.present(hashes, needs.full)
        for chunk in chunks:
            for part in chunk.parts.values():
                assert part.name is not None
                data = b"".join(buffers_of(self.arena.array.data, part.extents))
                assert data == content(chunk.hash, part.name)
        return len(chunks)

    def settle(self, job: PrefetchJob) -> None:
        """Say that the lookup has been answered."""
        assert job.future.done()
        self.manager.prefetcher.settle(job)
        self.run()

    def check_idle(self) -> None:
        """Nothing is held, reserved, or under way."""
        self.l1.check()
        stats = self.l1.stats()
        assert (stats.num_held, stats.num_reserved) == (0, 0)
        assert self.manager.prefetcher.num_jobs == 0
        assert all(s.num_parts == 0 for s in self.manager.write_back.status())


@pytest.fixture
def fixtures() -> Iterator[list[TierFixture]]:
    """Fixtures that are idle at the end and then closed."""
    made: list[TierFixture] = []
    yield made
    for fixture in made:
        fixture.answer_all()
        fixture.check_idle()
        fixture.manager.close()
        fixture.arena.close()


@pytest.fixture
def fixture(fixtures: list[TierFixture]) -> TierFixture:
    """One with a tier and room for eight parts."""
    fixtures.append(TierFixture())
    return fixtures[0]


def test_the_contiguous_prefix_is_loaded_and_held(fixture: TierFixture) -> None:
    """One question, one load; until it is settled nothing can evict it."""
    prompt = chain(1, 4)
    fixture.keep(prompt)
    job = fixture.submit(prompt)
    assert [call.kind for call in fixture.tier.pending] == ["contains"]
    fixture.answer_all()
    assert (fixture.tier.asked, job.goal, job.state) == (1, 4, JobState.DONE)
    assert fixture.num_present(prompt) == 4
    fixture.store(chain(2, 8))
    assert fixture.num_present(prompt) == 4
    fixture.settle(job)
    assert fixture.l1.stats().num_held == 0 or fixture.tier.pending


def test_a_gap_loads_nothing_that_cannot_be_used(fixture: TierFixture) -> None:
    """Neither what comes after a missing chunk, nor what lacks a rank."""
    prompt = chain(1, 5)
    fixture.keep(prompt[:2], TWO)
    fixture.keep(prompt[2:3], ONE)
    fixture.keep(prompt[3:], TWO)
    job = fixture.submit(prompt, TWO)
    fixture.answer_all()
    assert fixture.num_present(prompt, TWO) == job.goal == 2
    assert fixture.prefetched.parts_prefetched == 4
    fixture.settle(job)


def test_windows_load_only_what_they_cover(fixture: TierFixture) -> None:
    """Of three chunks the window's part of the first one is left where it is."""
    prompt = chain(1, 3)
    fixture.keep(prompt, WINDOWED)
    job = fixture.submit(prompt, WINDOWED)
    fixture.answer_all()
    assert [c.ready for c in fixture.l1.present(prompt, 1)] == [0b01, 0b11, 0b11]
    fixture.settle(job)


def num_hits(fixture: TierFixture, prompt: list[ChunkHash]) -> int:
    """Leading chunks that a lookup would find, windows minded."""
    masks = [c.ready for c in fixture.l1.present(prompt, WINDOWED.full)]
    return count_hits(masks, WINDOWED, CHUNK_SIZE)


@pytest.mark.parametrize("group", [0, 1])
def test_after_a_fault_the_shorter_hit_has_its_window(
    fixture: TierFixture, group: int
) -> None:
    """A part of the fourth chunk is wrong: three are a hit, with their own window."""
    prompt = chain(1, 4)
    fixture.keep(prompt, WINDOWED)
    fixture.tier.wrong.add(name(0, group).key(prompt[3]))
    job = fixture.submit(prompt, WINDOWED)
    fixture.answer_all()
    assert job.state is JobState.DONE
    assert num_hits(fixture, prompt) == job.goal == 3
    fixture.settle(job)


def test_without_room_for_all_the_hit_that_fits_has_its_window(
    fixture: TierFixture,
) -> None:
    """Of nine parts eight fit: six chunks and the window of the last two of them."""
    prompt = chain(1, 7)
    fixture.keep(prompt, WINDOWED)
    job = fixture.submit(prompt, WINDOWED)
    fixture.answer_all()
    assert num_hits(fixture, prompt) == job.goal == 6
    fixture.settle(job)


def test_faults_of_every_chunk_end_too(fixture: TierFixture) -> None:
    """Wherever a load fails next, the job ends, with nothing."""
    prompt = chain(1, 5)
    fixture.keep(prompt, WINDOWED)
    fixture.tier.wrong.update(name(0, 1).key(key) for key in prompt)
    job = fixture.submit(prompt, WINDOWED)
    fixture.answer_all()
    assert job.state is JobState.DONE
    assert num_hits(fixture, prompt) == job.goal == 0
    fixture.settle(job)


def test_what_l1_has_after_the_gap_is_used_and_held(fixture: TierFixture) -> None:
    """A chunk that only lacks its prefix is not loaded again, nor evicted meanwhile."""
    prompt = chain(1, 3)
    fixture.store(prompt)
    fixture.answer_all()
    fixture.l1.drop(prompt[:2])
    job = fixture.submit(prompt)
    fixture.answer_all()
    assert fixture.prefetched.parts_prefetched == 2
    assert fixture.num_present(prompt) == 3
    fixture.settle(job)


def test_two_lookups_share_one_load(fixture: TierFixture) -> None:
    """The second waits for the first one's load, and holds what it brings."""
    prompt = chain(1, 3)
    fixture.keep(prompt)
    first, second = fixture.submit(prompt), fixture.submit(prompt)
    fixture.tier.answer(0)
    fixture.tier.answer(0)
    fixture.run()
    assert [call.kind for call in fixture.tier.pending] == ["load"]
    assert fixture.prefetched.loads_shared == 3
    fixture.answer_all()
    assert first.future.done()
    assert second.future.done()
    fixture.settle(first)
    assert all(chunk.holds == 1 for chunk in fixture.l1.present(prompt, 1))
    fixture.settle(second)


def test_what_a_worker_stores_meanwhile_is_held(fixture: TierFixture) -> None:
    """It was lacking when the job began; eviction leaves it until it is settled."""
    prompt = chain(1, 4)
    fixture.keep(prompt)
    job = fixture.submit(prompt)
    fixture.store(prompt[:2])
    fixture.answer_all()
    fixture.store(chain(2, 8))
    fixture.answer_all()
    assert fixture.num_present(prompt) == job.goal == 4
    fixture.settle(job)


def test_a_shared_load_that_fails_shortens_both_hits(fixture: TierFixture) -> None:
    """Neither says that it has what did not come."""
    prompt = chain(1, 3)
    fixture.keep(prompt)
    fixture.tier.wrong.add(name(0).key(prompt[1]))
    jobs = [fixture.submit(prompt) for _ in range(2)]
    fixture.answer_all()
    assert fixture.prefetched.loads_shared == 3
    for job in jobs:
        assert (job.state, job.goal) == (JobState.DONE, 1)
        fixture.settle(job)


def test_wrong_bytes_are_a_miss_and_leave_the_tier(fixture: TierFixture) -> None:
    """The chunks before them are served, those after them not."""
    prompt = chain(1, 4)
    fixture.keep(prompt)
    bad = name(0).key(prompt[2])
    fixture.tier.wrong.add(bad)
    job = fixture.submit(prompt)
    fixture.answer_all()
    assert fixture.num_present(prompt) == 2
    assert fixture.prefetched.checksum_mismatches == 1
    assert bad not in fixture.tier.kept
    fixture.settle(job)


def test_at_the_deadline_it_answers_and_loads_on(fixture: TierFixture) -> None:
    """Parts loaded after the deadline serve the next lookup and are not held."""
    prompt = chain(1, 2)
    fixture.keep(prompt)
    job = fixture.submit(prompt)
    fixture.tier.answer(0)
    fixture.run()
    fixture.now = 10.1
    fixture.run()
    assert job.future.done()
    assert fixture.prefetched.prefetches_late == 1
    fixture.settle(job)
    fixture.answer_all()
    assert fixture.num_present(prompt) == 2


def test_a_cancelled_job_begins_no_more(fixture: TierFixture) -> None:
    """Its answer is due at once; what is under way ends and stays."""
    prompt = chain(1, 2)
    fixture.keep(prompt)
    job = fixture.submit(prompt)
    fixture.manager.prefetcher.cancel(job)
    fixture.run()
    assert job.future.done()
    fixture.answer_all()
    assert fixture.num_present(prompt) == 0


def test_a_failing_tier_is_a_miss(fixture: TierFixture) -> None:
    """At the question or at the load; the reservation is given back."""
    prompt = chain(1, 2)
    fixture.keep(prompt)
    for calls in (1, 2):
        job = fixture.submit(prompt)
        for call in range(calls):
            fixture.tier.answer(0, well=call < calls - 1)
            fixture.run()
        assert job.future.done()
        fixture.settle(job)
    assert job.tier_failed
    assert fixture.l1.stats().used_bytes == 0


def test_loads_in_flight_are_bounded(fixtures: list[TierFixture]) -> None:
    """The rest waits its turn, and jobs over their number are refused."""
    fixture = TierFixture(num_pages=64, max_bytes=3 * PART_BYTES, max_jobs=2)
    fixtures.append(fixture)
    prompts = [chain(number, 5) for number in range(3)]
    for prompt in prompts:
        fixture.keep(prompt)
    jobs = [fixture.submit(prompt) for prompt in prompts]
    assert jobs[2].state is JobState.REFUSED
    fixture.tier.answer(0)
    fixture.tier.answer(0)
    fixture.run()
    assert fixture.l1.stats().num_reserved == 3
    fixture.answer_all()
    assert [fixture.num_present(prompt) for prompt in prompts] == [5, 5, 0]
    for job in jobs:
        fixture.settle(job)


def test_no_more_is_loaded_than_there_is_room_for(fixture: TierFixture) -> None:
    """The prefix that fits is served; nothing of it goes for the rest."""
    prompt = chain(1, 20)
    fixture.keep(prompt)
    job = fixture.submit(prompt)
    fixture.answer_all()
    assert fixture.num_present(prompt) == 8
    fixture.settle(job)


def test_the_second_tier_is_asked_for_the_rest_and_promoted(
    fixtures: list[TierFixture],
) -> None:
    """What only a slower tier had is offered to the faster one."""
    fixture = TierFixture(num_tiers=2)
    fixtures.append(fixture)
    prompt = chain(1, 4)
    fixture.keep(prompt[:1])
    fixture.keep(prompt[1:3], tier=1)
    job = fixture.submit(prompt)
    fixture.answer_all()
    assert fixture.num_present(prompt) == 3
    assert set(fixture.tier.kept) == {name(0).key(key) for key in prompt[:3]}
    assert fixture.written.promotions == 2
    fixture.settle(job)


def test_a_store_is_written_through_to_every_tier(fixtures: list[TierFixture]) -> None:
    """All parts, once, held only while a tier reads them."""
    fixture = TierFixture(num_tiers=2)
    fixtures.append(fixture)
    prompt = chain(1, 3)
    fixture.store(prompt, TWO)
    assert fixture.l1.stats().num_held == 3
    fixture.answer_all()
    for tier in fixture.tiers:
        assert set(tier.kept) == {n.name.key(k) for k in prompt for n in TWO.parts}
    fixture.store(prompt, TWO)
    assert not fixture.tier.pending
    assert [chunk.saved for chunk in fixture.l1.present(prompt, 1)] == [0b11] * 3


def test_a_lagging_tier_has_new_work_skipped(fixtures: list[TierFixture]) -> None:
    """It is counted, and nobody waits for it."""
    fixture = TierFixture(num_pages=64, write_bytes=4 * PART_BYTES)
    fixtures.append(fixture)
    fixture.store(chain(1, 10))
    assert fixture.written.writes_skipped == 6
    fixture.answer_all()
    assert fixture.written.parts_written == 4


def test_on_second_use_waits_for_a_lookup(fixtures: list[TierFixture]) -> None:
    """What is used once never reaches the tier."""
    fixture = TierFixture(policy="on_second_use")
    fixtures.append(fixture)
    prompt = chain(1, 2)
    fixture.store(prompt)
    assert not fixture.tier.pending
    fixture.manager.write_back.used(fixture.l1.present(prompt[:1], 1))
    fixture.run()
    fixture.answer_all()
    assert set(fixture.tier.kept) == {name(0).key(prompt[0])}


def test_on_eviction_writes_ahead_of_it(fixtures: list[TierFixture]) -> None:
    """Above the watermark the next victims are clean before their turn comes."""
    fixture = TierFixture(policy="on_eviction")
    fixtures.append(fixture)
    fixture.store(chain(1, 3))
    assert not fixture.tier.pending
    fixture.store(chain(2, 2))
    fixture.answer_all()
    assert set(fixture.tier.kept) >= {name(0).key(key) for key in chain(1, 3)[1:]}
    fixture.store(chain(3, 6))
    assert fixture.written.chunks_evicted_unsaved == 0
    fixture.store(chain(4, 8))
    fixture.answer_all()
    assert fixture.written.chunks_evicted_unsaved > 0


def test_a_tier_that_is_not_up_is_probed_from_the_start(
    fixtures: list[TierFixture],
) -> None:
    """Probes run without requests; once the tier is up, `status` probes it."""
    fixture = TierFixture()
    fixtures.append(fixture)
    fixture.tier.up = False
    for second in range(3):
        fixture.now = second
        fixture.run()
        fixture.run()
        assert fixture.tier.probed == second + 1
    fixture.tier.up = True
    fixture.now += 10
    fixture.run()
    assert fixture.tier.probed == 3
    assert fixture.manager.status()[0].up
    assert fixture.tier.probed == 4
