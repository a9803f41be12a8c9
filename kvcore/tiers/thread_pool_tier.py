"""A tier made of a blocking backend: threads, deadlines, back-off, counters.

Loads, stores and questions have threads of their own, so that a lookup does not stand
behind 32 MiB that are written. Work of one kind is taken first come, first served, and
all of it has the same timeout, so what a call waits behind ends before its own
deadline does: every future is done in time without a thread that watches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from typing import Generic, TypeVar

from kvcore.errors import DeadlineExceeded, KVError
from kvcore.shm import Bytes
from kvcore.tiers.backend import Backend, Deadline, Usage
from kvcore.tiers.circuit_breaker import CircuitBreaker, Clock
from kvcore.tiers.tier import (
    FAILED,
    LoadItem,
    LoadOutcome,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    TierCounters,
    TierHealth,
    num_bytes_of,
)

log = logging.getLogger(__name__)


ItemT = TypeVar("ItemT")
OutcomeT = TypeVar("OutcomeT")
Work = Callable[[Sequence[ItemT], Deadline], Iterator[OutcomeT]]


class ThreadPoolTier:
    """A `Tier` over a `Backend`, with `threads` for loads and as many for stores."""

    def __init__(
        self,
        name: str,
        url: str,
        backend: Backend,
        *,
        timeout_s: float,
        retry_s: float,
        threads: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self._url = url
        self._backend = backend
        self._retry_s = retry_s
        self._threads = threads
        self._clock = clock
        self._breaker = CircuitBreaker(retry_s, timeout_s, clock)
        self._lock = threading.Lock()
        self._counters = TierCounters()
        self._usage = Usage()
        self._full_until = float("-inf")
        self._closed = False
        self._loads = ThreadPoolExecutor(threads, f"{name}-load")
        self._stores = ThreadPoolExecutor(threads, f"{name}-store")
        self._questions = ThreadPoolExecutor(1, f"{name}-ask")
        self._probe = _done([None])

    # -- the contract -------------------------------------------------------------

    def attach(self, name: str, arena: Bytes) -> None:
        """See `Tier.attach`."""
        self._backend.attach(name, arena)

    def contains(self, keys: Sequence[PartKey]) -> Future[list[bool]]:
        """See `Tier.contains`."""
        self._count(asked=len(keys))
        share = max(1, len(keys))
        return self._spread(self._questions, keys, share, self._contains, False)

    def load(self, slots: Sequence[LoadItem]) -> Future[list[LoadResult]]:
        """See `Tier.load`."""
        share = self._share(len(slots))
        return self._spread(self._loads, slots, share, self._load, FAILED)

    def store(self, blobs: Sequence[StoreItem]) -> Future[list[StoreResult]]:
        """See `Tier.store`."""
        if self._clock() < self._full_until:
            self._count(full=len(blobs))
            return _done([StoreResult.FULL] * len(blobs))
        share = self._share(len(blobs))
        return self._spread(self._stores, blobs, share, self._store, StoreResult.FAILED)

    def delete(self, keys: Sequence[PartKey]) -> Future[None]:
        """See `Tier.delete`."""
        deleted: Future[None] = Future()
        deleted.set_running_or_notify_cancel()
        share = max(1, len(keys))
        done = self._spread(self._questions, keys, share, self._delete, None)
        done.add_done_callback(lambda _: deleted.set_result(None))
        return deleted

    def probe(self) -> None:
        """See `Tier.probe`; not while one is under way."""
        if self._probe.done():
            self._probe = self._spread(self._questions, [None], 1, self._ask, None)

    def health(self) -> TierHealth:
        """See `Tier.health`."""
        state = self._breaker.state()
        with self._lock:
            counters, usage = copy(self._counters), self._usage
        counters.failures = state.num_failures
        counters.evicted = self._backend.num_evicted
        return TierHealth(
            name=self.name,
            url=self._url,
            up=state.up and not self._closed,
            since=state.since,
            last_error=state.last_error,
            used_bytes=usage.used_bytes,
            max_bytes=usage.max_bytes,
            counters=counters,
        )

    def close(self) -> None:
        """See `Tier.close`."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        for executor in (self._loads, self._stores, self._questions):
            executor.shutdown()
        self._backend.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._breaker.state()
        return f"<PooledTier {self.name} {state}>"

    # -- shares of the work -------------------------------------------------------

    def _share(self, num_items: int) -> int:
        return max(1, min(self._backend.batch, -(-num_items // self._threads)))

    def _spread(
        self,
        executor: Executor,
        items: Sequence[ItemT],
        share: int,
        work: Work[ItemT, OutcomeT],
        failed: OutcomeT,
    ) -> Future[list[OutcomeT]]:
        """Have `items` worked through, `share` at a time, and gather the outcomes."""
        items = list(items)
        if not items:
            return _done([])
        gather = _BatchResults(len(items), failed)
        deadline = Deadline.after(self.timeout_s)
        with self._lock:
            if not self._closed and self._breaker.admit():
                # A thread takes share after share: to wake one for each costs more
                # Python than a file does. Each next step is one under the GIL.
                firsts = iter(range(0, len(items), share))

                def run() -> None:
                    for first in firsts:
                        some = items[first : first + share]
                        self._run(work, some, gather, first, deadline)

                for _ in range(min(self._threads, -(-len(items) // share))):
                    with suppress(RuntimeError):
                        # No new thread is to be had: the work waits for one all the
                        # same, and the next call tries again.
                        executor.submit(run)
                return gather.future
        gather.skip(len(items))
        self._count_failed(failed, len(items))
        return gather.future

    def _run(
        self,
        work: Work[ItemT, OutcomeT],
        items: list[ItemT],
        gather: _BatchResults[OutcomeT],
        first: int,
        deadline: Deadline,
    ) -> None:
        num_done = 0
        left = deadline.at - time.monotonic()
        try:
            if self._closed:
                return
            deadline.left()
            for outcome in work(items, deadline):
                num_done += 1
                if num_done == len(items) and self._breaker.succeed():
                    # Before the future is done: who waits for it may look.
                    log.info("tier %s is up", self.name)
                gather.put(first + num_done - 1, outcome)
        except Exception as error:  # noqa: BLE001 - no failure of a store is ours
            if isinstance(error, DeadlineExceeded) and left < self.timeout_s / 2:
                # It stood in line for most of its time: not the store's fault.
                self._count(late=len(items) - num_done)
            else:
                self._note(error)
        finally:
            self._count_failed(gather.failed, len(items) - num_done)
            gather.skip(len(items) - num_done)

    def _note(self, error: Exception) -> None:
        if not isinstance(error, KVError):
            log.error("tier %s: a defect of ours", self.name, exc_info=error)
        if self._breaker.fail(str(error)):
            log.warning("tier %s is down: %s", self.name, error)

    # -- the work itself, in a thread ---------------------------------------------

    def _ask(self, _: Sequence[None], deadline: Deadline) -> Iterator[None]:
        self._usage = self._backend.usage(deadline)
        return iter([None])

    def _contains(self, keys: Sequence[PartKey], deadline: Deadline) -> Iterator[bool]:
        found = self._backend.contains(keys, deadline)
        self._count(found=sum(found))
        return iter(found)

    def _delete(self, keys: Sequence[PartKey], deadline: Deadline) -> Iterator[None]:
        self._count(deleted=self._backend.delete(keys, deadline))
        return iter([None] * len(keys))

    def _load(
        self, slots: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        outcomes = self._backend.load(slots, deadline)
        for loaded, slot in zip(outcomes, slots, strict=False):
            if loaded.outcome is LoadOutcome.DONE:
                self._count(loaded=1, loaded_bytes=num_bytes_of(slot.buffers))
            elif loaded.outcome is LoadOutcome.MISSING:
                self._count(missing=1)
            elif loaded.outcome is LoadOutcome.REJECTED:
                self._count(rejected=1)
                self._backend.delete([slot.key], deadline)
            else:
                self._count(load_failed=1)
            yield loaded

    def _store(
        self, blobs: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        outcomes = self._backend.store(blobs, deadline)
        for stored, blob in zip(outcomes, blobs, strict=False):
            if stored is StoreResult.DONE:
                self._count(stored=1, stored_bytes=num_bytes_of(blob.buffers))
            elif stored is StoreResult.PRESENT:
                self._count(present=1)
            elif stored is StoreResult.FULL:
                self._count(full=1)
                self._full_until = self._clock() + self._retry_s
            else:
                self._count(store_failed=1)
            yield stored

    # -- counters -----------------------------------------------------------------

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, number in counts.items():
                setattr(self._counters, name, getattr(self._counters, name) + number)

    def _count_failed(self, failed: object, number: int) -> None:
        if failed is FAILED:
            self._count(load_failed=number)
        elif failed is StoreResult.FAILED:
            self._count(store_failed=number)


class _BatchResults(Generic[OutcomeT]):
    """Outcomes of one call, and its future, done when none is left open."""

    def __init__(self, num_items: int, failed: OutcomeT) -> None:
        self.failed = failed
        self.future: Future[list[OutcomeT]] = Future()
        self.future.set_running_or_notify_cancel()  # Nobody cancels it from here on.
        self._outcomes = [failed] * num_items
        self._open = num_items
        self._lock = threading.Lock()

    def put(self, index: int, outcome: OutcomeT) -> None:
        """Note the outcome of one item."""
        self._outcomes[index] = outcome
        self.skip(1)

    def skip(self, number: int) -> None:
        """Leave items as failed."""
        with self._lock:
            self._open -= number
            done = number > 0 and self._open == 0
        if done:
            self.future.set_result(self._outcomes)


def _done(outcomes: list[OutcomeT]) -> Future[list[OutcomeT]]:
    future: Future[list[OutcomeT]] = Future()
    future.set_result(outcomes)
    return future
