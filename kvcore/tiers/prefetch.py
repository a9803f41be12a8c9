"""Prefetch: from tiers into L1, the leading chunks that a lookup missed.

A job asks each tier once for what L1 lacks, decides how many leading chunks that
makes a hit, and loads exactly what those need, in order, into parts reserved with the
lookup's layout. Everything here runs on the coordinator's thread, but for `submit`,
`cancel`, `settle` and `status`; bytes are moved and checked by the tiers' threads.
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
    PrefetchJob,
    TierLoad,
    WantedPart,
)
from kvcore.tiers.tier import LoadItem, LoadResult, Tier
from kvcore.tiers.timer_thread import TimerThread
from kvcore.tiers.write_back import WriteBack

BATCH_BYTES = 16 << 20
"""Asked of a tier in one go: enough for its threads, little enough to come in turn."""


@dataclass(slots=True)
class PrefetchCounters:
    """Each only grows."""

    prefetches: int = 0
    prefetches_refused: int = 0
    prefetches_cancelled: int = 0
    prefetches_late: int = 0
    """Answered at their deadline, with what was loaded by then."""
    parts_prefetched: int = 0
    bytes_prefetched: int = 0
    loads_shared: int = 0
    """Parts that another job was loading already."""
    loads_failed: int = 0
    loads_without_room: int = 0
    checksum_mismatches: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return all of them by name."""
        return asdict(self)


