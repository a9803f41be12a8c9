"""Limits on the bytes of L1 that one engine or cache salt keeps from eviction.

Leases and tickets pin chunks. One engine or salt pins at most a share of L1, all of
them together at most nine tenths, so that others always find room for their stores.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from math import inf
from time import monotonic

SHARE_OF_ALL = 0.9
"""Share of L1 that leases and tickets pin together."""
RECOUNT_PAUSE = 20
"""Pause between two exact counts for one owner, in durations of the first."""

EVERYONE = None
"""The owner of all pins."""

Owner = Hashable
"""The scope of an engine, `("salt", name)`, or `EVERYONE`."""


@dataclass(slots=True)
class _Pins:
    """Pins of one owner."""

    leased_bytes: int = 0
    """At least the bytes of the leased chunks: one in two leases may count twice."""
    num_leases: int = 0
    ticket_bytes: int = 0
    num_recounts: int = 0
    recount_after: float = -inf


@dataclass(frozen=True, slots=True)
class LeaseCharge:
    """What a lease was charged, with the number of recounts of each owner before."""

    owners: tuple[Owner, ...]
    num_bytes: int
    num_recounts: tuple[int, ...]


class PinLimits:
    """Pinned bytes by owner. Loop thread only.

    Charging a lease costs nothing per chunk. The chunks of an owner are counted exactly
    only where the sum of its leases would exceed its limit.
    """

    def __init__(
        self,
        l1_bytes: int,
        share: float,
        count_leased: Callable[[Owner], int],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._is_limited = share < 1
        self._share_bytes = int(l1_bytes * share)
        self._all_bytes = int(l1_bytes * SHARE_OF_ALL)
        self._count_leased = count_leased
        self._clock = clock
        self._pins: dict[Owner, _Pins] = {}
        self.num_limited = 0
        """Leases and tickets that were cut or refused."""

    def room(self, owners: Iterable[Owner], num_bytes: int) -> int:
        """Return how many of `num_bytes` may be pinned for all of these owners."""
        if not self._is_limited:
            return num_bytes
        allowed = num_bytes
        for owner in owners:
            limit = self._all_bytes if owner is EVERYONE else self._share_bytes
            pins = self._pins.get(owner)
            if pins is None:
                allowed = min(allowed, limit)
                continue
            used = pins.leased_bytes + pins.ticket_bytes
            if used + num_bytes > limit and self._clock() >= pins.recount_after:
                self._recount(owner, pins)
                used = pins.leased_bytes + pins.ticket_bytes
            allowed = min(allowed, limit - used)
        self.num_limited += allowed < num_bytes
        return max(allowed, 0)

    def _recount(self, owner: Owner, pins: _Pins) -> None:
        """Count an owner's leased chunks, which visits all of its leases."""
        start = self._clock()
        pins.leased_bytes = self._count_leased(owner)
        pins.num_recounts += 1
        end = self._clock()
        pins.recount_after = end + RECOUNT_PAUSE * (end - start)

    def add_lease(self, owners: tuple[Owner, ...], num_bytes: int) -> LeaseCharge:
        """Charge a lease to its owners."""
        counts = []
        for owner in owners:
            pins = self._pins.setdefault(owner, _Pins())
            pins.leased_bytes += num_bytes
            pins.num_leases += 1
            counts.append(pins.num_recounts)
        return LeaseCharge(owners, num_bytes, tuple(counts))

    def end_lease(self, charge: LeaseCharge) -> None:
        """End a lease's charge. What a recount has found stays until the next one."""
        for owner, num_recounts in zip(charge.owners, charge.num_recounts, strict=True):
            pins = self._pins[owner]
            pins.num_leases -= 1
            if not pins.num_leases:
                pins.leased_bytes = 0
            elif pins.num_recounts == num_recounts:
                pins.leased_bytes -= charge.num_bytes
            self._forget_empty(owner, pins)

    def add_ticket(self, owners: Iterable[Owner], num_bytes: int) -> None:
        """Charge a ticket to its owners."""
        for owner in owners:
            self._pins.setdefault(owner, _Pins()).ticket_bytes += num_bytes

    def end_ticket(self, owners: Iterable[Owner], num_bytes: int) -> None:
        """End a ticket's charge."""
        for owner in owners:
            pins = self._pins[owner]
            pins.ticket_bytes -= num_bytes
            self._forget_empty(owner, pins)

    def _forget_empty(self, owner: Owner, pins: _Pins) -> None:
        if not (pins.num_leases or pins.ticket_bytes):
            del self._pins[owner]


def owners_of(scope: bytes, salt: str | None) -> tuple[Owner, ...]:
    """Return the owners of a session's pins."""
    engine: tuple[Owner, ...] = (scope, EVERYONE)
    return engine if salt is None else (*engine, ("salt", salt))
