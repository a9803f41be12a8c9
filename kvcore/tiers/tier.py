"""Contract of a tier: a store for parts below L1, its values, and its record format.

`Tier` is what the server calls: asynchronous, never raising. `Backend` is what a store
implements: blocking, with deadlines. `ThreadPoolTier` turns a `Backend` into a `Tier`.
For every tier, and checked of each by `tests/tiers/test_contract.py`:

- A call MUST return at once; its result is in its future.
- A future MUST NOT raise because of the store: failures are outcomes, and are counted.
- Every future MUST be done within `timeout_s` of the call, whatever the store does.
  The exception is a request that the kernel cannot cancel (a disk that hangs): then
  only the next rule holds.
- Buffers MUST NOT be accessed once the future is done. They MUST stay valid until then.
- After a failure a tier is down during its back-off: it answers MISSING, FAILED and
  False at once. Then one call is admitted, and the others when that one succeeds.
- A record that is loaded MUST have the key and length of its item and be complete; the
  tier rejects and removes any other. Whether the bytes are right is checked by the
  caller, with `checksum_of` and the checksum that was loaded with them. On a mismatch
  the caller deletes the key, since `store` does not overwrite.
"""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, Self, TypeVar

import msgspec
import xxhash

from kvcore.errors import DeadlineExceeded
from kvcore.extents import Buffers, Checksum
from kvcore.shm import Bytes
from kvcore.storage.chunk import PartKey as PartKey

# -- values -----------------------------------------------------------------------

_HEADER = struct.Struct("<4sHHQ16s16s")
_MAGIC = b"KVPt"
_VERSION = 1
HEADER_BYTES = _HEADER.size
"""Length of the header before the payload of every record."""


class PartItem(msgspec.Struct, frozen=True):
    """A part's key, and its bytes in L1 in order.

    In every store a part is a record: a header of `HEADER_BYTES`, then the payload.
    The header has a mark, the payload's length, its checksum and a hash of the key.
    """

    key: PartKey
    buffers: Buffers

    @property
    def num_bytes(self) -> int:
        """Length of the payload."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def record_bytes(self) -> int:
        """Length of the record, header and payload."""
        return HEADER_BYTES + self.num_bytes

    def _digest(self) -> bytes:
        return xxhash.xxh3_128_digest(str(self.key).encode())


class StoreItem(PartItem, frozen=True):
    """A part to store, with the checksum made when its bytes were written to L1."""

    checksum: Checksum

    def header(self) -> bytes:
        """Return the header of this part's record."""
        length, digest = self.num_bytes, self._digest()
        return _HEADER.pack(_MAGIC, _VERSION, 0, length, self.checksum, digest)

    def record(self) -> bytes:
        """Return a copy of this part's record."""
        return b"".join([self.header(), *self.buffers])


class LoadItem(PartItem, frozen=True):
    """A part to load into L1; the buffers together have its exact size.

    Their contents after any outcome but DONE are undefined.
    """

    def result_of(self, header: bytes | memoryview) -> LoadResult:
        """Return DONE with the stored checksum, or REJECTED for a foreign header."""
        if len(header) < HEADER_BYTES:
            return REJECTED
        magic, version, flags, length, checksum, digest = _HEADER.unpack_from(header)
        expected = (_MAGIC, _VERSION, 0, self.num_bytes, self._digest())
        if (magic, version, flags, length, digest) != expected:
            return REJECTED
        return LoadResult(LoadOutcome.DONE, Checksum(checksum))

    def fill(self, record: bytes | memoryview) -> LoadResult:
        """Copy a whole record's payload into the buffers; REJECTED as `result_of`."""
        if len(record) != self.record_bytes:
            return REJECTED
        result = self.result_of(record)
        payload = memoryview(record)[HEADER_BYTES:]
        for buffer in self.buffers if result is not REJECTED else ():
            buffer[:] = payload[: buffer.nbytes]
            payload = payload[buffer.nbytes :]
        return result


class LoadOutcome(Enum):
    """Outcome of one item to load; the value is its counter in `TierCounters`."""

    DONE = "loaded"
    MISSING = "missing"
    FAILED = "load_failed"
    REJECTED = "rejected"
    """The stored record is not that of the item; the tier has removed it."""


class LoadResult(msgspec.Struct, frozen=True):
    """Outcome of one item to load; with DONE the checksum stored with the bytes."""

    outcome: LoadOutcome
    checksum: Checksum = Checksum(b"")


MISSING = LoadResult(LoadOutcome.MISSING)
FAILED = LoadResult(LoadOutcome.FAILED)
REJECTED = LoadResult(LoadOutcome.REJECTED)


