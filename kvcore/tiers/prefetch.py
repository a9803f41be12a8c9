"""Prefetch: loads from tiers into L1 of the leading chunks that a lookup missed.

A job queries each tier once for the parts missing in L1, computes the longest hit, and
loads exactly its parts, in order, into reservations with the lookup's layout.
Everything here runs on the timer thread, except `submit`, `cancel`, `settle` and
`status`; bytes are transferred and checked on the tiers' threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from kvcore.config import PrefetchConfig
from kvcore.extents import buffers_of, checksum_of
from kvcore.keys import ChunkHash, SessionKey
from kvcore.shm import Bytes
from kvcore.status import PrefetchStatus
from kvcore.storage.l1 import L1, Chunk, PartId, Reservation
from kvcore.storage.required_parts import (
    RequiredPart,
    RequiredParts,
    count_hits,
    num_window_chunks,
)
from kvcore.tiers.tier import LoadItem, LoadOutcome, LoadResult, Tier, results_of
from kvcore.tiers.timer_thread import Timer, TimerThread
from kvcore.tiers.write_back import WriteBack

BATCH_BYTES = 16 << 20
"""Bytes per call of a tier: enough for its threads, and jobs still alternate."""


@dataclass(slots=True)
class PrefetchCounters:
    """Totals since the start."""

    prefetches: int = 0
    prefetches_refused: int = 0
    prefetches_cancelled: int = 0
    prefetches_late: int = 0
    """Answered at their deadline, with what was loaded by then."""
    parts_prefetched: int = 0
    bytes_prefetched: int = 0
    loads_shared: int = 0
    """Parts that another job was already loading."""
    loads_failed: int = 0
    loads_without_room: int = 0
    checksum_mismatches: int = 0


class JobState(Enum):
    """Progress of a job."""

    WAITING = "waiting"
    ASKING = "asking"
    LOADING = "loading"
    DONE = "done"
    REFUSED = "refused"
    """Too many jobs were in progress."""
    CANCELLED = "cancelled"


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
    reservation: Reservation
    item: LoadItem
    is_good: bool = False
    waiting: list[PrefetchJob] = field(default_factory=list)

    @property
    def key(self) -> tuple[ChunkHash, PartId]:
        """The chunk and its part."""
        return self.item.key.chunk, self.part.need.part


@dataclass(slots=True, eq=False)
class LoadBatch:
    """Loads of one call of a tier, and their faults: missing parts are none."""

    tier: int
    loads: list[TierLoad]
    num_bytes: int
    done: bool = False
    num_failed: int = 0
    wrong: list[TierLoad] = field(default_factory=list)
    """With other bytes than were stored."""

    def check(self, outcomes: Sequence[LoadResult]) -> None:
        """Mark the loads with correct bytes; note the faults."""
        self.num_failed = len(self.loads) - len(outcomes)
        for load, loaded in zip(self.loads, outcomes, strict=False):
            if loaded.outcome is LoadOutcome.DONE:
                load.is_good = checksum_of(load.item.buffers) == loaded.checksum
                load.reservation.checksum = loaded.checksum
                if not load.is_good:
                    self.wrong.append(load)
            elif loaded.outcome is LoadOutcome.FAILED:
                self.num_failed += 1


@dataclass(slots=True, eq=False)
class PrefetchJob:
    """One lookup's loads of the chunks missing in L1.

    `future` is done when all available parts are in L1, at the latest at the
    deadline. What was loaded by then is held until `settle`.
    """

    prefetcher: Prefetcher
    owner: SessionKey
    keys: Sequence[ChunkHash]
    needs: RequiredParts
    chunk_size: int
    deadline: float
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
    held: list[Chunk] = field(default_factory=list)
    settled: bool = False
    timer: Timer | None = None

    def settle(self) -> None:
        """Release the chunks held for this job; once, after the future."""
        self.prefetcher.settle(self)

    def cancel(self) -> None:
        """Start no more loads, release the holds; the future is done soon."""
        self.prefetcher.cancel(self)

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

    def is_useful(self, part: MissingPart) -> bool:
        """Return whether the longest hit needs a part that was found."""
        first = 0
        if part.need.window is not None:
            first = self.goal - num_window_chunks(part.need.window, self.chunk_size)
        return first <= part.index < self.goal

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


class Prefetcher:
    """All prefetch jobs. Loads in progress are bounded in bytes per tier."""

    def __init__(
        self,
        l1: L1,
        arena: Bytes,
        tiers: Sequence[Tier],
        write_back: WriteBack,
        timer_thread: TimerThread,
        config: PrefetchConfig,
    ) -> None:
        self.counters = PrefetchCounters()
        self._l1 = l1
        self._memory = arena.data
        self._tiers = tiers
        self._write_back = write_back
        self._timer_thread = timer_thread
        self._config = config
        self._jobs: dict[PrefetchJob, None] = {}
        """Jobs in progress, oldest first."""
        self._ready: dict[PrefetchJob, None] = {}
        """Jobs to advance, in order."""
        self._loads: dict[tuple[ChunkHash, PartId], TierLoad] = {}
        self._num_bytes = [0] * len(tiers)

    # -- any thread -------------------------------------------------------------------

    def submit(self, job: PrefetchJob) -> None:
        """Start a job; its future is done when the lookup can be answered."""
        self._timer_thread.post(partial(self._begin, job))

    def cancel(self, job: PrefetchJob) -> None:
        """Start no more loads, release the job's holds, and complete its future."""
        self._timer_thread.post(partial(self._cancel, job))

    def settle(self, job: PrefetchJob) -> None:
        """End the job's holds: what it loaded is leased, or no client needs it."""
        self._timer_thread.post(partial(self._settle, job))

    def status(self, limit: int) -> tuple[PrefetchStatus, ...]:
        """Describe the `limit` oldest jobs."""
        now = self._timer_thread.clock()
        return tuple(job.status(now) for job in list(self._jobs)[:limit])

    @property
    def num_jobs(self) -> int:
        """Jobs in progress."""
        return len(self._jobs)

    # -- queries -----------------------------------------------------------------------

    def _begin(self, job: PrefetchJob) -> None:
        self.counters.prefetches += 1
        job.begun = self._timer_thread.clock()
        if len(self._jobs) >= self._config.max_jobs:
            self.counters.prefetches_refused += 1
            self._end(job, JobState.REFUSED)
            return
        self._jobs[job] = None
        job.timer = self._timer_thread.at(job.deadline, partial(self._due, job))
        job.state = JobState.ASKING
        found = self._l1.hold(job.keys)
        job.masks = [chunk.ready if chunk else 0 for chunk in found]
        job.held = [chunk for chunk in found if chunk]
        self._ask(job, 0)

    def _ask(self, job: PrefetchJob, tier: int) -> None:
        """Query the next tier for missing parts; after the last one, load."""
        missing = job.missing_parts(tier)
        if not missing or tier == len(self._tiers):
            job.found.sort(key=lambda part: part.index)
            job.state = JobState.LOADING
            self._plan(job)
            self._pump()
            return
        keys = [part.need.name.key(job.keys[part.index]) for part in missing]

        def answered(future: Future[list[bool]]) -> None:
            present = results_of(future)
            self._timer_thread.post(partial(self._asked, job, tier, missing, present))

        self._tiers[tier].contains(keys).add_done_callback(answered)

    def _asked(
        self,
        job: PrefetchJob,
        tier: int,
        missing: list[MissingPart],
        present: list[bool],
    ) -> None:
        if job.is_over:
            return
        if not any(present) and not self._tiers[tier].health().up:
            job.tier_failed = True
        for part, has in zip(missing, present, strict=False):
            if has:
                job.masks[part.index] |= 1 << part.need.part
                job.found.append(part)
        self._ask(job, tier + 1)

    def _plan(self, job: PrefetchJob) -> None:
        """Select the parts of the longest hit; release the holds beyond it.

        After a fault the hit is shorter, and its windows are elsewhere.
        """
        job.faulted = False
        job.goal = count_hits(job.masks, job.needs, job.chunk_size)
        beyond = set(job.keys[job.goal :])
        self._l1.release([chunk for chunk in job.held if chunk.hash in beyond])
        job.held = [chunk for chunk in job.held if chunk.hash not in beyond]
        job.to_load.extend(filter(job.is_useful, job.found))
        self._ready[job] = None

    # -- loading ----------------------------------------------------------------------

    def _pump(self) -> None:
        """Start a batch of each job in rotation, while its tier's bound allows."""
        stuck: list[PrefetchJob] = []
        while self._ready:
            job = next(iter(self._ready))
            del self._ready[job]
            if not job.to_load:
                self._check_done(job)
            elif self._start_batch(job):
                self._ready[job] = None
            else:
                stuck.append(job)
        self._ready.update(dict.fromkeys(stuck))

    def _start_batch(self, job: PrefetchJob) -> bool:
        """Load the job's next parts; return False if the tier's bound is reached."""
        tier = job.to_load[0].tier
        parts = self._take_batch(job, tier)
        if not parts:
            return False
        loads = self._reserve(job, parts)
        if not loads:
            return True
        batch = LoadBatch(tier, loads, sum(load.part.need.num_bytes for load in loads))
        self._num_bytes[tier] += batch.num_bytes
        job.batches.append(batch)

        def loaded(future: Future[list[LoadResult]]) -> None:
            # On the tier's thread: checksums would occupy the timer thread.
            batch.check(results_of(future))
            self._timer_thread.post(partial(self._loaded, job, batch))

        future = self._tiers[tier].load([load.item for load in loads])
        future.add_done_callback(loaded)
        return True

    def _take_batch(self, job: PrefetchJob, tier: int) -> list[MissingPart]:
        """Remove and return parts of one tier, at least one if it is idle."""
        taken: list[MissingPart] = []
        loading = self._num_bytes[tier]
        room = min(self._config.max_bytes - loading, BATCH_BYTES)
        while job.to_load and job.to_load[0].tier == tier:
            room -= job.to_load[0].need.num_bytes
            if room < 0 and (loading or taken):
                break
            taken.append(job.to_load.popleft())
        return taken

    def _reserve(
        self, job: PrefetchJob, parts: Sequence[MissingPart]
    ) -> list[TierLoad]:
        """Reserve space for parts that no job loads; join the loads of other jobs."""
        mine = [part for part in parts if not self._share(job, part)]
        loads: list[TierLoad] = []
        for need in {part.need.part: part.need for part in mine}.values():
            same = [part for part in mine if part.need is need]
            loads += self._reserve_part(job, need, same)
        loads.sort(key=lambda load: load.part.index)
        return loads

    def _share(self, job: PrefetchJob, part: MissingPart) -> bool:
        load = self._loads.get((job.keys[part.index], part.need.part))
        if load is None:
            return False
        load.waiting.append(job)
        job.num_shared += 1
        self.counters.loads_shared += 1
        return True

    def _reserve_part(
        self, job: PrefetchJob, need: RequiredPart, parts: Sequence[MissingPart]
    ) -> list[TierLoad]:
        hashes = [job.keys[part.index] for part in parts]
        if not job.settled:
            # Parts that other jobs loaded since the query must stay, too.
            job.held += filter(None, self._l1.hold(hashes))
        got = self._l1.reserve(
            hashes, need.part, need.num_bytes, name=need.name, owner=job.owner
        )
        if got.num_dropped:
            self.counters.loads_without_room += got.num_dropped
            for part, chunk in zip(parts, self._l1.peek(hashes), strict=True):
                if not chunk or not (chunk.ready | chunk.reserved) >> need.part & 1:
                    job.fault(part.index, need.part)
        loads = []
        for reservation in got.reservations:
            key = need.name.key(hashes[reservation.index])
            item = LoadItem(key, buffers_of(self._memory, reservation.extents))
            load = TierLoad(parts[reservation.index], reservation, item)
            self._loads[load.key] = load
            loads.append(load)
        return loads

    def _loaded(self, job: PrefetchJob, batch: LoadBatch) -> None:
        self._num_bytes[batch.tier] -= batch.num_bytes
        batch.done = True
        self.counters.loads_failed += batch.num_failed
        self.counters.checksum_mismatches += len(batch.wrong)
        job.tier_failed |= batch.num_failed > 0
        if batch.wrong:
            self._tiers[batch.tier].delete([load.item.key for load in batch.wrong])
        while job.batches and job.batches[0].done:
            self._commit(job, job.batches.popleft())
        self._ready[job] = None
        self._pump()

    def _commit(self, job: PrefetchJob, batch: LoadBatch) -> None:
        """Commit a batch up to its first fault; the rest is not part of a hit."""
        for load in batch.loads:
            if not load.is_good:
                job.fault(load.part.index, load.part.need.part)
        for load in batch.loads:
            load.is_good = load.part.index < job.goal
        good = [load.reservation for load in batch.loads if load.is_good]
        self._l1.commit(good, hold=True)
        self._l1.abort([load.reservation for load in batch.loads if not load.is_good])
        for load in batch.loads:
            del self._loads[load.key]
            if load.is_good:
                self._count(job, load)
            self._release_waiting(load)
        chunks = [reservation.chunk for reservation in good]
        if job.settled:
            self._l1.release(chunks)
        else:
            job.held += chunks

    def _count(self, job: PrefetchJob, load: TierLoad) -> None:
        """Count a loaded part, and queue it for faster tiers."""
        job.num_loaded += 1
        job.num_bytes += load.part.need.num_bytes
        self.counters.parts_prefetched += 1
        self.counters.bytes_prefetched += load.part.need.num_bytes
        chunk, bit = load.reservation.chunk, 1 << load.part.need.part
        self._l1.mark_saved(chunk, bit)
        if load.part.tier:
            self._write_back.promote(chunk, bit, load.part.tier)

    def _release_waiting(self, load: TierLoad) -> None:
        chunk, part = load.key
        for other in load.waiting:
            other.num_shared -= 1
            if not load.is_good:
                other.fault(other.keys.index(chunk), part)
            elif not other.settled:
                other.held += filter(None, self._l1.hold([chunk]))
                other.num_loaded += 1
            self._ready[other] = None

    # -- ending -----------------------------------------------------------------------

    def _check_done(self, job: PrefetchJob) -> None:
        if job.is_over or job.batches or job.num_shared:
            return
        if job.faulted and job.needs.windows and not job.future.done():
            self._plan(job)
        else:
            self._end(job, JobState.DONE)

    def _due(self, job: PrefetchJob) -> None:
        if not job.future.done():
            self.counters.prefetches_late += 1
            job.future.set_result(None)

    def _cancel(self, job: PrefetchJob) -> None:
        if not job.is_over:
            self.counters.prefetches_cancelled += 1
            self._end(job, JobState.CANCELLED)
        self._settle(job)

    def _end(self, job: PrefetchJob, state: JobState) -> None:
        job.state = state
        job.to_load.clear()
        self._jobs.pop(job, None)
        if job.timer is not None:
            job.timer.cancel()
        if not job.future.done():
            job.future.set_result(None)

    def _settle(self, job: PrefetchJob) -> None:
        job.settled = True
        self._l1.release(job.held)
        job.held = []

    def close(self) -> None:
        """Cancel every job; loads in progress end with their tiers."""
        for job in list(self._jobs):
            self._cancel(job)
