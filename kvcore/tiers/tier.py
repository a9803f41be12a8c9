"""The contract of a tier, and the record that every store keeps of a part.

What holds for every tier, and `tests/tiers` checks of each:

- A call MUST return at once; what it has to say is in its future.
- A future MUST NOT raise for a store's troubles: those are outcomes, counted.
- Every future MUST be done within `timeout_s` of the call, whatever the store does.
  The one exception is a request that the kernel has and nobody can call off (a disk
  that hangs): then the next point is the one that holds.
- Buffers MUST NOT be touched once the future is done. They MUST stay valid until then.
- After a failure a tier is down for a short while: it answers MISSING, FAILED and
  False at once. Then one call is let through, and the rest when that one succeeds.
- What a store returns MUST be of the key that was asked for, of the length that the
  slot has, and whole; the tier rejects and removes anything else. That the bytes are
  right is the caller's to check, with `checksum_of` and the checksum that came with
  them. On a mismatch the caller deletes the key, since `store` keeps what is there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from concurrent.futures import Future
from enum import Enum
from typing import Protocol

import msgspec
import xxhash

from kvcore.extents import Buffers, Checksum
from kvcore.shm import Bytes
from kvcore.storage.chunk import PartKey as PartKey


class StoreItem(msgspec.Struct, frozen=True):
    """A part to store: its bytes in L1, and the checksum made when they came there."""

    key: PartKey
    checksum: Checksum
    buffers: Buffers


class LoadItem(msgspec.Struct, frozen=True):
    """Room in L1 for a part to load; the buffers together have its exact size.

    What they hold after any outcome but DONE is undefined.
    """

    key: PartKey
    buffers: Buffers


class LoadOutcome(Enum):
    """What became of one slot."""

    DONE = "done"
    MISSING = "missing"
    FAILED = "failed"
    REJECTED = "rejected"
    """What was there is not the record of that slot; the tier has removed it."""


class LoadResult(msgspec.Struct, frozen=True):
    """Outcome of one slot; with DONE the checksum that was stored with the bytes."""

    outcome: LoadOutcome
    checksum: Checksum = Checksum(b"")


MISSING = LoadResult(LoadOutcome.MISSING)
FAILED = LoadResult(LoadOutcome.FAILED)
REJECTED = LoadResult(LoadOutcome.REJECTED)


class StoreResult(Enum):
    """What became of one blob."""

    DONE = "done"
    PRESENT = "present"
    """The key was there already; nothing was written."""
    FULL = "full"
    """No room or no leave to write; stores answer so for a short while."""
    FAILED = "failed"


class TierCounters(msgspec.Struct):
    """Counts since the start. Keys asked, parts moved, and what went wrong."""

    asked: int = 0
    found: int = 0
    loaded: int = 0
    loaded_bytes: int = 0
    missing: int = 0
    load_failed: int = 0
    rejected: int = 0
    """Records of a wrong mark, key or length."""
    stored: int = 0
    stored_bytes: int = 0
    present: int = 0
    full: int = 0
    store_failed: int = 0
    deleted: int = 0
    evicted: int = 0
    late: int = 0
    """Parts whose turn came after the deadline."""
    failures: int = 0
    """Times that the tier was found down."""


class TierHealth(msgspec.Struct, frozen=True):
    """State of a tier for people and metrics. Times are Unix seconds."""

    name: str
    url: str
    """Without its secrets."""
    up: bool
    since: float
    last_error: str
    """Of the last failure, also after it is over; empty while there was none."""
    used_bytes: int | None
    max_bytes: int | None
    counters: TierCounters


class Tier(Protocol):
    """A place for parts beyond L1. All methods may be called from any thread."""

    @property
    def name(self) -> str:
        """Unique among the tiers of a server; given in the URL or made from it."""

    @property
    def timeout_s(self) -> float:
        """Every future is done this long after the call."""

    def attach(self, name: str, arena: Bytes) -> None:
        """Learn of the shared memory that most buffers lie in, before first use.

        A tier MAY use it (registered memory) and MUST work without it.
        """

    def contains(self, keys: Sequence[PartKey]) -> Future[list[bool]]:
        """Say which keys are there; one round trip however many there are."""

    def load(self, slots: Sequence[LoadItem]) -> Future[list[LoadResult]]:
        """Fill the slots; one outcome each, in their order."""

    def store(self, blobs: Sequence[StoreItem]) -> Future[list[StoreResult]]:
        """Write the blobs that are not there; one outcome each, in their order."""

    def delete(self, keys: Sequence[PartKey]) -> Future[None]:
        """Remove the keys; those that are not there, or a tier that is down, pass."""

    def probe(self) -> None:
        """Have the store asked, behind the caller's back, for what `health` tells.

        One that is down is asked when its back-off is over, as by any other call.
        """

    def health(self) -> TierHealth:
        """Describe the state, from what is known without asking the store.

        A tier that has not answered anything yet is not up.
        """

    def close(self) -> None:
        """End what is under way (within `timeout_s`) and let go of the store.

        Whatever is asked afterwards is answered as by a tier that is down.
        """


# -- the record -------------------------------------------------------------------

_HEADER = struct.Struct("<4sHHQ16s16s")
_MAGIC = b"KVPt"
_VERSION = 1
HEADER_BYTES = _HEADER.size
"""Of every record, before the payload."""


def num_bytes_of(buffers: Sequence[memoryview]) -> int:
    """Return how many bytes the buffers have together."""
    return sum(buffer.nbytes for buffer in buffers)


def record_bytes(buffers: Sequence[memoryview]) -> int:
    """Return how many bytes the record of such a part has, header and payload."""
    return HEADER_BYTES + num_bytes_of(buffers)


def pack_header(blob: StoreItem) -> bytes:
    """Return the `HEADER_BYTES` that stand before a blob's payload in every store."""
    return _HEADER.pack(
        _MAGIC,
        _VERSION,
        0,
        num_bytes_of(blob.buffers),
        blob.checksum,
        _digest(blob.key),
    )


def read_header(header: bytes | memoryview, slot: LoadItem) -> Checksum | None:
    """Return the stored checksum; None when this is not the record of that slot."""
    if len(header) < HEADER_BYTES:
        return None
    magic, version, flags, length, checksum, digest = _HEADER.unpack_from(header)
    expected = (_MAGIC, _VERSION, 0, num_bytes_of(slot.buffers), _digest(slot.key))
    if (magic, version, flags, length, digest) != expected:
        return None
    return Checksum(checksum)


def _digest(key: PartKey) -> bytes:
    return xxhash.xxh3_128_digest(str(key).encode())
