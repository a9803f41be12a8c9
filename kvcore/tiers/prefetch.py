"""Prefetch: loads from tiers into L1 of the leading chunks that a lookup missed.

A job queries each tier once for the parts missing in L1, computes the longest hit, and
loads exactly its parts, in order, into reservations with the lookup's layout.
Everything here runs on the timer thread, except `submit`, `cancel`, `settle` and
`status`; bytes are transferred and checked on the tiers' threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial

from kvcore.extents import buffers_of
from kvcore.keys import ChunkHash
from kvcore.shm import Bytes
from kvcore.status import PrefetchStatus
from kvcore.storage.l1 import L1, PartId
from kvcore.storage.required_parts import RequiredPart
from kvcore.tiers.prefetch_jobs import (
    JobState,
    LoadBatch,
    LoadFaults,
    MissingPart,
    PrefetchJob,
    TierLoad,
)
from kvcore.tiers.tier import LoadItem, LoadResult, Tier
from kvcore.tiers.timer_thread import TimerThread
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

    def as_dict(self) -> dict[str, int]:
        """Return all of them by name."""
        return asdict(self)


class Prefetcher:
    """All prefetch jobs. Loads in progress are bounded in bytes per tier."""

    def __init__(
        self,
        l1: L1,
        arena: Bytes,
        tiers: Sequence[Tier],
        write_back: WriteBack,
        timer_thread: TimerThread,
        *,
        max_jobs: int,
        max_bytes: int,
    ) -> None:
        self.counters = PrefetchCounters()
        self._l1 = l1
        self._memory = arena.data
        self._tiers = tiers
        self._write_back = write_back
        self._timer_thread = timer_thread
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._jobs: dict[int, PrefetchJob] = {}
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
        """End the job's holds: what it loaded is leased, or nobody wants it."""
        self._timer_thread.post(partial(self._settle, job))

    def status(self, limit: int) -> list[PrefetchStatus]:
        """Describe the `limit` oldest jobs."""
        now = self._timer_thread.clock()
        jobs = list(self._jobs.values())[:limit]
        return [job.status(now) for job in jobs]

    @property
    def num_jobs(self) -> int:
        """Jobs in progress."""
        return len(self._jobs)

    # -- queries -----------------------------------------------------------------------

    def _begin(self, job: PrefetchJob) -> None:
        self.counters.prefetches += 1
        job.begun = self._timer_thread.clock()
        if len(self._jobs) >= self._max_jobs:
            self.counters.prefetches_refused += 1
            self._end(job, JobState.REFUSED)
            return
        self._jobs[id(job)] = job
        job.timer = self._timer_thread.at(job.deadline, partial(self._due, job))
        job.state = JobState.ASKING
        job.held = self._l1.hold(job.keys)
        job.masks = [chunk.ready if chunk else 0 for chunk in job.held]
        self._ask(job, 0, [])

    def _ask(self, job: PrefetchJob, tier: int, found: list[MissingPart]) -> None:
        """Query the next tier for missing parts; after the last one, plan."""
        missing = job.missing_parts(tier)
        if not missing or tier == len(self._tiers):
            self._plan(job, found)
            return
        keys = [part.need.name.key(job.keys[part.index]) for part in missing]
        future = self._tiers[tier].contains(keys)

        def answered(future: Future[list[bool]]) -> None:
            present = [] if future.exception() else future.result()
            self._timer_thread.post(
                partial(self._asked, job, tier, found, missing, present)
            )

        future.add_done_callback(answered)

    def _asked(
        self,
        job: PrefetchJob,
        tier: int,
        found: list[MissingPart],
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
                found.append(part)
        self._ask(job, tier + 1, found)

    def _plan(self, job: PrefetchJob, found: list[MissingPart]) -> None:
        """Select the parts of the longest hit from those found, in order."""
        found.sort(key=lambda part: part.index)
        job.found = found
        job.aim()
        self._l1.release(job.held[job.goal :])
        del job.held[job.goal :]
        job.to_load.extend(job.useful())
        job.state = JobState.LOADING
        self._ready[job] = None
        self._pump()

    def _plan_again(self, job: PrefetchJob) -> None:
        """Plan the shorter hit after a fault, whose window is elsewhere.

        Its full-attention parts are already loaded. Holds beyond the hit are released.
        """
        job.faulted = False
        job.aim()
        beyond = set(job.keys[job.goal :])
        held, job.held = job.held, []
        for chunk in held:
            if chunk and chunk.hash in beyond:
                self._l1.release([chunk])
            else:
                job.held.append(chunk)
        job.to_load.extend(
            part
            for part in job.useful()
            if part.need.window is not None
            and job.masks[part.index] >> part.need.part & 1
        )
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
        room = self._max_bytes - self._num_bytes[tier]
        parts_to_load = self._take_batch(job, tier, min(room, BATCH_BYTES))
        if not parts_to_load:
            return False
        loads = self._reserve(job, parts_to_load)
        if not loads:
            return True
        num_bytes = sum(load.part.need.num_bytes for load in loads)
        batch = LoadBatch(tier, loads, num_bytes)
        self._num_bytes[tier] += num_bytes
        job.batches.append(batch)
        future = self._tiers[tier].load([load.item for load in loads])

        def loaded(future: Future[list[LoadResult]]) -> None:
            # On the tier's thread: checksums would occupy the timer thread.
            outcomes = [] if future.exception() else future.result()
            faults = batch.check(outcomes)
            self._timer_thread.post(partial(self._loaded, job, batch, faults))

        future.add_done_callback(loaded)
        return True

    def _take_batch(self, job: PrefetchJob, tier: int, room: int) -> list[MissingPart]:
        """Remove and return parts of one tier, at least one if it is idle."""
        taken: list[MissingPart] = []
        idle = not self._num_bytes[tier]
        while job.to_load and job.to_load[0].tier == tier:
            first = job.to_load[0]
            room -= first.need.num_bytes
            if room < 0 and not (idle and not taken):
                break
            taken.append(job.to_load.popleft())
        return taken

    def _reserve(
        self, job: PrefetchJob, parts_to_load: Sequence[MissingPart]
    ) -> list[TierLoad]:
        """Reserve space for parts that no job loads; join the loads of other jobs."""
        loads: list[TierLoad] = []
        for need in {part.need.part: part.need for part in parts_to_load}.values():
            mine = [part for part in parts_to_load if part.need is need]
            mine = [part for part in mine if not self._share(job, part)]
            if mine:
                loads += self._reserve_part(job, need, mine)
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
        self, job: PrefetchJob, need: RequiredPart, parts_to_load: Sequence[MissingPart]
    ) -> list[TierLoad]:
        hashes = [job.keys[part.index] for part in parts_to_load]
        if not job.settled:
            # Parts that other jobs loaded since the query must stay, too.
            job.held += filter(None, self._l1.hold(hashes))
        got = self._l1.reserve(
            hashes, need.part, need.num_bytes, name=need.name, owner=job.owner
        )
        if got.num_dropped:
            self.counters.loads_without_room += got.num_dropped
            for part, chunk in zip(parts_to_load, self._l1.peek(hashes), strict=True):
                if not chunk or not (chunk.ready | chunk.reserved) >> need.part & 1:
                    job.fault(part.index, need.part)
        loads = []
        for reservation in got.reservations:
            part = parts_to_load[reservation.index]
            key = hashes[reservation.index]
            buffers = buffers_of(self._memory, reservation.extents)
            item = LoadItem(need.name.key(key), buffers)
            load = TierLoad(part, key, reservation, item)
            self._loads[key, need.part] = load
            loads.append(load)
        return loads

    def _loaded(self, job: PrefetchJob, batch: LoadBatch, faults: LoadFaults) -> None:
        self._num_bytes[batch.tier] -= batch.num_bytes
        batch.done = True
        self.counters.loads_failed += faults.num_failed
        self.counters.checksum_mismatches += len(faults.wrong)
        job.tier_failed |= faults.num_failed > 0
        if faults.wrong:
            self._tiers[batch.tier].delete([load.item.key for load in faults.wrong])
        while job.batches and job.batches[0].done:
            self._commit(job, job.batches.popleft())
        self._ready[job] = None
        self._pump()

    def _commit(self, job: PrefetchJob, batch: LoadBatch) -> None:
        """Commit a batch up to its first fault; the rest is not part of a hit."""
        for load in batch.loads:
            if not load.is_good:
                job.fault(load.part.index, load.part.need.part)
        good = [load for load in batch.loads if load.part.index < job.goal]
        bad = batch.loads[len(good) :]
        for load in bad:
            load.is_good = False
        self._l1.commit([load.reservation for load in good], hold=True)
        self._l1.abort([load.reservation for load in bad])
        chunks = [load.reservation.chunk for load in good]
        for load in batch.loads:
            del self._loads[load.key, load.part.need.part]
        for load in good:
            self._keep(job, load, batch.tier)
        for load in bad:
            self._release_waiting(load)
        if job.settled or job.is_over:
            self._l1.release(chunks)
        else:
            job.held += chunks

    def _keep(self, job: PrefetchJob, load: TierLoad, tier: int) -> None:
        """Count a loaded part; queue it for faster tiers; advance waiting jobs."""
        job.num_loaded += 1
        job.num_bytes += load.part.need.num_bytes
        self.counters.parts_prefetched += 1
        self.counters.bytes_prefetched += load.part.need.num_bytes
        chunk, bit = load.reservation.chunk, 1 << load.part.need.part
        self._l1.mark_saved(chunk, bit)
        if tier:
            self._write_back.promote(chunk, bit, tier)
        self._release_waiting(load)

    def _release_waiting(self, load: TierLoad) -> None:
        for other in load.waiting:
            other.num_shared -= 1
            if not load.is_good:
                index = other.keys.index(load.key)
                other.fault(index, load.part.need.part)
            elif not (other.settled or other.is_over):
                other.held += self._l1.hold([load.key])
                other.num_loaded += 1
            self._ready[other] = None

    # -- ending -----------------------------------------------------------------------

    def _check_done(self, job: PrefetchJob) -> None:
        if job.is_over or job.to_load or job.batches or job.num_shared:
            return
        if job.faulted and job.needs.windows and not job.future.done():
            self._plan_again(job)
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
        self._jobs.pop(id(job), None)
        if job.timer is not None:
            job.timer.cancel()
        if not job.future.done():
            job.future.set_result(None)

    def _settle(self, job: PrefetchJob) -> None:
        job.settled = True
        held, job.held = job.held, []
        self._l1.release(held)

    def close(self) -> None:
        """Cancel every job; loads in progress end with their tiers."""
        for job in list(self._jobs.values()):
            self._cancel(job)
