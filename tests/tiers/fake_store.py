"""A store in this process whose failures a test controls."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcore.errors import DeadlineExceeded, Unavailable
from kvcore.tiers.thread_pool_tier import ThreadPoolTier
from kvcore.tiers.tier import (
    MISSING,
    Backend,
    Deadline,
    LoadItem,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    Tier,
    Usage,
)
from tests.tiers.store_servers import Damage, Engine, damaged


class FakeBackend(Backend):
    """Store in a dict; clear `alive` to make it fail, `going` to make it hang."""

    batch = 2

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.records: dict[PartKey, bytes] = {}
        self.alive = threading.Event()
        self.going = threading.Event()
        self.going.set()
        self.entered = threading.Semaphore(0)
        """Released with every call."""

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """See `Backend.contains`."""
        self._enter(deadline)
        return [key in self.records for key in keys]

    def load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """See `Backend.load`."""
        for item in items:
            self._enter(deadline)
            record = self.records.get(item.key)
            yield MISSING if record is None else item.fill(record)

    def store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """See `Backend.store`."""
        for item in items:
            self._enter(deadline)
            used = sum(map(len, self.records.values()))
            if item.key in self.records:
                yield StoreResult.PRESENT
            elif used + item.num_bytes > self.max_bytes:
                yield StoreResult.FULL
            else:
                self.records[item.key] = item.record()
                yield StoreResult.DONE

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """See `Backend.delete`."""
        self._enter(deadline)
        return sum(self.records.pop(key, None) is not None for key in keys)

    def usage(self, deadline: Deadline) -> Usage:
        """See `Backend.usage`."""
        self._enter(deadline)
        return Usage(sum(map(len, self.records.values())), self.max_bytes)

    def _enter(self, deadline: Deadline) -> None:
        self.entered.release()
        if not self.going.wait(deadline.remaining()):
            raise DeadlineExceeded("hangs")
        if not self.alive.is_set():
            raise Unavailable("dead")


class FakeEngine(Engine):
    """The fake as an engine of the contract's tests."""

    capacity = 32 << 20
    url = "fake:"

    def __init__(self, folder: Path) -> None:
        self.backend = FakeBackend(self.capacity)

    def open(self) -> Tier:
        """Open a tier on it; no URL names it."""
        return ThreadPoolTier(
            "fake", self.url, self.backend, timeout_s=0.5, retry_s=0.02, threads=2
        )

    def start(self) -> None:
        """Accept calls."""
        self.backend.alive.set()

    def kill(self) -> None:
        """Reject calls and remove all records."""
        self.backend.alive.clear()
        self.backend.records.clear()

    def pause(self) -> None:
        """Block calls until `resume`."""
        self.backend.going.clear()

    def resume(self) -> None:
        """Go on."""
        self.backend.going.set()

    def damage(self, key: PartKey, damage: Damage) -> None:
        """Change a record."""
        self.backend.records[key] = damaged(self.backend.records[key], damage)
