"""Server side of worker-driven transfers: RESERVE and HOLD issue tickets.

A ticket belongs to one client and ends exactly once: by COMMIT, ABORT or RELEASE, or
with the client's process. No deadline and no missed heartbeat ends it, since the worker
may still be writing to its parts or reading them.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Mapping
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from time import monotonic
from typing import Any, Generic, TypeVar

from kvcore.engine.engine import Engine
from kvcore.engine.pin_limits import owners_of
from kvcore.engine.registrations import Instance
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.transfers import HeldChunks, PendingStore, TransferPlan
from kvcore.errors import BadRequest, Overloaded, UnknownTicket
from kvcore.extensions import RequestService, ServiceHandler
from kvcore.extents import CHECKSUM_BYTES, Checksum
from kvcore.keys import scope_of
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
Work = TypeVar("Work", PendingStore, HeldChunks)

LOOP_CHUNKS = 32
"""Most chunks to reserve or hold on the loop thread, in 0.1 ms; more use a lane."""

KINDS = {PendingStore: "reserved", HeldChunks: "held"}


@dataclass(frozen=True, slots=True)
class Ticket(Generic[Work]):
    """Parts that a worker writes (`PendingStore`) or reads (`HeldChunks`)."""

    plan: TransferPlan
    work: Work
    num_bytes: int
    issued_at: float
    resources: ExitStack
    """Closed at the end: aborts or releases `work` and ends the use of the session."""

    def status(self) -> TicketStatus:
        """Describe the ticket, its parts and its age."""
        return TicketStatus(
            instance_id=self.work.instance.instance_id,
            request_id=self.plan.session.key.request_id,
            kind=KINDS[type(self.work)],
            num_parts=sum(map(len, self.work.places)),
            num_bytes=self.num_bytes,
            age_s=monotonic() - self.issued_at,
        )


class TicketService(RequestService):
    """Handlers of the ticket requests, and all live tickets. Loop thread only."""

    def __init__(self, engine: Engine, max_per_client: int) -> None:
        self._transfers = engine.transfers
        self._arena_name = engine.transfers.arena_name
        self._max_per_client = max_per_client
        self._limits = engine.leases.limits
        self._tickets: dict[Hashable, dict[int, Ticket[Any]]] = defaultdict(dict)
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

    def tickets(self, limit: int) -> tuple[TicketStatus, ...]:
        """Describe the `limit` oldest tickets."""
        live = chain.from_iterable(map(dict.values, self._tickets.values()))
        oldest = sorted(live, key=attrgetter("issued_at"))[:limit]
        return tuple(ticket.status() for ticket in oldest)

    def num_tickets(self) -> int:
        """Return the number of live tickets."""
        return sum(map(len, self._tickets.values()))

    # -- tickets ----------------------------------------------------------------------

    def _private_instance(self, instance_id: str, context: RequestContext) -> Instance:
        instance = self._transfers.instance(instance_id, context, private=True)
        self._check_room(context.client)
        return instance

    def _check_room(self, client: Hashable) -> None:
        if len(self._tickets[client]) >= self._max_per_client:
            raise Overloaded(
                f"{self._max_per_client} tickets of this client are neither "
                "committed, aborted nor released"
            )

    def _issue(
        self,
        client: Hashable,
        plan: TransferPlan,
        work: Work,
        end: Callable[[Work], None],
    ) -> int:
        """Issue a ticket; return its number, which no run of a server uses again.

        Raises:
            UnknownInstance: the instance was unregistered meanwhile.
            Overloaded: concurrent requests have used up the client's tickets, or the
                engine's share of L1.
        """
        with plan.session_use.pop_all() as resources:
            resources.callback(end, work)
            self._transfers.check_registered(work.instance)
            self._check_room(client)
            num_bytes = _num_bytes(work)
            session = plan.session
            owners = owners_of(scope_of(session.key), session.owner.salt)
            if self._limits.room(owners, num_bytes) < num_bytes:
                raise Overloaded(
                    f"{num_bytes} bytes more would exceed this engine's share of L1 "
                    "for leases and tickets, l1.engine_share"
                )
            self._limits.add_ticket(owners, num_bytes)
            resources.callback(self._limits.end_ticket, owners, num_bytes)
            number = secrets.randbits(63) | 1
            self._tickets[client][number] = Ticket(
                plan, work, num_bytes, monotonic(), resources.pop_all()
            )
        return number

    def _take(self, client: Hashable, number: int, kind: type[Work]) -> Ticket[Work]:
        """Remove a client's ticket and return it.

        Raises:
            UnknownTicket: it has ended, is another client's, or of another kind.
        """
        ticket = self._tickets[client].get(number)
        if ticket is None:
            raise UnknownTicket(f"ticket {number} has ended or is not this client's")
        if not isinstance(ticket.work, kind):
            raise UnknownTicket(f"ticket {number} is not of kind {KINDS[kind]!r}")
        del self._tickets[client][number]
        return ticket

    def _end_client(self, client: Hashable) -> None:
        for ticket in self._tickets.pop(client, {}).values():
            ticket.resources.close()

    # -- stores -----------------------------------------------------------------------

    def reserve(
        self, request: Reserve, context: RequestContext
    ) -> Generator[None, None, DeferredReply | ReserveReply]:
        """Reserve the parts of a store; the reply contains their locations."""
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
            counts = write.stored.num_present, write.stored.num_dropped
            if not write.reservations:
                self._transfers.count_store(write.stored)
                return ReserveReply(None, self._arena_name, (), *counts)
            number = self._issue(context.client, plan, write, self._transfers.abort)
            return ReserveReply(number, self._arena_name, write.places, *counts)

        return DeferredReply(future, make_reply, plan.session_use)

    def commit(self, request: Commit, context: RequestContext) -> StoreReply:
        """Make the parts that a worker wrote readable, or abort them."""
        ticket = self._take(context.client, request.ticket, PendingStore)
        # After a commit, closing the ticket's resources aborts nothing.
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
        """Free the parts that a worker will not write."""
        self._take(context.client, request.ticket, PendingStore).resources.close()
        return Done()

    # -- retrieves --------------------------------------------------------------------

    def hold(
        self, request: Hold, context: RequestContext
    ) -> Generator[None, None, DeferredReply | HoldReply]:
        """Hold the parts of a retrieve; the reply contains their locations."""
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
            number = self._issue(context.client, plan, read, self._transfers.release)
            return HoldReply(number, self._arena_name, read.places)

        return DeferredReply(future, make_reply, plan.session_use)

    def release(self, request: Release, context: RequestContext) -> RetrieveReply:
        """End the hold on parts that a worker has read, or will not read."""
        ticket = self._take(context.client, request.ticket, HeldChunks)
        with ticket.resources:
            if request.wrong:
                self._transfers.report_corrupt(ticket.work, request.wrong)
        if request.num_bytes is None:
            return RetrieveReply(0)
        return self._transfers.count_retrieve(ticket.plan, request.num_bytes)


def _num_bytes(work: PendingStore | HeldChunks) -> int:
    parts = chain.from_iterable(work.places)
    return sum(extent.length for part in parts for extent in part.extents)


def run(lane: Executor, num_chunks: int, call: Callable[[], T]) -> Future[T]:
    """Run a short call on this thread and a longer one on a lane."""
    return run_here(call) if num_chunks <= LOOP_CHUNKS else lane.submit(call)


def run_here(call: Callable[[], T]) -> Future[T]:
    """Run a call on this thread; return a completed future, as a lane does."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except Exception as error:  # noqa: BLE001 - raised where the result is read
        future.set_exception(error)
    return future
