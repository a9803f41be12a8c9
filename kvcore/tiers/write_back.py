"""Asynchronous writes from L1 to the tiers; never blocks a store.

Each tier has a queue, bounded in bytes. Parts that do not fit are skipped and counted,
so a slow tier delays no other. Chunks are held only while a tier reads them. Everything
here runs on the timer thread, except `stored`, `used` and `status`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from kvcore.config import WriteBackConfig
from kvcore.extents import buffers_of
from kvcore.keys import ChunkHash
from kvcore.shm import Bytes
from kvcore.status import WriteBackStatus
from kvcore.storage.chunk import Removal
from kvcore.storage.l1 import L1, Chunk, DropReason, PartId
from kvcore.tiers.tier import StoreItem, StoreResult, Tier, results_of
from kvcore.tiers.timer_thread import TimerThread

BATCH_BYTES = 16 << 20
"""Bytes per call of a tier."""
MAX_BATCHES = 2
"""Calls of one tier in progress: the next is queued when one ends."""
COMING_CHUNKS = 512
"""Next eviction victims that are examined after a store."""


@dataclass(slots=True)
class WriteBackCounters:
    """Totals, in parts where the name does not say otherwise."""

    parts_written: int = 0
    bytes_written: int = 0
    writes_skipped: int = 0
    """The queue of the tier was full."""
    writes_failed: int = 0
    writes_without_room: int = 0
    """The tier was full."""
    writes_too_late: int = 0
    """Removed from L1 while they were queued."""
    promotions: int = 0
    """Queued for a faster tier than the one they were found in."""
    chunks_evicted_unsaved: int = 0


@dataclass(frozen=True, slots=True)
class _QueuedPart:
    """One part to write to a tier."""

    chunk: ChunkHash
    part: PartId
    num_bytes: int


@dataclass(slots=True, eq=False)
class _WriteQueue:
    """Parts queued for one tier, and those being written to it."""

    tier: Tier
    items: deque[_QueuedPart] = field(default_factory=deque)
    known: set[tuple[ChunkHash, PartId]] = field(default_factory=set)
    """Queued or being written."""
    num_bytes: int = 0
    """Of the known ones."""
    num_batches: int = 0

    def put(self, item: _QueuedPart) -> None:
        """Queue a part."""
        self.items.append(item)
        self.known.add((item.chunk, item.part))
        self.num_bytes += item.num_bytes

    def take_batch(self) -> list[_QueuedPart]:
        """Remove and return items from the front, at least one; they stay known."""
        taken = [self.items.popleft()]
        room = BATCH_BYTES - taken[0].num_bytes
        while self.items and self.items[0].num_bytes <= room:
            taken.append(self.items.popleft())
            room -= taken[-1].num_bytes
        return taken

    def end(self, item: _QueuedPart) -> None:
        """Forget a part that was written or dropped."""
        self.known.discard((item.chunk, item.part))
        self.num_bytes -= item.num_bytes


@dataclass(frozen=True, slots=True)
class _Write:
    """A part being written to a tier; its chunk is held."""

    queued: _QueuedPart
    chunk: Chunk
    item: StoreItem


class WriteBack:
    """One queue per tier, and the policy that fills it."""

    def __init__(
        self,
        l1: L1,
        arena: Bytes,
        tiers: Sequence[Tier],
        timer_thread: TimerThread,
        config: WriteBackConfig,
    ) -> None:
        self.counters = WriteBackCounters()
        self._l1 = l1
        self._memory = arena.data
        self._queues = [_WriteQueue(tier) for tier in tiers]
        self._timer_thread = timer_thread
        self._config = config
        self._looking = False
        l1.on_removed(self._count_removal)

    # -- any thread -------------------------------------------------------------------

    def stored(self, chunks: Sequence[Chunk]) -> None:
        """Apply the policy to chunks of which parts were committed."""
        if self._config.policy == "write_through":
            self._timer_thread.post(partial(self._offer, chunks))
        elif self._config.policy == "on_eviction" and not self._looking:
            self._looking = True
            self._timer_thread.post(self._look_ahead)

    def used(self, chunks: Sequence[Chunk]) -> None:
        """Note that a lookup found these chunks."""
        if self._config.policy == "on_second_use":
            unsaved = [chunk for chunk in chunks if chunk.ready & ~chunk.saved]
            if unsaved:
                self._timer_thread.post(partial(self._offer, unsaved))

    def status(self) -> list[WriteBackStatus]:
        """Describe each tier's queue."""
        return [
            WriteBackStatus(
                tier=queue.tier.name,
                num_parts=len(queue.known),
                num_bytes=queue.num_bytes,
                num_writing=len(queue.known) - len(queue.items),
            )
            for queue in self._queues
        ]

    # -- on the timer thread ----------------------------------------------------------

    def promote(self, chunk: Chunk, parts: int, tier: int) -> None:
        """Queue parts found in one tier for the faster ones."""
        for queue in self._queues[:tier]:
            self.counters.promotions += self._put(queue, chunk, parts)
            self._pump(queue)

    def _offer(self, chunks: Iterable[Chunk]) -> None:
        for queue in self._queues:
            for chunk in chunks:
                self._put(queue, chunk, chunk.ready & ~chunk.saved)
            self._pump(queue)

    def _look_ahead(self) -> None:
        """Write the next eviction victims, as many bytes as exceed the watermark."""
        self._looking = False
        stats = self._l1.stats()
        above = int((1 - self._config.watermark) * stats.total_bytes)
        if stats.used_bytes < stats.total_bytes - above:
            return
        coming = []
        for chunk in self._l1.coming(COMING_CHUNKS):
            above -= sum(part.num_bytes for part in [*chunk.parts.values()])
            if above < 0:
                break
            coming.append(chunk)
        self._offer(coming)

    def _put(self, queue: _WriteQueue, chunk: Chunk, parts: int) -> int:
        """Queue the parts of a mask; return their number."""
        num_put = 0
        for part, place in [*chunk.parts.items()]:
            known = (chunk.hash, part) in queue.known or place.name is None
            if known or not parts >> part & 1 or not place.checksum:
                continue
            if queue.num_bytes + place.num_bytes > self._config.max_bytes:
                self.counters.writes_skipped += 1
                continue
            queue.put(_QueuedPart(chunk.hash, part, place.num_bytes))
            num_put += 1
        return num_put

    def _pump(self, queue: _WriteQueue) -> None:
        while queue.items and queue.num_batches < MAX_BATCHES:
            self._start_batch(queue)

    def _start_batch(self, queue: _WriteQueue) -> None:
        writes = self._hold(queue, queue.take_batch())
        if not writes:
            return
        queue.num_batches += 1

        def stored(future: Future[list[StoreResult]]) -> None:
            results = results_of(future)
            self._timer_thread.post(partial(self._stored, queue, writes, results))

        future = queue.tier.store([write.item for write in writes])
        future.add_done_callback(stored)

    def _hold(self, queue: _WriteQueue, items: Sequence[_QueuedPart]) -> list[_Write]:
        """Hold the chunks that are still in L1, and drop the other items."""
        writes = []
        chunks = self._l1.hold([item.chunk for item in items])
        for item, chunk in zip(items, chunks, strict=True):
            is_ready = chunk is not None and chunk.ready >> item.part & 1
            place = chunk.parts[item.part] if chunk and is_ready else None
            if chunk is None or place is None or place.name is None:
                self.counters.writes_too_late += 1
                self._l1.release([chunk])
                queue.end(item)
                continue
            key = place.name.key(item.chunk)
            buffers = buffers_of(self._memory, place.extents)
            writes.append(_Write(item, chunk, StoreItem(key, buffers, place.checksum)))
        return writes

    def _stored(
        self, queue: _WriteQueue, writes: list[_Write], results: list[StoreResult]
    ) -> None:
        queue.num_batches -= 1
        results = results or [StoreResult.FAILED] * len(writes)
        for write, result in zip(writes, results, strict=True):
            self._count(write.queued, result)
            if result in (StoreResult.DONE, StoreResult.PRESENT):
                self._l1.mark_saved(write.chunk, 1 << write.queued.part)
            queue.end(write.queued)
        self._l1.release([write.chunk for write in writes])
        self._pump(queue)

    def _count(self, item: _QueuedPart, stored: StoreResult) -> None:
        counters = self.counters
        if stored is StoreResult.DONE:
            counters.parts_written += 1
            counters.bytes_written += item.num_bytes
        elif stored is StoreResult.FULL:
            counters.writes_without_room += 1
        elif stored is StoreResult.FAILED:
            counters.writes_failed += 1

    def _count_removal(self, removal: Removal) -> None:
        chunk = removal.chunk
        if removal.reason is DropReason.EVICTED and chunk.ready & ~chunk.saved:
            self.counters.chunks_evicted_unsaved += 1

    def close(self) -> None:
        """Start no more writes; those in progress end with their tiers."""
        for queue in self._queues:
            for item in queue.items:
                queue.end(item)
            queue.items.clear()
