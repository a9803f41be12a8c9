"""Prefetch jobs, their missing parts, and the loads that they share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

from kvcore.extents import checksum_of
from kvcore.keys import ChunkHash, SessionKey
from kvcore.status import PrefetchStatus
from kvcore.storage.l1 import Chunk, PartId, Reservation
from kvcore.storage.required_parts import (
    RequiredPart,
    RequiredParts,
    count_hits,
    num_window_chunks,
)
from kvcore.tiers.tier import LoadItem, LoadOutcome, LoadResult
from kvcore.tiers.timer_thread import Timer


class JobState(Enum):
    """Progress of a job."""

    WAITING = "waiting"
    ASKING = "asking"
    LOADING = "loading"
    DONE = "done"
    REFUSED = "refused"
    """Too many jobs were in progress."""
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class PrefetchJob:
    """One lookup's loads of the chunks missing in L1.

    `future` is done when all available parts are in L1, at the latest at the
    deadline. What was loaded by then is held until `settle`.
    """

    owner: SessionKey
    keys: Sequence[ChunkHash]
    needs: RequiredParts
    chunk_size: int
    deadline: float
    on_settle: Callable[[PrefetchJob], None]
    on_cancel: Callable[[PrefetchJob], None]
    future: Future[None] = field(default_factory=Future)
    state: JobState = JobState.WAITING
    begun: float = 0.0
    goal: int = 0
    """Leading chunks of `keys` in L1 and the tiers, as far as is known."""
    tier_failed: bool = False
    num_loaded: int = 0
    num_bytes: int = 0
    # Of the timer thread only:
    masks: list[int] = field(default_factory=list)
    """Parts of each chunk that are in L1 or in a tier."""
    found: list[MissingPart] = field(default_factory=list)
    """Missing parts that a tier has."""
    faulted: bool = False
    """A part could not be loaded since the last plan."""
    to_load: deque[MissingPart] = field(default_factory=deque)
    batches: deque[LoadBatch] = field(default_factory=deque)
    num_shared: int = 0
    """Loads of other jobs that this one waits for."""
    held: list[Chunk | None] = field(default_factory=list)
    settled: bool = False
    timer: Timer | None = None

    def settle(self) -> None:
        """Release the chunks held for this job; once, after the future."""
        self.on_settle(self)

    def cancel(self) -> None:
        """Start no more loads; the future is done soon."""
        self.on_cancel(self)

    @property
    def is_over(self) -> bool:
        """Whether the job starts no more loads."""
        return self.state in (JobState.DONE, JobState.REFUSED, JobState.CANCELLED)

    @property
    def outcome(self) -> str:
        """Why no more was loaded."""
        if self.tier_failed:
            return "failed"
        if self.state is JobState.REFUSED:
            return "refused"
        return "missing" if self.is_over else "late"

    @property
    def missing(self) -> Sequence[ChunkHash]:
        """The first chunk that every tier said it lacks, if any."""
        if self.state is not JobState.DONE or self.tier_failed:
            return ()
        return self.keys[self.goal : self.goal + 1]

    def missing_parts(self, tier: int) -> list[MissingPart]:
        """Return the parts not found so far, to be queried from a tier."""
        return [
            MissingPart(index, need, tier)
            for index, mask in enumerate(self.masks)
            for need in self.needs.parts
            if not mask >> need.part & 1
        ]

    def useful(self) -> list[MissingPart]:
        """Return the found parts that the longest hit needs, in order."""
        return [part for part in self.found if self._is_read(part)]

    def _is_read(self, part: MissingPart) -> bool:
        if part.need.window is None:
            return part.index < self.goal
        first = self.goal - num_window_chunks(part.need.window, self.chunk_size)
        return first <= part.index < self.goal

    def aim(self) -> None:
        """Set the goal from the parts in L1 and in the tiers."""
        self.goal = count_hits(self.masks, self.needs, self.chunk_size)

    def fault(self, index: int, part: PartId) -> None:
        """Record that a part cannot be loaded, which ends the hit before it."""
        self.masks[index] &= ~(1 << part)
        self.goal = min(self.goal, index)
        self.faulted = True
        self.to_load.clear()

    def status(self, now: float) -> PrefetchStatus:
        """Return its description."""
        return PrefetchStatus(
            engine_id=self.owner.engine_id,
            request_id=self.owner.request_id,
            state=self.state.value,
            num_chunks=len(self.keys),
            num_found=self.goal,
            num_loaded=self.num_loaded,
            num_bytes=self.num_bytes,
            age_s=now - self.begun,
            due_in_s=self.deadline - now,
        )


@dataclass(frozen=True, slots=True)
class MissingPart:
    """One part of the job's chunk `index`, missing in L1, of `tier`."""

    index: int
    need: RequiredPart
    tier: int


@dataclass(slots=True, eq=False)
class TierLoad:
    """One part being loaded, and the other jobs that wait for it."""

    part: MissingPart
    key: ChunkHash
    reservation: Reservation
    item: LoadItem
    is_good: bool = False
    waiting: list[PrefetchJob] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class LoadBatch:
    """Loads of one call of a tier."""

    tier: int
    loads: list[TierLoad]
    num_bytes: int
    done: bool = False

    def check(self, outcomes: Sequence[LoadResult]) -> LoadFaults:
        """Mark the loads with correct bytes; return the faults."""
        wrong = []
        num_failed = len(self.loads) - len(outcomes)
        for load, loaded in zip(self.loads, outcomes, strict=False):
            if loaded.outcome is LoadOutcome.DONE:
                load.is_good = checksum_of(load.item.buffers) == loaded.checksum
                load.reservation.checksum = loaded.checksum
                if not load.is_good:
                    wrong.append(load)
            elif loaded.outcome is LoadOutcome.FAILED:
                num_failed += 1
        return LoadFaults(wrong, num_failed)


@dataclass(frozen=True, slots=True)
class LoadFaults:
    """Failed and corrupt loads of a batch; missing ones are not faults."""

    wrong: list[TierLoad]
    num_failed: int
