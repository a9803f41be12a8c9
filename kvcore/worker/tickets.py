"""Transfers by workers that copy their own caches: RESERVE and HOLD hand out tickets.

A ticket belongs to one client and ends exactly once: by COMMIT, ABORT or RELEASE, or
with the client's process. Deadlines and silence do not end it: until then the worker
may be writing to the parts, or reading them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Hashable, Mapping
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from time import monotonic
from typing import Any, ClassVar, TypeVar

from kvcore.engine.engine import Engine
from kvcore.engine.registrations import Instance
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.transfers import HeldChunks, PendingStore, TransferPlan
from kvcore.errors import BadRequest, Overloaded, UnknownTicket
from kvcore.extensions import ServiceHandler
from kvcore.extents import CHECKSUM_BYTES, Checksum
from kvcore.protocol import (
    Abort,
    Commit,
    Done,
    Hold,
    HoldReply,
    Release,
    Request,
    Reserve,
    ReserveReply,
    RetrieveReply,
    StoreReply,
)
from kvcore.status import TicketStatus

T = TypeVar("T")

LOOP_CHUNKS = 32
"""Most chunks reserved or held on the loop thread, in 0.1 ms; more go to a lane."""


@dataclass(frozen=True, slots=True)
class StoreTicket:
    """Reserved parts that a worker fills."""

    kind: ClassVar[str] = "reserved"

    client: Hashable
    plan: TransferPlan
    work: PendingStore
    begun_at: float
    resources: ExitStack = field(default_factory=ExitStack)
    """Closed at the end: aborts what is not committed, ends the use of the session."""


@dataclass(frozen=True, slots=True)
class RetrieveTicket:
    """Held parts that a worker reads."""

    kind: ClassVar[str] = "held"

    client: Hashable
    plan: TransferPlan
    work: HeldChunks
    begun_at: float
    resources: ExitStack = field(default_factory=ExitStack)
    """Closed at the end: ends the hold and the use of the session."""


TicketT = TypeVar("TicketT", StoreTicket, RetrieveTicket)


class TicketTable:
    """All live tickets, oldest first. Loop thread only."""

    def __init__(self, max_per_client: int) -> None:
        self._max_per_client = max_per_client
        self._live: dict[int, StoreTicket | RetrieveTicket] = {}
        self._num_of_client: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._live)

    def check_room(self, client: Hashable) -> None:
        """Raise `Overloaded` if a client has as many tickets as it may have."""
        if self._num_of_client.get(client, 0) >= self._max_per_client:
            raise Overloaded(
                f"{self._max_per_client} tickets of this client are neither "
                "committed, aborted nor released"
            )

    def add(self, ticket: StoreTicket | RetrieveTicket) -> int:
        """Enter a ticket; return its number, which no run of a server uses again.

        Raises:
            Overloaded: as `check_room`, which earlier requests may have passed too.
        """
        self.check_room(ticket.client)
        number = secrets.randbits(63) | 1
        self._live[number] = ticket
        self._num_of_client[ticket.client] = (
            self._num_of_client.get(ticket.client, 0) + 1
        )
        return number

    def take(self, client: Hashable, number: int, kind: type[TicketT]) -> TicketT:
        """Remove a client's ticket and return it.

        Raises:
            UnknownTicket: it has ended, is another client's, or of another kind.
        """
        ticket = self._live.get(number)
        if ticket is None or ticket.client != client:
            raise UnknownTicket(f"ticket {number} has ended or is not this client's")
        if not isinstance(ticket, kind):
            raise UnknownTicket(f"ticket {number} is not of kind {kind.kind!r}")
        self._remove(number)
        return ticket

    def take_all(self, client: Hashable) -> list[StoreTicket | RetrieveTicket]:
        """Remove all of a client's tickets and return them."""
        live = self._live.items()
        numbers = [number for number, ticket in live if ticket.client == client]
        return [self._remove(number) for number in numbers]

    def _remove(self, number: int) -> StoreTicket | RetrieveTicket:
        ticket = self._live.pop(number)
        remaining = self._num_of_client.pop(ticket.client) - 1
        if remaining:
            self._num_of_client[ticket.client] = remaining
        return ticket

    def status(self, limit: int) -> tuple[TicketStatus, ...]:
        """Describe the `limit` oldest."""
        limit = min(limit, len(self._live))
        return tuple(map(_describe, islice(self._live.values(), limit)))


