"""Tickets: what workers copy themselves, from RESERVE or HOLD to its one end.

A ticket is its client's alone and ends exactly once: by what the worker says, or with
the worker's process. Nothing else ends it, no deadline and no silence: until then the
worker may be writing to the parts, or reading them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Generic, TypeVar

from kvcore.engine.transfers import HeldChunks, PendingStore, StoreCounts
from kvcore.errors import Overloaded, UnknownTicket
from kvcore.protocol import RetrieveReply, StoreReply
from kvcore.status import TicketStatus

ResultT = TypeVar("ResultT")
ReplyT = TypeVar("ReplyT")


@dataclass(frozen=True, slots=True)
class TicketTerms(Generic[ResultT, ReplyT]):
    """Whose a ticket is, and what its end settles.

    `settle` makes the reply of a good end; `leave` is called at every end.
    """

    client: Hashable
    request_id: str
    settle: Callable[[ResultT], ReplyT]
    leave: Callable[[], None]


@dataclass(frozen=True, slots=True)
class WriteTicket:
    """Parts that a worker fills; settled with what became of them."""

    work: PendingStore
    terms: TicketTerms[StoreCounts, StoreReply]


@dataclass(frozen=True, slots=True)
class ReadTicket:
    """Parts that a worker reads; settled with the bytes that it copied."""

    work: HeldChunks
    terms: TicketTerms[int, RetrieveReply]


TicketT = TypeVar("TicketT", WriteTicket, ReadTicket)


@dataclass(frozen=True, slots=True)
class _LiveTicket:
    ticket: WriteTicket | ReadTicket
    begun_at: float


class TicketTable:
    """All live tickets, oldest first. Loop thread only."""

    def __init__(
        self, max_per_client: int, clock: Callable[[], float] = monotonic
    ) -> None:
        self._max_per_client = max_per_client
        self._clock = clock
        self._live: dict[int, _LiveTicket] = {}
        self._num_of: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._live)

    def check_room(self, client: Hashable) -> None:
        """Refuse a client that has as many as it may have; `Overloaded`."""
        if self._num_of.get(client, 0) >= self._max_per_client:
            raise Overloaded(
                f"{self._max_per_client} tickets of this client are neither "
                "committed, aborted nor released"
            )

    def add(self, ticket: WriteTicket | ReadTicket) -> int:
        """Enter a ticket; return its number, which no run of a server uses again.

        Raises:
            Overloaded: as of `check_room`, which others may have passed meanwhile.
        """
        self.check_room(ticket.terms.client)
        number = secrets.randbits(63) | 1
        self._live[number] = _LiveTicket(ticket, self._clock())
        self._num_of[ticket.terms.client] = self._num_of.get(ticket.terms.client, 0) + 1
        return number

    def take(self, client: Hashable, number: int, kind: type[TicketT]) -> TicketT:
        """End a client's ticket and return it.

        Raises:
            UnknownTicket: it has ended, is another client's, or of another kind.
        """
        live = self._live.get(number)
        if live is None or live.ticket.terms.client != client:
            raise UnknownTicket(f"ticket {number} has ended or is not this client's")
        if not isinstance(live.ticket, kind):
            raise UnknownTicket(
                f"ticket {number} is not one of {kind.__name__.lower()}"
            )
        self._drop(number)
        return live.ticket

    def of_client(self, client: Hashable) -> list[WriteTicket | ReadTicket]:
        """End all of a client that is gone and return them."""
        numbers = [
            n for n, live in self._live.items() if live.ticket.terms.client == client
        ]
        return [self._drop(number) for number in numbers]

    def _drop(self, number: int) -> WriteTicket | ReadTicket:
        ticket = self._live.pop(number).ticket
        left = self._num_of.pop(ticket.terms.client) - 1
        if left:
            self._num_of[ticket.terms.client] = left
        return ticket

    def status(self, limit: int) -> tuple[TicketStatus, ...]:
        """Describe the `limit` oldest."""
        limit = min(limit, len(self._live))
        return tuple(map(self._describe, islice(self._live.values(), limit)))

    def _describe(self, live: _LiveTicket) -> TicketStatus:
        ticket = live.ticket
        extents = [
            extent
            for parts in ticket.work.places
            for place in parts
            for extent in place.extents
        ]
        return TicketStatus(
            instance_id=ticket.work.instance.instance_id,
            request_id=ticket.terms.request_id,
            kind="reserved" if isinstance(ticket, WriteTicket) else "held",
            num_parts=sum(map(len, ticket.work.places)),
            num_bytes=sum(extent.length for extent in extents),
            age_s=self._clock() - live.begun_at,
        )
