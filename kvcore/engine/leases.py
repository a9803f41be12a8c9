"""Leases: the right of a session's ranks to read chunks until a deadline.

A lease belongs to a session and holds the leading chunks of its prompt, with the
ranks that still have to read each. It ends exactly once; `LeaseTable.num_granted` is
always the sum of `num_ended` and the live ones.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice, pairwise
from typing import NewType

from kvcore.engine.pin_limits import EVERYONE, LeaseCharge, Owner, PinLimits, owners_of
from kvcore.keys import SessionKey, scope_of
from kvcore.status import LeaseStatus
from kvcore.storage.l1 import L1, Chunk

LeaseNumber = NewType("LeaseNumber", int)
"""Distinguishes a session's lease from its later ones."""

_ALL_RANKS = -1
"""The mask with every bit set."""


class EndReason(Enum):
    """Why a lease ended."""

    READ = "read"
    """Every rank has read every chunk."""
    RELEASED = "released"
    SESSION_END = "session_end"
    EXPIRED = "expired"
    REPLACED = "replaced"
    """A later lookup of the session granted another."""
    CLIENT_GONE = "client_gone"
    """The client that looked up ended, or the last worker that had not read."""


@dataclass(slots=True, frozen=True)
class _LeasedRange:
    """Chunks [start, end) of a lease that wait for the same ranks."""

    start: int
    end: int
    waiting: int


@dataclass(slots=True, eq=False)
class _Lease:
    """Ranges are ordered, disjoint, and have readers; chunks outside are released."""

    number: LeaseNumber
    owner: SessionKey
    model: str
    client: Hashable
    chunks: Sequence[Chunk]
    runs: list[_LeasedRange]
    granted_at: float
    deadline: float
    chunk_bytes: int
    charge: LeaseCharge