class TicketRequests:
    """Handlers of the ticket requests, over an engine. Loop thread only."""

    def __init__(self, engine: Engine, max_tickets: int) -> None:
        self._transfers = engine.transfers
        self._arena_name = engine.transfers.arena_name
        self.table = TicketTable(max_tickets)
        engine.hooks.client_end.append(self._end_client)

    def handlers(self) -> Mapping[type[Request[Any]], ServiceHandler]:
        """Return the handler of each ticket request."""
        return {
            Reserve: self.reserve,
            Commit: self.commit,
            Abort: self.abort,
            Hold: self.hold,
            Release: self.release,
        }

    def counters(self) -> dict[str, int]:
        """Return none: the engine counts these stores and retrieves."""
        return {}

    def tickets(self, limit: int) -> tuple[TicketStatus, ...]:
        """Describe the `limit` oldest tickets."""
        return self.table.status(limit)

    def num_tickets(self) -> int:
        """Return the number of live tickets."""
        return len(self.table)

    def close(self) -> None:
        """Do nothing: a ticket holds no more than the engine's own memory."""

    def _private_instance(self, instance_id: str, context: RequestContext) -> Instance:
        instance = self._transfers.instance(instance_id, context, private=True)
        self.table.check_room(context.client)
        return instance

    # -- stores -----------------------------------------------------------------------

    def reserve(
        self, request: Reserve, context: RequestContext
    ) -> Generator[None, None, DeferredReply | ReserveReply]:
        """Reserve the parts of a store; the reply names where they lie."""
        instance = self._private_instance(request.store.instance_id, context)
        plan = yield from self._transfers.plan_store(request.store, instance)
        if plan is None:
            return ReserveReply(None, self._arena_name, (), 0, 0)
        hashes = plan.hashes
        reserve = partial(
            self._transfers.reserve,
            instance,
            hashes,
            plan.blocks,
            context.deadline_ns,
            plan.session.owner,
            plan.prefix,
        )
        future = run(instance.store_lane, len(hashes), reserve)

        def make_reply() -> ReserveReply:
            write = self._transfers.result(future)
            if not write.reservations:
                done = self._transfers.count_store(write.stored)
                counts = done.num_present, done.num_dropped
                return ReserveReply(None, self._arena_name, (), *counts)
            with plan.session_use.pop_all() as resources:
                resources.callback(self._transfers.abort, write)
                self._transfers.check_registered(instance)
                ticket = StoreTicket(context.client, plan, write, monotonic())
                number = self.table.add(ticket)
                ticket.resources.push(resources.pop_all())
            counts = write.stored.num_present, write.stored.num_dropped
            return ReserveReply(number, self._arena_name, write.places, *counts)

        return DeferredReply(future, make_reply, plan.session_use)

    def commit(self, request: Commit, context: RequestContext) -> StoreReply:
        """Make the parts that a worker wrote readable, or abort them."""
        ticket = self.table.take(context.client, request.ticket, StoreTicket)
        # After a commit nothing is left that closing the ticket could abort.
        with ticket.resources:
            self._transfers.check_registered(ticket.work.instance)
            checksums = self._read_checksums(request.checksums, ticket.work)
            commit = partial(self._transfers.commit, ticket.work, checksums)
            return self._transfers.count_store(self._transfers.result(run_here(commit)))

    def _read_checksums(
        self, packed: memoryview, write: PendingStore
    ) -> list[Checksum]:
        needed = len(write.reservations) if self._transfers.checksums else 0
        if len(packed) != needed * CHECKSUM_BYTES:
            raise BadRequest(
                f"checksums: {len(packed)} bytes, but {needed} parts need "
                f"{CHECKSUM_BYTES} each"
            )
        return [
            Checksum(bytes(packed[first : first + CHECKSUM_BYTES]))
            for first in range(0, len(packed), CHECKSUM_BYTES)
        ]

    def abort(self, request: Abort, context: RequestContext) -> Done:
        """Give back the parts that a worker will not write."""
        self.table.take(context.client, request.ticket, StoreTicket).resources.close()
        return Done()

    # -- retrieves --------------------------------------------------------------------

    def hold(
        self, request: Hold, context: RequestContext
    ) -> Generator[None, None, DeferredReply | HoldReply]:
        """Hold the parts of a retrieve; the reply names where they lie."""
        instance = self._private_instance(request.retrieve.instance_id, context)
        plan = yield from self._transfers.plan_retrieve(request.retrieve, instance)
        if plan is None:
            return HoldReply(None, self._arena_name, ())
        hashes = plan.hashes
        hold = partial(
            self._transfers.hold,
            instance,
            hashes,
            plan.blocks,
            plan.tokens,
            context.deadline_ns,
        )
        future = run(instance.retrieve_lane, len(hashes), hold)

        def make_reply() -> HoldReply:
            read = self._transfers.result(future)
            with plan.session_use.pop_all() as resources:
                resources.callback(self._transfers.release, read)
                self._transfers.check_registered(instance)
                ticket = RetrieveTicket(context.client, plan, read, monotonic())
                number = self.table.add(ticket)
                ticket.resources.push(resources.pop_all())
            return HoldReply(number, self._arena_name, read.places)

        return DeferredReply(future, make_reply, plan.session_use)

    def release(self, request: Release, context: RequestContext) -> RetrieveReply:
        """End the hold on parts that a worker has read, or will not read."""
        ticket = self.table.take(context.client, request.ticket, RetrieveTicket)
        with ticket.resources:
            if request.wrong:
                self._transfers.report_corrupt(ticket.work, request.wrong)
        if request.num_bytes is None:
            return RetrieveReply(0)
        return self._transfers.count_retrieve(ticket.plan, request.num_bytes)

    def _end_client(self, client: Hashable) -> None:
        for ticket in self.table.take_all(client):
            ticket.resources.close()


def run(lane: Executor, num_chunks: int, call: Callable[[], T]) -> Future[T]:
    """Run a short call here and a longer one on a lane."""
    return run_here(call) if num_chunks <= LOOP_CHUNKS else lane.submit(call)


def run_here(call: Callable[[], T]) -> Future[T]:
    """Run a call at once; return its outcome as a lane would."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except Exception as error:  # noqa: BLE001 - raised where the result is read
        future.set_exception(error)
    return future


def _describe(ticket: StoreTicket | RetrieveTicket) -> TicketStatus:
    parts = [place for places in ticket.work.places for place in places]
    return TicketStatus(
        instance_id=ticket.work.instance.instance_id,
        request_id=ticket.plan.session.key.request_id,
        kind=ticket.kind,
        num_parts=len(parts),
        num_bytes=sum(extent.length for part in parts for extent in part.extents),
        age_s=monotonic() - ticket.begun_at,
    )
