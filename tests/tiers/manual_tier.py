"""Manual tier: a test decides when and how each call completes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvcore.extents import Checksum, checksum_of
from kvcore.tiers.tier import (
    LoadItem,
    LoadOutcome,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    TierCounters,
    TierHealth,
)


@dataclass(eq=False)
class Pending:
    """A call that has no answer yet."""

    kind: str
    future: Future[Any]
    answer: Callable[[], Any]
    fail: Callable[[], Any]


@dataclass
class ManualTier:
    """Keeps copies of bytes; `pending` calls are answered one by one."""

    name: str = "played"
    timeout_s: float = 1.0
    kept: dict[PartKey, bytes] = field(default_factory=dict)
    wrong: set[PartKey] = field(default_factory=set)
    """Keys whose next load gives other bytes."""
    pending: list[Pending] = field(default_factory=list)
    asked: int = 0
    up: bool = True
    probed: int = 0

    def attach(self, name: str, arena: object) -> None:
        """Need nothing of it."""

    def contains(self, keys: Sequence[PartKey]) -> Future[list[bool]]:
        """See `Tier.contains`."""
        self.asked += 1
        keys = list(keys)
        return self._later(
            "contains",
            lambda: [key in self.kept for key in keys],
            lambda: [False] * len(keys),
        )

    def load(self, slots: Sequence[LoadItem]) -> Future[list[LoadResult]]:
        """See `Tier.load`."""
        slots = list(slots)
        return self._later(
            "load",
            lambda: [self._load(slot) for slot in slots],
            lambda: [LoadResult(LoadOutcome.FAILED)] * len(slots),
        )

    def _load(self, slot: LoadItem) -> LoadResult:
        data = self.kept.get(slot.key)
        if data is None:
            return LoadResult(LoadOutcome.MISSING)
        checksum = checksum_of([memoryview(data)])
        if slot.key in self.wrong:
            self.wrong.discard(slot.key)
            data = bytes(len(data))
        rest = memoryview(data)
        for buffer in slot.buffers:
            buffer[:] = rest[: len(buffer)]
            rest = rest[len(buffer) :]
        return LoadResult(LoadOutcome.DONE, checksum)

    def store(self, blobs: Sequence[StoreItem]) -> Future[list[StoreResult]]:
        """See `Tier.store`."""
        blobs = list(blobs)
        return self._later(
            "store",
            lambda: [self._store(blob) for blob in blobs],
            lambda: [StoreResult.FAILED] * len(blobs),
        )

    def _store(self, blob: StoreItem) -> StoreResult:
        if blob.key in self.kept:
            return StoreResult.PRESENT
        data = b"".join(blob.buffers)
        assert checksum_of([memoryview(data)]) == Checksum(blob.checksum)
        self.kept[blob.key] = data
        return StoreResult.DONE

    def delete(self, keys: Sequence[PartKey]) -> Future[None]:
        """See `Tier.delete`."""
        for key in keys:
            self.kept.pop(key, None)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def probe(self) -> None:
        """See `Tier.probe`."""
        self.probed += 1

    def health(self) -> TierHealth:
        """See `Tier.health`."""
        counters = TierCounters()
        return TierHealth(self.name, "", self.up, 0.0, "", None, None, counters)

    def close(self) -> None:
        """See `Tier.close`: what is pending fails."""
        while self.pending:
            self.answer(0, well=False)

    def answer(self, index: int, *, well: bool = True) -> None:
        """Complete a pending call, or fail it as an unavailable tier does."""
        call = self.pending.pop(index)
        call.future.set_result(call.answer() if well else call.fail())

    def answer_all(self) -> None:
        """Answer what is pending now."""
        for _ in range(len(self.pending)):
            self.answer(0)

    def _later(
        self, kind: str, answer: Callable[[], Any], fail: Callable[[], Any]
    ) -> Future[Any]:
        future: Future[Any] = Future()
        self.pending.append(Pending(kind, future, answer, fail))
        return future
