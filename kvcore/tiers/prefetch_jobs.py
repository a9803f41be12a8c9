"""What prefetch is about: jobs, the parts they wish for, and the loads they share."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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
    """How far a job is."""

    WAITING = "waiting"
    ASKING = "asking"
    LOADING = "loading"
    DONE = "done"
    REFUSED = "refused"
    """Too many jobs were under way."""
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class PrefetchJob:
    """One lookup's wish for the chunks that L1 lacks.

    `future` is done when everything that can be had is in L1, and at the deadline at
    the latest. What was loaded by then is held until `Prefetcher.settle`.
    """

    owner: SessionKey
    keys: Sequence[ChunkHash]
    needs: RequiredParts
    chunk_size: int
    deadline: float
    waited: bool = True
    """Somebody waits for the future, and settles it; else it ends on its own."""
    future: Future[None] = field(default_factory=Future)
    state: JobState = JobState.WAITING
    begun: float = 0.0
    goal: int = 0
    """Leading chunks of `keys` that L1 and the tiers have, as far as is known."""
    tier_failed: bool = False
    num_loaded: int = 0
    num_bytes: int = 0
    # The coordinator's own:
    masks: list[int] = field(default_factory=list)
    """Parts of each chunk that are there or can be loaded."""
    found: list[WantedPart] = field(default_factory=list)
    """What tiers have of what L1 lacks."""
    faulted: bool = False
    """Something of it could not be loaded since it was planned."""
    wishes: deque[WantedPart] = field(default_factory=deque)
    batches: deque[LoadBatch] = field(default_factory=deque)
    num_shared: int = 0
    """Loads of other jobs that this one waits for."""
    held: list[Chunk | None] = field(default_factory=list)
    settled: bool = False
    timer: Timer | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is to be begun any more."""
        return self.state in (JobState.DONE, JobState.REFUSED, JobState.CANCELLED)

    @property
    def outcome(self) -> str:
        """Why a job that was waited for loaded no more."""
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

    def lacking(self, tier: int) -> list[WantedPart]:
        """Return what is not known to be anywhere, as wishes of a tier."""
        return [
            WantedPart(index, need, tier)
            for index, mask in enumerate(self.masks)
            for need in self.needs.parts
            if not mask >> need.part & 1
        ]

    def useful(self) -> list[WantedPart]:
        """Return what the longest hit needs of what was found, in its order."""
        return [wish for wish in self.found if self._is_read(wish)]

    def _is_read(self, wish: WantedPart) -> bool:
        if wish.need.window is None:
            return wish.index < self.goal
        first = self.goal - num_window_chunks(wish.need.window, self.chunk_size)
        return first <= wish.index < self.goal

    def aim(self) -> None:
        """Set the goal by what is there or can be loaded."""
        self.goal = count_hits(self.masks, self.needs, self.chunk_size)

    def fault(self, index: int, part: PartId) -> None:
        """Note that a part will not come: what follows it is no use."""
        self.masks[index] &= ~(1 << part)
        self.goal = min(self.goal, index)
        self.faulted = True
        self.wishes.clear()

    def status(self, now: float) -> PrefetchStatus:
        """Describe it."""
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
class WantedPart:
    """One part of the job's chunk `index`, which a tier has."""

    index: int
    need: RequiredPart
    tier: int


@dataclass(slots=True, eq=False)
class TierLoad:
    """One part on its way into L1, and the other jobs that wait for it."""

    wish: WantedPart
    key: ChunkHash
    reservation: Reservation
    slot: LoadItem
    is_good: bool = False
    waiting: list[PrefetchJob] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class LoadBatch:
    """Loads asked of one tier in one go."""

    tier: int
    loads: list[TierLoad]
    num_bytes: int
    done: bool = False

    def check(self, outcomes: Sequence[LoadResult]) -> LoadFaults:
        """Mark the loads whose bytes are there and right; return what went wrong."""
        wrong = []
        num_failed = len(self.loads) - len(outcomes)
        for load, loaded in zip(self.loads, outcomes, strict=False):
            if loaded.outcome is LoadOutcome.DONE:
                load.is_good = checksum_of(load.slot.buffers) == loaded.checksum
                load.reservation.checksum = loaded.checksum
                if not load.is_good:
                    wrong.append(load)
            elif loaded.outcome is LoadOutcome.FAILED:
                num_failed += 1
        return LoadFaults(wrong, num_failed)


@dataclass(frozen=True, slots=True)
class LoadFaults:
    """What a batch's loads did not bring, but for what was missing."""

    wrong: list[TierLoad]
    num_failed: int
