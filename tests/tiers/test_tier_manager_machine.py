"""Prefetch, write-back, stores and evictions in any order, faults at every step."""

from __future__ import annotations

from typing import get_args

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcore.config import WritePolicy
from kvcore.keys import ChunkHash
from kvcore.storage.l1 import Chunk
from kvcore.storage.required_parts import RequiredParts, count_hits
from kvcore.tiers.prefetch import PrefetchJob
from tests.tiers.test_tier_manager import (
    CHUNK_SIZE,
    ONE,
    TWO,
    WINDOWED,
    TierFixture,
    chain,
)

# A prompt belongs to one model: its chunks have the parts of one layout.
PROMPTS = {0: ONE, 1: TWO, 2: WINDOWED}
numbers = st.sampled_from(sorted(PROMPTS))
lengths = st.integers(1, 6)
KEPT = [(), (0,), (0,), (1,), (0, 1)]
"""Tiers that were given a prompt before it is asked for."""


class TierManagerMachine(RuleBasedStateMachine):
    """Two manual tiers; nothing is answered but by a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[PrefetchJob, int]] = []
        self.leases: list[list[Chunk]] = []
        self.has_condemned = False
        self.late: list[PrefetchJob] = []

    @initialize(policy=st.sampled_from(get_args(WritePolicy)))
    def build(self, policy: str) -> None:
        """Write at once, on second use, or ahead of eviction."""
        self.fixture = TierFixture(
            num_pages=22, num_tiers=2, policy=policy, max_bytes=500, max_jobs=3
        )

    # -- what clients do --------------------------------------------------------------

    @rule(number=numbers, length=lengths)
    def store(self, number: int, length: int) -> None:
        """A worker stores a prompt's chunks."""
        self.fixture.store(chain(number, length), PROMPTS[number])

    @rule(number=numbers, length=lengths, kept=st.sampled_from(KEPT))
    def look_up(self, number: int, length: int, kept: tuple[int, ...]) -> None:
        """A scheduler looks up; tiers mostly have it."""
        for tier in kept:
            self.another_server_stores(number, length, tier)
        job = self.fixture.submit(chain(number, length), PROMPTS[number])
        self.jobs.append((job, number))

    @precondition(lambda self: any(job.future.done() for job, _ in self.jobs))
    @rule(data=st.data())
    def answer_lookup(self, data: st.DataObject) -> None:
        """An answer goes out: what is there is leased, then the job is settled."""
        done = [each for each in self.jobs if each[0].future.done()]
        job, number = data.draw(st.sampled_from(done))
        needs = PROMPTS[number]
        chunks = self.fixture.l1.acquire_leading(job.keys, needs.full)
        hit = count_hits([chunk.ready for chunk in chunks], needs, CHUNK_SIZE)
        complete = job.is_over and job.state.value == "done"
        # Only a lack of time or room, or what was found wrong, makes it less than that.
        excused = (
            job in self.late
            or self.has_condemned
            or self.fixture.prefetched.loads_without_room
        )
        assert not complete or excused or hit >= job.goal
        self.fixture.l1.release(chunks[hit:])
        self.leases.append(chunks[:hit])
        self.fixture.settle(job)
        self.jobs.remove((job, number))

    @precondition(lambda self: self.leases)
    @rule()
    def end_lease(self) -> None:
        """The oldest lease ends."""
        self.fixture.l1.release(self.leases.pop(0))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A session ends, or its client is gone; its late answer settles once more."""
        job, number = data.draw(st.sampled_from(self.jobs))
        self.jobs.remove((job, number))
        self.fixture.manager.prefetcher.cancel(job)
        self.fixture.run()
        self.fixture.settle(job)

    @rule(number=numbers, length=lengths)
    def drop(self, number: int, length: int) -> None:
        """A client clears chunks."""
        self.fixture.l1.drop(chain(number, length))

    @rule(number=numbers)
    def condemn(self, number: int) -> None:
        """A retrieve finds wrong bytes."""
        for chunk in self.fixture.l1.present(chain(number, 1), 1):
            self.has_condemned |= self.fixture.l1.condemn(chunk)

    # -- what tiers do ----------------------------------------------------------------

    @precondition(lambda self: any(tier.pending for tier in self.fixture.tiers))
    @rule(
        data=st.data(),
        count=st.integers(1, 5),
        well=st.sampled_from([True, True, True, False]),
    )
    def answer(self, data: st.DataObject, count: int, well: bool) -> None:
        """Calls of the tiers end, in any order; the last of them well or not."""
        for left in reversed(range(count)):
            tiers = [tier for tier in self.fixture.tiers if tier.pending]
            if not tiers:
                break
            tier = data.draw(st.sampled_from(tiers))
            place = data.draw(st.integers(0, len(tier.pending) - 1))
            tier.answer(place, well=well or bool(left))
            self.fixture.run()

    @rule(number=numbers, length=lengths, tier=st.integers(0, 1))
    def another_server_stores(self, number: int, length: int, tier: int) -> None:
        """A shared tier has more than we put there."""
        self.fixture.keep(chain(number, length), PROMPTS[number], tier)

    @precondition(lambda self: any(tier.kept for tier in self.fixture.tiers))
    @rule(data=st.data(), gone=st.booleans())
    def spoil(self, data: st.DataObject, gone: bool) -> None:
        """A tier evicts a part, or will return other bytes for it."""
        tier = data.draw(st.sampled_from([t for t in self.fixture.tiers if t.kept]))
        key = data.draw(st.sampled_from(sorted(tier.kept)))
        if gone:
            del tier.kept[key]
        else:
            tier.wrong.add(key)

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def wait(self, seconds: float) -> None:
        """Time goes by: jobs come to their deadline."""
        waiting = [job for job, _ in self.jobs if not job.future.done()]
        self.fixture.now += seconds
        self.fixture.run()
        self.late += [job for job in waiting if job.future.done()]

    # -- what always holds ------------------------------------------------------------

    @invariant()
    def l1_is_consistent(self) -> None:
        """No overlap, no lost page, no double release."""
        self.fixture.l1.check()

    @invariant()
    def what_is_readable_is_right(self) -> None:
        """Nothing uncommitted, nothing of another chunk, nothing spoilt."""
        for number in PROMPTS:
            for key in chain(number, 6):
                self._check(key)

    def _check(self, key: ChunkHash) -> None:
        for chunk in self.fixture.l1.present([key], 0):
            ready = [p for p in chunk.parts if chunk.ready >> p & 1]
            if len(ready) == len(chunk.parts) and ready:
                self.fixture.num_present([key], RequiredParts(chunk.ready, ()))

    @invariant()
    def what_is_late_is_answered(self) -> None:
        """No job keeps its lookup waiting past the deadline."""
        for job, _ in self.jobs:
            assert job.future.done() or job.deadline > self.fixture.now

    @invariant()
    def loads_are_bounded(self) -> None:
        """Per tier, and jobs in number."""
        assert self.fixture.manager.prefetcher.num_jobs <= 3
        for loading in self.fixture.manager.prefetcher._num_bytes:
            assert 0 <= loading <= 500

    def teardown(self) -> None:
        """When all is answered and settled, nothing is held and all pages come back."""
        fixture = self.fixture
        try:
            fixture.answer_all()
            fixture.now += 100
            fixture.run()
            for job, _ in self.jobs:
                fixture.settle(job)
            for chunks in self.leases:
                fixture.l1.release(chunks)
            fixture.answer_all()
            fixture.check_idle()
            fixture.l1.drop(fixture.l1.hashes())
            assert fixture.arena.used_bytes == 0
        finally:
            fixture.manager.close()
            fixture.arena.close()


TestTierManagerMachine = TierManagerMachine.TestCase
TestTierManagerMachine.__doc__ = """Whatever fails, holds and reservations end once."""
TestTierManagerMachine.settings = settings(
    max_examples=8 * settings().max_examples, stateful_step_count=50
)
