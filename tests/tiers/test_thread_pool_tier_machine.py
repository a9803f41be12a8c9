"""Thread-pool tier over a store with injected faults, and its users.

Executors are manual: a rule runs the next work item, and the store fails in it or
not. What hangs takes its time and ends at its deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

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
from kvcore.errors import DeadlineExceeded, Unavailable
from kvcore.extents import checksum_of
from kvcore.keys import ChunkHash
from kvcore.storage.l1 import Chunk
from kvcore.storage.required_parts import RequiredParts, count_hits
from kvcore.tiers import thread_pool_tier as pooled
from kvcore.tiers import tier as contract
from kvcore.tiers.prefetch import PrefetchJob
from kvcore.tiers.thread_pool_tier import ThreadPoolTier
from kvcore.tiers.tier import Deadline, PartKey, StoreItem, StoreResult, Usage
from tests.tiers.fake_store import FakeBackend
from tests.tiers.store_servers import Damage, damaged
from tests.tiers.test_tier_manager import (
    CHUNK_SIZE,
    ONE,
    PART_BYTES,
    TWO,
    WINDOWED,
    TierFixture,
    chain,
    content,
)

PROMPTS = {0: ONE, 1: TWO, 2: WINDOWED}
numbers = st.sampled_from(sorted(PROMPTS))
lengths = st.integers(1, 6)
TIMEOUT_S, RETRY_S = 4.0, 1.0
LOADING_BYTES, WRITING_BYTES = 500, 900

FAULTS: dict[str, Callable[[], Exception]] = {
    "refuses": lambda: Unavailable("refuses"),
    "hangs": lambda: DeadlineExceeded("hangs"),
    "has a defect": lambda: ZeroDivisionError("defect"),
}


def store_items(hashes: Sequence[ChunkHash], needs: RequiredParts) -> list[StoreItem]:
    """All parts of chunks, as they should be."""
    blobs = []
    for key in hashes:
        for need in needs.parts:
            data = memoryview(content(key, need.name))
            blobs.append(StoreItem(need.name.key(key), (data,), checksum_of([data])))
    return blobs


class ManualExecutor:
    """An executor whose work is done when a rule says so."""

    def __init__(self, *_: object) -> None:
        self.waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def submit(self, work: Callable[..., None], *args: Any) -> Future[None]:
        """Have it wait."""
        self.waiting.append((work, args))
        return Future()

    def run_one(self) -> None:
        """Do what has waited longest."""
        work, args = self.waiting.pop(0)
        work(*args)

    def shutdown(self) -> None:
        """Do all that waits."""
        while self.waiting:
            self.run_one()


class UnreliableBackend(FakeBackend):
    """Answers so many items well, then meets its fault until that is taken back."""

    def __init__(self, machine: ThreadPoolTierMachine) -> None:
        super().__init__(max_bytes=10**9)
        self.machine = machine
        self.fault: str | None = None
        self.good = 0

    def usage(self, deadline: Deadline) -> Usage:
        """Fail, or say nothing."""
        self._enter(deadline)
        return Usage()

    def _enter(self, deadline: Deadline) -> None:
        left = deadline.remaining()
        if self.fault is None:
            return
        if self.good:
            self.good -= 1
            return
        if self.fault == "hangs":
            self.machine.fixture.now += left
        raise FAULTS[self.fault]()


class ThreadPoolTierMachine(RuleBasedStateMachine):
    """The model: a part is what `content` says, wherever it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[PrefetchJob, int]] = []
        self.leases: list[list[Chunk]] = []
        clock = SimpleNamespace(monotonic=self.clock, time=time.time)
        self.patches = [
            mock.patch.object(pooled, "ThreadPoolExecutor", ManualExecutor),
            mock.patch.object(pooled, "time", clock),
            mock.patch.object(contract, "time", clock),
        ]
        for patch in self.patches:
            patch.start()

    def clock(self) -> float:
        """Return the time that rules set."""
        return self.fixture.now

    @initialize(
        policy=st.sampled_from(get_args(WritePolicy)), threads=st.integers(1, 3)
    )
    def build(self, policy: str, threads: int) -> None:
        """A store that has not been asked for anything."""
        self.store = UnreliableBackend(self)
        self.tier = ThreadPoolTier(
            "t",
            "",
            self.store,
            timeout_s=TIMEOUT_S,
            retry_s=RETRY_S,
            threads=threads,
            clock=self.clock,
        )
        self.fixture = TierFixture(
            num_pages=22,
            policy=policy,
            max_bytes=LOADING_BYTES,
            write_bytes=WRITING_BYTES,
            max_jobs=3,
            over=[self.tier],
        )
        self.executors: list[ManualExecutor] = [
            self.tier._loads,  # type: ignore[list-item]
            self.tier._stores,  # type: ignore[list-item]
            self.tier._queries,  # type: ignore[list-item]
        ]

    # -- what clients do --------------------------------------------------------------

    @rule(number=numbers, length=lengths)
    def put(self, number: int, length: int) -> None:
        """A worker stores a prompt's chunks."""
        self.fixture.store(chain(number, length), PROMPTS[number])

    @rule(
        number=numbers,
        length=lengths,
        kept=st.sampled_from([True, True, False]),
        harm=st.sampled_from([None, *Damage]),
        place=st.integers(0, 5),
    )
    def look_up(
        self, number: int, length: int, kept: bool, harm: Damage | None, place: int
    ) -> None:
        """A scheduler looks up, and waits; another server may have stored it."""
        blobs = store_items(chain(number, length), PROMPTS[number]) if kept else []
        for index, blob in enumerate(blobs):
            record = b"".join([blob.header(), *blob.buffers])
            if harm and index == place % len(blobs):
                record = damaged(record, harm)
            self.store.records.setdefault(blob.key, record)
        job = self.fixture.submit(chain(number, length), PROMPTS[number])
        self.jobs.append((job, number))

    @precondition(lambda self: any(job.future.done() for job, _ in self.jobs))
    @rule(data=st.data())
    def answer_lookup(self, data: st.DataObject) -> None:
        """What is there is leased, then the job is settled."""
        done = [each for each in self.jobs if each[0].future.done()]
        job, number = data.draw(st.sampled_from(done))
        self.jobs.remove((job, number))
        needs = PROMPTS[number]
        chunks = self.fixture.l1.acquire_leading(job.keys, needs.full)
        hit = count_hits([chunk.ready for chunk in chunks], needs, CHUNK_SIZE)
        self.fixture.l1.release(chunks[hit:])
        self.leases.append(chunks[:hit])
        self.fixture.settle(job)

    @precondition(lambda self: self.leases)
    @rule()
    def end_lease(self) -> None:
        """The oldest lease ends."""
        self.fixture.l1.release(self.leases.pop(0))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A session ends."""
        job, number = data.draw(st.sampled_from(self.jobs))
        self.jobs.remove((job, number))
        self.fixture.manager.prefetcher.cancel(job)
        self.fixture.run()

    @rule(number=numbers, length=lengths)
    def drop(self, number: int, length: int) -> None:
        """A client clears chunks."""
        self.fixture.l1.drop(chain(number, length))

    # -- what the store does ----------------------------------------------------------

    @precondition(lambda self: any(executor.waiting for executor in self.executors))
    @rule(data=st.data(), count=st.integers(1, 9))
    def work(self, data: st.DataObject, count: int) -> None:
        """The tier's threads do some of what waits for them."""
        for _ in range(count):
            busy = [executor for executor in self.executors if executor.waiting]
            if busy:
                data.draw(st.sampled_from(busy)).run_one()
                self.fixture.run()

    @rule(fault=st.sampled_from(sorted(FAULTS)), good=st.integers(0, 3))
    def fail(self, fault: str, good: int) -> None:
        """From some item on it fails."""
        self.store.fault, self.store.good = fault, good

    @rule()
    def mend(self) -> None:
        """It answers again."""
        self.store.fault = None

    @rule(num_parts=st.integers(0, 9))
    def limit(self, num_parts: int) -> None:
        """It has room for so many parts, or gets some."""
        self.store.max_bytes = num_parts * 2 * PART_BYTES

    @precondition(lambda self: self.store.records)
    @rule(data=st.data(), how=st.sampled_from([None, *Damage]))
    def spoil(self, data: st.DataObject, how: Damage | None) -> None:
        """It loses a part, half of it, or has something else there."""
        key = data.draw(st.sampled_from(sorted(self.store.records)))
        record = self.store.records.pop(key)
        if how:
            self.store.records[key] = damaged(record, how)

    @precondition(lambda self: len(self.store.records) > 1)
    @rule(data=st.data())
    def mix_up(self, data: st.DataObject) -> None:
        """It gives one part's record for another."""
        keys: list[PartKey] = sorted(self.store.records)
        one, other = data.draw(st.permutations(keys))[:2]
        self.store.records[one] = self.store.records[other]

    @rule(seconds=st.sampled_from([RETRY_S, TIMEOUT_S, 11.0]))
    def wait(self, seconds: float) -> None:
        """Advance the clock."""
        self.fixture.now += seconds
        self.fixture.run()

    # -- what always holds ------------------------------------------------------------

    @invariant()
    def l1_is_consistent(self) -> None:
        """No overlap, no lost page, no double release; what is there is right."""
        self.fixture.l1.check()
        for number, needs in PROMPTS.items():
            for key in chain(number, 6):
                for chunk in self.fixture.l1.present([key], needs.full):
                    if not chunk.reserved:
                        self.fixture.num_present([key], needs)

    @invariant()
    def queues_are_bounded(self) -> None:
        """In bytes that wait to be written, and that are being loaded."""
        fixture = self.fixture
        [queue] = fixture.manager.write_back.status()
        assert 0 <= queue.num_bytes <= WRITING_BYTES
        assert queue.num_parts * PART_BYTES == queue.num_bytes
        assert 0 <= fixture.manager.prefetcher._num_bytes[0] <= LOADING_BYTES
        assert fixture.manager.prefetcher.num_jobs <= 3

    @invariant()
    def what_is_late_is_answered(self) -> None:
        """No job keeps its lookup waiting past the deadline."""
        self.fixture.run()
        for job, _ in self.jobs:
            assert job.future.done() or job.deadline > self.fixture.now

    @invariant()
    def it_is_up_or_says_why(self) -> None:
        """Before it has answered and after it failed there is a reason."""
        health = self.tier.health()
        assert health.up or health.last_error

    # -- the end ----------------------------------------------------------------------

    @rule()
    def settle(self) -> None:
        """All that is to be done now is done."""
        while any(executor.waiting for executor in self.executors):
            for executor in self.executors:
                executor.shutdown()
            self.fixture.run()

    def recovers(self) -> None:
        """A store that answers again is found, and served from, without being asked."""
        fixture = self.fixture
        self.store.fault, self.store.max_bytes = None, 10**9
        self.settle()
        fixture.now += 16 * RETRY_S
        fixture.run()
        self.settle()
        assert self.tier.health().up
        fixture.check_idle()
        fixture.l1.drop(fixture.l1.hashes())
        assert fixture.arena.used_bytes == 0
        prompt = chain(7, 2)
        stored = self.tier.store(store_items(prompt, ONE))
        self.settle()
        assert stored.result() == [StoreResult.DONE] * 2
        job = fixture.submit(prompt)
        self.settle()
        assert fixture.num_present(prompt) == 2
        fixture.settle(job)

    def teardown(self) -> None:
        """When all is settled nothing is held, and the tier is up once its store is."""
        try:
            if hasattr(self, "fixture"):
                for chunks in self.leases:
                    self.fixture.l1.release(chunks)
                for job, _ in self.jobs:
                    self.fixture.manager.prefetcher.cancel(job)
                self.fixture.run()
                self.recovers()
                self.fixture.check_idle()
        finally:
            if hasattr(self, "fixture"):
                self.fixture.manager.close()
                self.fixture.arena.close()
            for patch in self.patches:
                patch.stop()


TestThreadPoolTierMachine = ThreadPoolTierMachine.TestCase
TestThreadPoolTierMachine.__doc__ = """Under all faults: correct bytes or a miss."""
TestThreadPoolTierMachine.settings = settings(
    max_examples=4 * settings().max_examples, stateful_step_count=50
)