class LeaseTable:
    """All live leases, at most one per session. Loop thread only.

    The chunks are held in L1, so they are not evicted. Readers are kept per range of
    chunks, so a read of a whole lease does not loop over its chunks.
    """

    def __init__(
        self,
        l1: L1,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        on_expired: Callable[[SessionKey, int, float], None] | None = None,
        share: float = 1.0,
    ) -> None:
        self._l1 = l1
        self._ttl_s = ttl_s
        self._clock = clock
        self._on_expired = on_expired
        """Called with the owner, the number of leased chunks, and the age in s."""
        # In the order of granting, which is that of deadlines. A plain dict would
        # walk over its deleted entries to find the first.
        self._leases: OrderedDict[SessionKey, _Lease] = OrderedDict()
        self._by_client: dict[Hashable, dict[SessionKey, None]] = {}
        self.limits = PinLimits(
            l1.stats().total_bytes, share, self._count_leased, clock
        )
        self.num_granted = 0
        self.num_ended = dict.fromkeys(EndReason, 0)

    def __len__(self) -> int:
        return len(self._leases)

    def fit(
        self, owner: SessionKey, salt: str | None, chunk_bytes: int, count: int
    ) -> int:
        """Return how many of `count` held chunks the owner's share of L1 allows.

        The session's earlier lease ends: the caller is about to grant another.
        """
        earlier = self._leases.get(owner)
        if earlier is not None:
            self._end(earlier, EndReason.REPLACED)
        owners = owners_of(scope_of(owner), salt)
        allowed = self.limits.room(owners, count * chunk_bytes)
        return allowed // chunk_bytes if chunk_bytes else count

    def grant(
        self,
        owner: SessionKey,
        model: str,
        chunks: list[Chunk],
        readers: int,
        client: Hashable,
        salt: str | None = None,
        chunk_bytes: int = 0,
    ) -> LeaseNumber | None:
        """Lease acquired chunks to a mask of ranks; return the lease's number.

        Takes over the caller's hold. The session's earlier lease ends under that hold,
        so chunks of both are never free in between. Without chunks or readers there is
        no lease, and the hold ends. `chunk_bytes` and the
        owner's cache salt are for the limits of its share, see `fit`.
        """
        earlier = self._leases.get(owner)
        if earlier is not None:
            self._end(earlier, EndReason.REPLACED)
        owners = owners_of(scope_of(owner), salt)
        if not chunks or not readers:
            self._l1.release(chunks)
            return None
        now = self._clock()
        runs = [_LeasedRange(0, len(chunks), readers)]
        self.num_granted += 1
        number = LeaseNumber(self.num_granted)
        self._leases[owner] = _Lease(
            number,
            owner,
            model,
            client,
            chunks,
            runs,
            now,
            now + self._ttl_s,
            chunk_bytes,
            self.limits.add_lease(owners, len(chunks) * chunk_bytes),
        )
        self._by_client.setdefault(client, {})[owner] = None
        return number

    def number(self, owner: SessionKey) -> LeaseNumber | None:
        """Return the number of a session's lease, None without one."""
        lease = self._leases.get(owner)
        return lease.number if lease is not None else None

    def read(self, owner: SessionKey, start: int, end: int, rank: int) -> None:
        """Remove a rank from the readers of the chunks [start, end)."""
        self._take(owner, start, end, 1 << rank, EndReason.READ)

    def free(self, owner: SessionKey, start: int, end: int) -> None:
        """End the lease on the chunks [start, end), for all readers."""
        self._take(owner, start, end, _ALL_RANKS, EndReason.RELEASED)

    def end(self, owner: SessionKey) -> None:
        """End a session's lease, if it has one."""
        lease = self._leases.get(owner)
        if lease is not None:
            self._end(lease, EndReason.SESSION_END)

    def end_client(self, client: Hashable) -> None:
        """End every lease that was granted to a client that ended."""
        for owner in list(self._by_client.get(client, ())):
            self._end(self._leases[owner], EndReason.CLIENT_GONE)

    def drop_reader(self, scope: bytes, engine_id: str, rank: int) -> None:
        """Remove an engine's worker that ended from its leases. Visits every lease."""
        engine = scope, engine_id
        owners = [
            owner
            for owner in self._leases
            if (scope_of(owner), owner.engine_id) == engine
        ]
        for owner in owners:
            end = len(self._leases[owner].chunks)
            self._take(owner, 0, end, 1 << rank, EndReason.CLIENT_GONE)

    def expire(self) -> int:
        """End the leases past their deadline; return their number."""
        now = self._clock()
        num_expired = 0
        while self._leases:
            lease = self._leases[next(iter(self._leases))]
            if lease.deadline > now:
                break
            if self._on_expired is not None:
                num_chunks = sum(run.end - run.start for run in lease.runs)
                self._on_expired(lease.owner, num_chunks, now - lease.granted_at)
            self._end(lease, EndReason.EXPIRED)
            num_expired += 1
        return num_expired

    def next_deadline(self) -> float | None:
        """Return the earliest deadline, on the table's clock."""
        for lease in self._leases.values():
            return lease.deadline
        return None

    def status(self, limit: int) -> list[LeaseStatus]:
        """Describe the `limit` oldest leases."""
        now = self._clock()
        limit = min(limit, len(self._leases))
        return [_describe(lease, now) for lease in islice(self._leases.values(), limit)]

    def _take(
        self, owner: SessionKey, start: int, end: int, ranks: int, reason: EndReason
    ) -> None:
        """Remove a mask of ranks from the readers of the chunks [start, end)."""
        lease = self._leases.get(owner)
        if lease is None or start >= end:
            return
        kept: list[_LeasedRange] = []
        done: list[_LeasedRange] = []
        for run in lease.runs:
            for piece in _split(run, start, end):
                inside = start <= piece.start and piece.end <= end
                waiting = piece.waiting & ~ranks if inside else piece.waiting
                if waiting:
                    _append(kept, _LeasedRange(piece.start, piece.end, waiting))
                else:
                    done.append(piece)
        lease.runs = kept
        self._release(lease, done)
        if not kept:
            self._forget(lease, reason)

    def _end(self, lease: _Lease, reason: EndReason) -> None:
        self._release(lease, lease.runs)
        self._forget(lease, reason)

    def _release(self, lease: _Lease, runs: list[_LeasedRange]) -> None:
        # Last range first: L1 touches released chunks; leaves are evicted first.
        for run in reversed(runs):
            self._l1.release(lease.chunks[run.start : run.end])

    def _forget(self, lease: _Lease, reason: EndReason) -> None:
        del self._leases[lease.owner]
        owners = self._by_client[lease.client]
        del owners[lease.owner]
        if not owners:
            del self._by_client[lease.client]
        self.limits.end_lease(lease.charge)
        self.num_ended[reason] += 1

    def _count_leased(self, owner: Owner) -> int:
        """Return the bytes of the distinct chunks that an owner's leases hold."""
        seen: set[Chunk] = set()
        num_bytes = 0
        for lease in self._leases.values():
            if owner is EVERYONE or owner in lease.charge.owners:
                num_before = len(seen)
                for run in lease.runs:
                    seen.update(lease.chunks[run.start : run.end])
                num_bytes += (len(seen) - num_before) * lease.chunk_bytes
        return num_bytes


def _split(run: _LeasedRange, start: int, end: int) -> list[_LeasedRange]:
    """Split a range at `start` and `end`."""
    cuts = [cut for cut in (start, end) if run.start < cut < run.end]
    edges = [run.start, *cuts, run.end]
    return [_LeasedRange(a, b, run.waiting) for a, b in pairwise(edges)]


def _append(runs: list[_LeasedRange], run: _LeasedRange) -> None:
    """Append a range; merge it with the last if their readers are equal."""
    last = runs[-1] if runs else None
    if last and last.end == run.start and last.waiting == run.waiting:
        runs[-1] = _LeasedRange(last.start, run.end, run.waiting)
    else:
        runs.append(run)


def _describe(lease: _Lease, now: float) -> LeaseStatus:
    waiting = 0
    for run in lease.runs:
        waiting |= run.waiting
    ranks = range(waiting.bit_length())
    return LeaseStatus(
        engine_id=lease.owner.engine_id,
        request_id=lease.owner.request_id,
        model=lease.model,
        num_chunks=sum(run.end - run.start for run in lease.runs),
        waiting_readers=tuple(rank for rank in ranks if waiting >> rank & 1),
        age_s=now - lease.granted_at,
        expires_in_s=lease.deadline - now,
    )
