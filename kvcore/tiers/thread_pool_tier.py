"""A tier over a blocking backend: thread pools, deadlines, circuit breaker, counters.

Loads, stores and queries have separate threads, so that a lookup does not wait behind
a write of 32 MiB. Work of one kind is done in order and has one timeout, so a call that
is queued behind others ends before its own deadline: every future is done in time
without a watchdog thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvcore.errors import DeadlineExceeded, KVError
from kvcore.shm import Bytes
from kvcore.tiers.tier import (
    FAILED,
    Backend,
    Deadline,
    LoadItem,
    LoadOutcome,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    TierCounters,
    TierHealth,
    Usage,
)

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
OutcomeT = TypeVar("OutcomeT")
Work = Callable[[Sequence[ItemT], Deadline], Iterator[OutcomeT]]
Clock = Callable[[], float]

_MAX_BACKOFF = 16
"""Bound of the back-off, in multiples of the first: it doubles per failed probe."""


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
        self._counts: Counter[str] = Counter()
        self._usage = Usage()
        self._full_until = float("-inf")
        self._closed = False
        self._loads = ThreadPoolExecutor(threads, f"{name}-load")
        self._stores = ThreadPoolExecutor(threads, f"{name}-store")
        self._queries = ThreadPoolExecutor(1, f"{name}-query")
        self._probe = _done([None])

    # -- the contract -------------------------------------------------------------

    def attach(self, name: str, arena: Bytes) -> None:
        """See `Tier.attach`."""
        self._backend.attach(name, arena)

    def contains(self, keys: Sequence[PartKey]) -> Future[list[bool]]:
        """See `Tier.contains`."""
        self._count("asked", len(keys))
        return self._submit(self._queries, keys, len(keys), self._contains, False)

    def load(self, items: Sequence[LoadItem]) -> Future[list[LoadResult]]:
        """See `Tier.load`."""
        size = self._batch_size(len(items))
        return self._submit(self._loads, items, size, self._load, FAILED)

    def store(self, items: Sequence[StoreItem]) -> Future[list[StoreResult]]:
        """See `Tier.store`."""
        if self._clock() < self._full_until:
            self._count(StoreResult.FULL.value, len(items))
            return _done([StoreResult.FULL] * len(items))
        size = self._batch_size(len(items))
        return self._submit(self._stores, items, size, self._store, StoreResult.FAILED)

    def delete(self, keys: Sequence[PartKey]) -> Future[None]:
        """See `Tier.delete`."""
        deleted: Future[None] = Future()
        deleted.set_running_or_notify_cancel()
        done = self._submit(self._queries, keys, len(keys), self._delete, None)
        done.add_done_callback(lambda _: deleted.set_result(None))
        return deleted

    def probe(self) -> None:
        """See `Tier.probe`; does nothing while a probe is in progress."""
        if self._probe.done():
            self._probe = self._submit(self._queries, [None], 1, self._get_usage, None)

    def health(self) -> TierHealth:
        """See `Tier.health`."""
        state = self._breaker.state
        with self._lock:
            counters, usage = TierCounters(**self._counts), self._usage
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
        for executor in (self._loads, self._stores, self._queries):
            executor.shutdown()
        self._backend.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._breaker.state
        return f"<ThreadPoolTier {self.name} {state}>"

    # -- batches ------------------------------------------------------------------

    def _batch_size(self, num_items: int) -> int:
        return max(1, min(self._backend.batch, -(-num_items // self._threads)))

    def _submit(
        self,
        executor: Executor,
        items: Sequence[ItemT],
        size: int,
        work: Work[ItemT, OutcomeT],
        failed: OutcomeT,
    ) -> Future[list[OutcomeT]]:
        """Process `items` in batches of `size`; return their outcomes in order."""
        items = list(items)
        if not items:
            return _done([])
        results = _BatchResults(len(items), failed)
        deadline = Deadline.after(self.timeout_s)
        with self._lock:
            if not self._closed and self._breaker.admit():
                # Each thread takes batch after batch: waking a thread per batch costs
                # more Python than a file does. `next` is one step under the GIL.
                starts = iter(range(0, len(items), size))

                def run() -> None:
                    for start in starts:
                        batch = items[start : start + size]
                        self._run(work, batch, results, start, deadline)

                for _ in range(min(self._threads, -(-len(items) // size))):
                    with suppress(RuntimeError):
                        # The process has no thread left: the work stays queued, and
                        # the next call tries again.
                        executor.submit(run)
                return results.future
        self._skip(results, len(items))
        return results.future

    def _run(
        self,
        work: Work[ItemT, OutcomeT],
        items: list[ItemT],
        results: _BatchResults[OutcomeT],
        start: int,
        deadline: Deadline,
    ) -> None:
        num_done = 0
        remaining = deadline.at - time.monotonic()
        try:
            if self._closed:
                return
            deadline.remaining()
            for outcome in work(items, deadline):
                num_done += 1
                if num_done == len(items) and self._breaker.succeed():
                    # Before the future is done, whose waiter may read the state.
                    log.info("tier %s is up", self.name)
                results.put(start + num_done - 1, outcome)
        except Exception as error:  # noqa: BLE001 - every failure becomes an outcome
            if isinstance(error, DeadlineExceeded) and remaining < self.timeout_s / 2:
                # It was queued for most of its time: not the store's fault.
                self._count("late", len(items) - num_done)
            else:
                self._record_failure(error)
        finally:
            self._skip(results, len(items) - num_done)

    def _record_failure(self, error: Exception) -> None:
        if not isinstance(error, KVError):
            log.error("tier %s: defect in the backend", self.name, exc_info=error)
        if self._breaker.fail(str(error)):
            log.warning("tier %s is down: %s", self.name, error)

    # -- calls of the backend, in a thread ----------------------------------------

    def _get_usage(self, _: Sequence[None], deadline: Deadline) -> Iterator[None]:
        self._usage = self._backend.usage(deadline)
        return iter([None])

    def _contains(self, keys: Sequence[PartKey], deadline: Deadline) -> Iterator[bool]:
        found = self._backend.contains(keys, deadline)
        self._count("found", sum(found))
        return iter(found)

    def _delete(self, keys: Sequence[PartKey], deadline: Deadline) -> Iterator[None]:
        self._count("deleted", self._backend.delete(keys, deadline))
        return iter([None] * len(keys))

    def _load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        results = self._backend.load(items, deadline)
        for result, item in zip(results, items, strict=False):
            self._count(result.outcome.value, 1)
            if result.outcome is LoadOutcome.DONE:
                self._count("loaded_bytes", item.num_bytes)
            elif result.outcome is LoadOutcome.REJECTED:
                self._backend.delete([item.key], deadline)
            yield result

    def _store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        results = self._backend.store(items, deadline)
        for result, item in zip(results, items, strict=False):
            self._count(result.value, 1)
            if result is StoreResult.DONE:
                self._count("stored_bytes", item.num_bytes)
            elif result is StoreResult.FULL:
                self._full_until = self._clock() + self._retry_s
            yield result

    # -- counters -----------------------------------------------------------------

    def _count(self, name: str, number: int) -> None:
        with self._lock:
            self._counts[name] += number

    def _skip(self, results: _BatchResults[OutcomeT], number: int) -> None:
        """Count `number` items of a load or store as failed, and end them."""
        if results.failed is FAILED:
            self._count(LoadOutcome.FAILED.value, number)
        elif results.failed is StoreResult.FAILED:
            self._count(StoreResult.FAILED.value, number)
        results.skip(number)


class _BatchResults(Generic[OutcomeT]):
    """Outcomes of one call; its future is done when none is open."""

    def __init__(self, num_items: int, failed: OutcomeT) -> None:
        self.failed = failed
        self.future: Future[list[OutcomeT]] = Future()
        self.future.set_running_or_notify_cancel()  # It cannot be cancelled.
        self._outcomes = [failed] * num_items
        self._num_open = num_items
        self._lock = threading.Lock()

    def put(self, index: int, outcome: OutcomeT) -> None:
        """Set the outcome of one item."""
        self._outcomes[index] = outcome
        self.skip(1)

    def skip(self, number: int) -> None:
        """Leave `number` items failed."""
        with self._lock:
            self._num_open -= number
            done = number > 0 and self._num_open == 0
        if done:
            self.future.set_result(self._outcomes)


def _done(outcomes: list[OutcomeT]) -> Future[list[OutcomeT]]:
    future: Future[list[OutcomeT]] = Future()
    future.set_result(outcomes)
    return future


@dataclass(frozen=True, slots=True)
class BreakerState:
    """Whether a store is up, since which Unix time, and its last error.

    A store is not up before its first answer.
    """

    up: bool
    since: float
    last_error: str
    num_failures: int


class CircuitBreaker:
    """Admits calls to a store, with exponential back-off after failures; thread-safe.

    While the store is down no call is admitted until the back-off ends; then one is
    (the probe), and the others when it succeeds, or when it has not ended within
    `probe_s`.
    """

    def __init__(
        self, backoff_s: float, probe_s: float, clock: Clock = time.monotonic
    ) -> None:
        self._backoff_s = backoff_s
        self._probe_s = probe_s
        self._clock = clock
        self._lock = threading.Lock()
        self._tries = 0
        """Failures in a row; 0 is closed."""
        self._retry_at = 0.0
        self._probing = False
        self.state = BreakerState(False, time.time(), "it has not answered yet", 0)

    def admit(self) -> bool:
        """Return whether a call may proceed; its caller MUST report its end."""
        if not self._tries:
            return True
        with self._lock:
            now = self._clock()
            if self._tries and now < self._retry_at:
                return False
            self._probing = True
            self._retry_at = now + self._probe_s
            return True

    def succeed(self) -> bool:
        """Record an answer; return whether the store was down until now."""
        if self.state.up:
            return False
        with self._lock:
            was = self.state
            error = was.last_error if was.num_failures else ""
            self.state = BreakerState(True, time.time(), error, was.num_failures)
            self._tries = 0
            self._probing = False
            return not was.up

    def fail(self, error: str) -> bool:
        """Record a failure; return whether it is the first in a row."""
        with self._lock:
            if self._tries and not self._probing:
                return False  # One of many calls that met the same failure.
            since, num_failures = self.state.since, self.state.num_failures
            if not self._tries:
                since, num_failures = time.time(), num_failures + 1
            self.state = BreakerState(False, since, error, num_failures)
            factor = min(2**self._tries, _MAX_BACKOFF)
            self._tries += 1
            self._probing = False
            self._retry_at = self._clock() + self._backoff_s * factor
            return self._tries == 1