class Prefetcher:
    """All prefetch jobs. Loads in flight are bounded in bytes a tier."""

    def __init__(
        self,
        l1: L1,
        arena: Bytes,
        tiers: Sequence[Tier],
        write_back: WriteBack,
        coordinator: TimerThread,
        *,
        max_jobs: int,
        max_bytes: int,
    ) -> None:
        self.counters = PrefetchCounters()
        self._l1 = l1
        self._memory = arena.data
        self._tiers = tiers
        self._write_back = write_back
        self._coordinator = coordinator
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._jobs: dict[int, PrefetchJob] = {}
        self._ready: dict[PrefetchJob, None] = {}
        """Jobs to look after, in turn."""
        self._loads: dict[tuple[ChunkHash, PartId], TierLoad] = {}
        self._num_bytes = [0] * len(tiers)

    # -- any thread -------------------------------------------------------------------

    def submit(self, job: PrefetchJob) -> None:
        """Begin a job; its future is done when the lookup can be answered."""
        self._coordinator.post(partial(self._begin, job))

    def cancel(self, job: PrefetchJob) -> None:
        """Begin no more loads for it, end its holds, and have its future done."""
        self._coordinator.post(partial(self._cancel, job))

    def settle(self, job: PrefetchJob) -> None:
        """End the job's holds: what it loaded is leased, or nobody wants it."""
        self._coordinator.post(partial(self._settle, job))

    def status(self, limit: int) -> list[PrefetchStatus]:
        """Describe the `limit` oldest jobs."""
        now = self._coordinator.clock()
        jobs = list(self._jobs.values())[:limit]
        return [job.status(now) for job in jobs]

    @property
    def num_jobs(self) -> int:
        """Jobs under way."""
        return len(self._jobs)

    # -- asking -----------------------------------------------------------------------

    def _begin(self, job: PrefetchJob) -> None:
        self.counters.prefetches += 1
        job.begun = self._coordinator.clock()
        if len(self._jobs) >= self._max_jobs:
            self.counters.prefetches_refused += 1
            self._end(job, JobState.REFUSED)
            return
        self._jobs[id(job)] = job
        job.timer = self._coordinator.at(job.deadline, partial(self._due, job))
        job.state = JobState.ASKING
        job.held = self._l1.hold(job.keys)
        job.masks = [chunk.ready if chunk else 0 for chunk in job.held]
        self._ask(job, 0, [])

    def _ask(self, job: PrefetchJob, tier: int, found: list[WantedPart]) -> None:
        """Ask the next tier for what is lacking; after the last one, plan."""
        lacking = job.lacking(tier)
        if not lacking or tier == len(self._tiers):
            self._plan(job, found)
            return
        keys = [wish.need.name.key(job.keys[wish.index]) for wish in lacking]
        future = self._tiers[tier].contains(keys)

        def answered(future: Future[list[bool]]) -> None:
            there = [] if future.exception() else future.result()
            self._coordinator.post(
                partial(self._asked, job, tier, found, lacking, there)
            )

        future.add_done_callback(answered)

    def _asked(
        self,
        job: PrefetchJob,
        tier: int,
        found: list[WantedPart],
        lacking: list[WantedPart],
        there: list[bool],
    ) -> None:
        if job.is_over:
            return
        if not any(there) and not self._tiers[tier].health().up:
            job.tier_failed = True
        for wish, has in zip(lacking, there, strict=False):
            if has:
                job.masks[wish.index] |= 1 << wish.need.part
                found.append(wish)
        self._ask(job, tier + 1, found)

    def _plan(self, job: PrefetchJob, found: list[WantedPart]) -> None:
        """Keep of what was found only what the longest hit needs, in its order."""
        found.sort(key=lambda wish: wish.index)
        job.found = found
        job.aim()
        self._l1.release(job.held[job.goal :])
        del job.held[job.goal :]
        job.wishes.extend(job.useful())
        job.state = JobState.LOADING
        self._ready[job] = None
        self._pump()

    def _plan_again(self, job: PrefetchJob) -> None:
        """Plan the shorter hit that is left after a fault: its window lies elsewhere.

        The parts for full attention are there already, and room that is held beyond
        the hit is given up.
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
        job.wishes.extend(
            wish
            for wish in job.useful()
            if wish.need.window is not None
            and job.masks[wish.index] >> wish.need.part & 1
        )
        self._ready[job] = None

    # -- loading ----------------------------------------------------------------------

    def _pump(self) -> None:
        """Give every job in turn a batch, as long as its tier has room."""
        stuck: list[PrefetchJob] = []
        while self._ready:
            job = next(iter(self._ready))
            del self._ready[job]
            if not job.wishes:
                self._check_done(job)
            elif self._start_batch(job):
                self._ready[job] = None
            else:
                stuck.append(job)
        self._ready.update(dict.fromkeys(stuck))

    def _start_batch(self, job: PrefetchJob) -> bool:
        """Ask for the next wishes; False when their tier has enough to do."""
        tier = job.wishes[0].tier
        room = self._max_bytes - self._num_bytes[tier]
        wishes = self._take_batch(job, tier, min(room, BATCH_BYTES))
        if not wishes:
            return False
        loads = self._reserve(job, wishes)
        if not loads:
            return True
        num_bytes = sum(load.wish.need.num_bytes for load in loads)
        batch = LoadBatch(tier, loads, num_bytes)
        self._num_bytes[tier] += num_bytes
        job.batches.append(batch)
        future = self._tiers[tier].load([load.slot for load in loads])

        def loaded(future: Future[list[LoadResult]]) -> None:
            # On the tier's thread: checksums want a CPU each, not the coordinator's.
            outcomes = [] if future.exception() else future.result()
            faults = batch.check(outcomes)
            self._coordinator.post(partial(self._loaded, job, batch, faults))

        future.add_done_callback(loaded)
        return True

    def _take_batch(self, job: PrefetchJob, tier: int, room: int) -> list[WantedPart]:
        """Take whole chunks' wishes of one tier, at least one when nothing loads."""
        taken: list[WantedPart] = []
        idle = not self._num_bytes[tier]
        while job.wishes and job.wishes[0].tier == tier:
            first = job.wishes[0]
            room -= first.need.num_bytes
            if room < 0 and not (idle and not taken):
                break
            taken.append(job.wishes.popleft())
        return taken

    def _reserve(
        self, job: PrefetchJob, wishes: Sequence[WantedPart]
    ) -> list[TierLoad]:
        """Reserve room for what nobody loads yet; join the loads that there are."""
        loads: list[TierLoad] = []
        for need in {wish.need.part: wish.need for wish in wishes}.values():
            mine = [wish for wish in wishes if wish.need is need]
            mine = [wish for wish in mine if not self._share(job, wish)]
            if mine:
                loads += self._reserve_part(job, need, mine)
        loads.sort(key=lambda load: load.wish.index)
        return loads

    def _share(self, job: PrefetchJob, wish: WantedPart) -> bool:
        load = self._loads.get((job.keys[wish.index], wish.need.part))
        if load is None:
            return False
        load.waiting.append(job)
        job.num_shared += 1
        self.counters.loads_shared += 1
        return True

    def _reserve_part(
        self, job: PrefetchJob, need: RequiredPart, wishes: Sequence[WantedPart]
    ) -> list[TierLoad]:
        hashes = [job.keys[wish.index] for wish in wishes]
        if not job.settled:
            # What others brought since it was asked for must stay, too.
            job.held += filter(None, self._l1.hold(hashes))
        got = self._l1.reserve(
            hashes, need.part, need.num_bytes, name=need.name, owner=job.owner
        )
        if got.num_dropped:
            self.counters.loads_without_room += got.num_dropped
            for wish, chunk in zip(wishes, self._l1.peek(hashes), strict=True):
                if not chunk or not (chunk.ready | chunk.reserved) >> need.part & 1:
                    job.fault(wish.index, need.part)
        loads = []
        for reservation in got.reservations:
            wish = wishes[reservation.index]
            key = hashes[reservation.index]
            buffers = buffers_of(self._memory, reservation.extents)
            slot = LoadItem(need.name.key(key), buffers)
            load = TierLoad(wish, key, reservation, slot)
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
            self._tiers[batch.tier].delete([load.slot.key for load in faults.wrong])
        while job.batches and job.batches[0].done:
            self._commit(job, job.batches.popleft())
        self._ready[job] = None
        self._pump()

    def _commit(self, job: PrefetchJob, batch: LoadBatch) -> None:
        """Make a batch readable up to its first fault; what follows is no use."""
        for load in batch.loads:
            if not load.is_good:
                job.fault(load.wish.index, load.wish.need.part)
        good = [load for load in batch.loads if load.wish.index < job.goal]
        bad = batch.loads[len(good) :]
        for load in bad:
            load.is_good = False
        self._l1.commit([load.reservation for load in good], hold=True)
        self._l1.abort([load.reservation for load in bad])
        chunks = [load.reservation.chunk for load in good]
        for load in batch.loads:
            del self._loads[load.key, load.wish.need.part]
        for load in good:
            self._keep(job, load, batch.tier)
        for load in bad:
            self._release_waiting(load)
        if job.settled or job.is_over:
            self._l1.release(chunks)
        else:
            job.held += chunks

    def _keep(self, job: PrefetchJob, load: TierLoad, tier: int) -> None:
        """Count a part in, and tell the jobs that waited for it and faster tiers."""
        job.num_loaded += 1
        job.num_bytes += load.wish.need.num_bytes
        self.counters.parts_prefetched += 1
        self.counters.bytes_prefetched += load.wish.need.num_bytes
        chunk, bit = load.reservation.chunk, 1 << load.wish.need.part
        self._l1.mark_saved(chunk, bit)
        if tier:
            self._write_back.promote(chunk, bit, tier)
        self._release_waiting(load)

    def _release_waiting(self, load: TierLoad) -> None:
        for other in load.waiting:
            other.num_shared -= 1
            if not load.is_good:
                index = other.keys.index(load.key)
                other.fault(index, load.wish.need.part)
            elif not (other.settled or other.is_over):
                other.held += self._l1.hold([load.key])
                other.num_loaded += 1
            self._ready[other] = None

    # -- ending -----------------------------------------------------------------------

    def _check_done(self, job: PrefetchJob) -> None:
        if job.is_over or job.wishes or job.batches or job.num_shared:
            return
        if job.faulted and job.needs.windows and not job.future.done():
            self._plan_again(job)
        else:
            self._end(job, JobState.DONE)

    def _due(self, job: PrefetchJob) -> None:
        if not job.future.done():
            self.counters.prefetches_late += job.waited
            job.future.set_result(None)

    def _cancel(self, job: PrefetchJob) -> None:
        if not job.is_over:
            self.counters.prefetches_cancelled += 1
            self._end(job, JobState.CANCELLED)
        self._settle(job)

    def _end(self, job: PrefetchJob, state: JobState) -> None:
        job.state = state
        job.wishes.clear()
        self._jobs.pop(id(job), None)
        if job.timer is not None:
            job.timer.cancel()
        if not job.future.done():
            job.future.set_result(None)
        if not job.waited:
            self._settle(job)

    def _settle(self, job: PrefetchJob) -> None:
        job.settled = True
        held, job.held = job.held, []
        self._l1.release(held)

    def close(self) -> None:
        """Cancel every job; loads under way end with their tiers."""
        for job in list(self._jobs.values()):
            self._cancel(job)