class StoreResult(Enum):
    """Outcome of one item to store; the value is its counter in `TierCounters`."""

    DONE = "stored"
    PRESENT = "present"
    """The key was present; nothing was written."""
    FULL = "full"
    """No space, or no permission to write; the tier then stores nothing for a while."""
    FAILED = "store_failed"


class TierCounters(msgspec.Struct):
    """Totals since the start, in parts where the name does not say bytes."""

    asked: int = 0
    found: int = 0
    loaded: int = 0
    loaded_bytes: int = 0
    missing: int = 0
    load_failed: int = 0
    rejected: int = 0
    """Records with a wrong mark, key or length."""
    stored: int = 0
    stored_bytes: int = 0
    present: int = 0
    full: int = 0
    store_failed: int = 0
    deleted: int = 0
    evicted: int = 0
    late: int = 0
    """Parts still queued at their deadline."""
    failures: int = 0
    """Times that the tier went down."""


class TierHealth(msgspec.Struct, frozen=True):
    """State of a tier, for inspection and metrics. Times are Unix seconds."""

    name: str
    url: str
    """Without credentials."""
    up: bool
    since: float
    last_error: str
    """Kept after a recovery; empty when there was no failure."""
    used_bytes: int | None
    max_bytes: int | None
    counters: TierCounters


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes that a store holds and may hold; None where it does not report it."""

    used_bytes: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Deadline:
    """A time of the monotonic clock by which a blocking call must end."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """Return the deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Return the seconds left, more than 0.

        Raises:
            DeadlineExceeded: none are left.
        """
        remaining = self.at - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the store has not answered in time")
        return remaining


ResultT = TypeVar("ResultT")


def results_of(done: Future[list[ResultT]]) -> list[ResultT]:
    """Return the results of a tier's call that ended, none if it has a defect."""
    return [] if done.exception() else done.result()


# -- contracts --------------------------------------------------------------------


class Tier(Protocol):
    """A store for parts below L1. All methods may be called from any thread."""

    @property
    def name(self) -> str:
        """Unique among the tiers of a server; from the URL."""

    @property
    def timeout_s(self) -> float:
        """Longest time from a call to its future's end."""

    def attach(self, name: str, arena: Bytes) -> None:
        """Receive the shared memory that contains the buffers, before first use.

        A tier MAY register it, and MAY then refuse buffers that lie elsewhere.
        """

    def contains(self, keys: Sequence[PartKey]) -> Future[list[bool]]:
        """Return for each key whether it is stored; one round trip for all."""

    def load(self, items: Sequence[LoadItem]) -> Future[list[LoadResult]]:
        """Fill the items' buffers; return one result per item, in order."""

    def store(self, items: Sequence[StoreItem]) -> Future[list[StoreResult]]:
        """Write the items that are not stored; return one result per item, in order."""

    def delete(self, keys: Sequence[PartKey]) -> Future[None]:
        """Remove keys; those that are absent, and a tier that is down, are ignored."""

    def probe(self) -> None:
        """Refresh what `health` reports, asynchronously.

        A tier that is down is probed after its back-off, as by any other call.
        """

    def health(self) -> TierHealth:
        """Return the state known so far, without a call to the store.

        A tier that has not answered any call yet is not up.
        """

    def close(self) -> None:
        """End calls in progress (within `timeout_s`) and release the store.

        Later calls are answered as by a tier that is down.
        """


class Backend(ABC):
    """A store with blocking calls from several threads at once.

    Every call MUST end by its deadline with `DeadlineExceeded`, MUST raise
    `Unavailable` when the store fails before that, and MUST NOT access a buffer after
    it ended. A backend connects at its first call, and reconnects after a failure.

    `load` and `store` yield one result per item in order, as soon as it is known; items
    without a result when an error ends the iteration count as failed.
    """

    batch: int = 1
    """Maximum number of items per `load` or `store`."""

    @property
    def num_evicted(self) -> int:
        """Parts that the backend itself removed to make room."""
        return 0

    def attach(self, name: str, arena: Bytes) -> None:  # noqa: B027 - optional
        """See `Tier.attach`."""

    @abstractmethod
    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """See `Tier.contains`."""

    @abstractmethod
    def load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """See `Tier.load`; the caller deletes what is REJECTED."""

    @abstractmethod
    def store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """See `Tier.store`."""

    @abstractmethod
    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Remove keys; return how many were present, as far as the store reports it."""

    @abstractmethod
    def usage(self, deadline: Deadline) -> Usage:
        """Return the bytes held; fails like any call when the store is down."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release the store; no call is in progress."""
