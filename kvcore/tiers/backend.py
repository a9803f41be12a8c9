"""What one store has to do, blocking, for `PooledTier` to make a tier of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from kvcore.errors import DeadlineExceeded
from kvcore.shm import Bytes
from kvcore.tiers.tier import LoadItem, LoadResult, PartKey, StoreItem, StoreResult


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of the monotonic clock that work has to be done by."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """The moment that lies so far ahead."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Return the seconds left, more than 0; raises `DeadlineExceeded`."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the store has not answered in time")
        return left


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes that the store holds and may hold; None where it does not say."""

    used_bytes: int | None = None
    max_bytes: int | None = None


class Backend(Protocol):
    """A store, called from several threads at once, each call blocking.

    Every call MUST end by its deadline with `DeadlineExceeded`, and when the store
    fails at once with `Unavailable`, and MUST NOT touch a buffer after it ended. A
    backend connects when it is first asked, and anew after a failure.

    `load` and `store` yield outcomes in order, as they are known: what an error
    leaves open counts as failed.
    """

    @property
    def batch(self) -> int:
        """Most parts that one `load` or `store` is given."""

    def attach(self, name: str, arena: Bytes) -> None:
        """See `Tier.attach`."""

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """See `Tier.contains`."""

    def load(
        self, slots: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """See `Tier.load`; what is REJECTED the caller removes."""

    def store(
        self, blobs: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """See `Tier.store`."""

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Remove keys; return how many were there, as far as the store says."""

    def usage(self, deadline: Deadline) -> Usage:
        """Ask how much is held, and so whether the store is there."""

    @property
    def num_evicted(self) -> int:
        """Parts that the backend itself removed to make room."""

    def close(self) -> None:
        """Let go of the store; no call is under way."""
