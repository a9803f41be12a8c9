"""Asynchronous writes from L1 to the tiers; never blocks a store.

Each tier has a queue, bounded in bytes. Parts that do not fit are skipped and counted,
so a slow tier delays no other. Chunks are held only while a tier reads them. Everything
here runs on the timer thread, except `stored`, `used` and `status`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial

from kvcore.extents import buffers_of
from kvcore.keys import ChunkHash
from kvcore.shm import Bytes
from kvcore.status import WriteBackStatus
from kvcore.storage.chunk import Removal
from kvcore.storage.l1 import L1, Chunk, DropReason, Part, PartId
from kvcore.tiers.tier import StoreItem, StoreResult, Tier
from kvcore.tiers.timer_thread import TimerThread

BATCH_BYTES = 16 << 20
"""Bytes per call of a tier."""
MAX_BATCHES = 2
"""Calls of one tier in progress: the next is queued when one ends."""
COMING_CHUNKS = 512
"""Next eviction victims that are examined after a store."""


class WritePolicy(Enum):
    """When a chunk is written to the tiers."""

    WRITE_THROUGH = "write_through"
    ON_SECOND_USE = "on_second_use"
    """Once a lookup has found it."""
    ON_EVICTION = "on_eviction"
    """Shortly before its eviction."""


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

    def as_dict(self) -> dict[str, int]:
        """Return all of them by name."""
        return asdict(self)


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


@dataclass(frozen=True, slots=True)
class _WriteBatch:
    """Parts being written to a tier, with the holds on their chunks."""

    items: list[_QueuedPart]
    chunks: list[Chunk]
    store_items: list[StoreItem]


class WriteBack:
    """One queue per tier, and the policy that fills it."""

    def __init__(
        self,
        l1: L1,
        arena: Bytes,
        tiers: Sequence[Tier],
        timer_thread: TimerThread,
        *,
        policy: WritePolicy,
        max_bytes: int,
        watermark: float,
    ) -> None:
        self.counters = WriteBackCounters()
        self._l1 = l1
        self._memory = arena.data
        self._queues = [_WriteQueue(tier) for tier in tiers]
        self._timer_thread = timer_thread
        self._policy = policy
        self._max_bytes = max_bytes
        self._watermark = watermark
        self._looking = False
        l1.on_removed(self._count_removal)

    # -- any thread -------------------------------------------------------------------

    def stored(self, chunks: Sequence[Chunk]) -> None:
        """Apply the policy to chunks of which parts were committed."""
        if self._policy is WritePolicy.WRITE_THROUGH:
            self._timer_thread.post(partial(self._offer, chunks))
        elif self._policy is WritePolicy.ON_EVICTION and not self._looking:
            self._looking = True
            self._timer_thread.post(self._look_ahead)

    def used(self, chunks: Sequence[Chunk]) -> None:
        """Note that a lookup found these chunks."""
        if self._policy is WritePolicy.ON_SECOND_USE:
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
        above = int((1 - self._watermark) * stats.total_bytes)
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
            if queue.num_bytes + place.num_bytes > self._max_bytes:
                self.counters.writes_skipped += 1
                continue
            queue.items.append(_QueuedPart(chunk.hash, part, place.num_bytes))
            queue.known.add((chunk.hash, part))
            queue.num_bytes += place.num_bytes
            num_put += 1
        return num_put

    def _pump(self, queue: _WriteQueue) -> None:
        while queue.items and queue.num_batches < MAX_BATCHES:
            self._start_batch(queue)

    def _start_batch(self, queue: _WriteQueue) -> None:
        batch = self._hold(queue, _take(queue.items))
        if not batch.items:
            return
        queue.num_batches += 1
        future = queue.tier.store(batch.store_items)

        def stored(future: Future[list[StoreResult]]) -> None:
            outcomes = [] if future.exception() else future.result()
            self._timer_thread.post(partial(self._stored, queue, batch, outcomes))

        future.add_done_callback(stored)

    def _hold(self, queue: _WriteQueue, items: Sequence[_QueuedPart]) -> _WriteBatch:
        """Hold the chunks that are still in L1, and drop the other items."""
        chunks = self._l1.hold([item.chunk for item in items])
        batch = _WriteBatch([], [], [])
        for item, chunk in zip(items, chunks, strict=True):
            place = _readable(chunk, item.part)
            if chunk is None or place is None or place.name is None:
                self.counters.writes_too_late += 1
                self._l1.release([chunk])
                _drop(queue, item)
                continue
            batch.items.append(item)
            batch.chunks.append(chunk)
            buffers = buffers_of(self._memory, place.extents)
            batch.store_items.append(
                StoreItem(place.name.key(item.chunk), buffers, place.checksum)
            )
        return batch

    def _stored(
        self, queue: _WriteQueue, batch: _WriteBatch, outcomes: Sequence[StoreResult]
    ) -> None:
        queue.num_batches -= 1
        missing = len(batch.items) - len(outcomes)
        padded = [*outcomes, *[StoreResult.FAILED] * missing]
        for item, chunk, stored in zip(batch.items, batch.chunks, padded, strict=True):
            self._count(item, stored)
            if stored in (StoreResult.DONE, StoreResult.PRESENT):
                self._l1.mark_saved(chunk, 1 << item.part)
            _drop(queue, item)
        self._l1.release(batch.chunks)
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
                _drop(queue, item)
            queue.items.clear()


def _take(items: deque[_QueuedPart]) -> list[_QueuedPart]:
    """Remove and return a batch from the front, at least one item."""
    taken = [items.popleft()]
    room = BATCH_BYTES - taken[0].num_bytes
    while items and items[0].num_bytes <= room:
        taken.append(items.popleft())
        room -= taken[-1].num_bytes
    return taken


def _drop(queue: _WriteQueue, item: _QueuedPart) -> None:
    queue.known.discard((item.chunk, item.part))
    queue.num_bytes -= item.num_bytes


def _readable(chunk: Chunk | None, part: PartId) -> Part | None:
    if chunk is None or not chunk.ready >> part & 1:
        return None
    return chunk.parts[part]
