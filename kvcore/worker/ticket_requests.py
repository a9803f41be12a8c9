"""The requests of workers that copy themselves: room and holds are handed out.

Composed of the engine: the same plans and the same legs of the same `Copier`, but for
the one between, which is the worker's. Who hands out, here or in blend, gives the
terms; one table of tickets settles them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from kvcore.engine.engine import Engine
from kvcore.engine.instance import Instance
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.transfers import HeldChunks, PendingStore, StoreCounts
from kvcore.errors import BadRequest
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
from kvcore.worker.tickets import ReadTicket, TicketTable, TicketTerms, WriteTicket

T = TypeVar("T")

LOOP_CHUNKS = 32
"""Reserved or held in the loop itself, in 0.1 ms; more on the instance's lane."""


class TicketRequests:
    """Hands out what private instances copy. The loop thread calls it."""

    def __init__(self, engine: Engine, max_tickets: int) -> None:
        self._engine = engine
        self._copier = engine.copier
        self._arena = engine.arena.name
        self.table = TicketTable(max_tickets)
        engine.on_client_gone.append(self._client_gone)

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

    def private(self, instance_id: str, caller: RequestContext) -> Instance:
        """Return an instance whose worker copies, if the client may have more."""
        instance = self._engine.registry.get(caller.client, instance_id)
        if not instance.is_private:
            raise BadRequest(
                f"instance {instance_id!r} is not private: the server copies, by "
                "STORE and RETRIEVE"
            )
        self.table.check_room(caller.client)
        return instance

    # -- stores -----------------------------------------------------------------------

    def reserve(
        self, request: Reserve, caller: RequestContext
    ) -> Generator[None, None, DeferredReply | ReserveReply]:
        """Make room for what a store would copy."""
        store, engine = request.store, self._engine
        instance = self.private(store.instance_id, caller)
        plan = yield from engine.planner.store(store, instance)
        if plan is None:
            return ReserveReply(None, self._arena, (), 0, 0)
        terms = TicketTerms(
            caller.client,
            store.session.request_id,
            engine.count_store,
            plan.session_use.close,
        )
        return self.hand_out(
            terms,
            instance,
            len(plan.hashes),
            partial(
                self._copier.reserve,
                instance,
                plan.hashes,
                plan.blocks,
                caller.deadline_ns,
                plan.session.owner,
                plan.prefix,
            ),
        )

    def hand_out(
        self,
        terms: TicketTerms[StoreCounts, StoreReply],
        instance: Instance,
        num_chunks: int,
        reserve: Callable[[], PendingStore],
    ) -> DeferredReply:
        """Reserve, and answer with a ticket for it."""
        future = run(instance.store_lane, num_chunks, reserve)

        def finish() -> ReserveReply:
            with ExitStack() as ending:
                ending.callback(terms.leave)
                write = self._engine.result(future)
                if not write.reservations:
                    reply = terms.settle(write.stored)
                    present, dropped = reply.num_present, reply.num_dropped
                    return ReserveReply(None, self._arena, (), present, dropped)
                ending.callback(self._copier.abort, write)
                self._engine.registry.check_registered(instance)
                number = self.table.add(WriteTicket(write, terms))
                ending.pop_all()
            stored = write.stored
            return ReserveReply(
                number,
                self._arena,
                write.places,
                stored.num_present,
                stored.num_dropped,
            )

        return DeferredReply(future, finish)

    def commit(self, request: Commit, caller: RequestContext) -> StoreReply:
        """Make readable what a worker wrote, or abort it."""
        ticket = self.table.take(caller.client, request.ticket, WriteTicket)
        write = ticket.work
        with ExitStack() as ending:
            ending.callback(ticket.terms.leave)
            # After a commit there is nothing left that it would abort.
            ending.callback(self._copier.abort, write)
            self._engine.registry.check_registered(write.instance)
            checksums = self._read_checksums(request.checksums, write)
            commit = partial(self._copier.commit, write, checksums)
            return ticket.terms.settle(self._engine.result(run_here(commit)))

    def _read_checksums(
        self, packed: memoryview, write: PendingStore
    ) -> list[Checksum]:
        needed = len(write.reservations) if self._copier.checksums else 0
        if len(packed) != needed * CHECKSUM_BYTES:
            raise BadRequest(
                f"checksums: {len(packed)} bytes, but {needed} parts need "
                f"{CHECKSUM_BYTES} each"
            )
        return [
            Checksum(bytes(packed[first : first + CHECKSUM_BYTES]))
            for first in range(0, len(packed), CHECKSUM_BYTES)
        ]

    def abort(self, request: Abort, caller: RequestContext) -> Done:
        """Take back what a worker will not write."""
        self._end(self.table.take(caller.client, request.ticket, WriteTicket))
        return Done()

    # -- retrieves --------------------------------------------------------------------

    def hold(
        self, request: Hold, caller: RequestContext
    ) -> Generator[None, None, DeferredReply | HoldReply]:
        """Hold what a retrieve would copy."""
        retrieve, engine = request.retrieve, self._engine
        instance = self.private(retrieve.instance_id, caller)
        plan = yield from engine.planner.retrieve(retrieve, instance)
        if plan is None:
            return HoldReply(None, self._arena, ())
        terms = TicketTerms(
            caller.client,
            retrieve.session.request_id,
            partial(engine.count_read, plan, engine.lease_of(plan)),
            plan.session_use.close,
        )
        return self.lend(
            terms,
            instance,
            len(plan.hashes),
            partial(
                self._copier.hold,
                instance,
                plan.hashes,
                plan.blocks,
                plan.tokens,
                caller.deadline_ns,
            ),
        )

    def lend(
        self,
        terms: TicketTerms[int, RetrieveReply],
        instance: Instance,
        num_chunks: int,
        hold: Callable[[], HeldChunks],
    ) -> DeferredReply:
        """Hold, and answer with a ticket for it."""
        future = run(instance.retrieve_lane, num_chunks, hold)

        def finish() -> HoldReply:
            with ExitStack() as ending:
                ending.callback(terms.leave)
                read = self._engine.result(future)
                ending.callback(self._copier.release, read)
                self._engine.registry.check_registered(instance)
                number = self.table.add(ReadTicket(read, terms))
                ending.pop_all()
            return HoldReply(number, self._arena, read.places)

        return DeferredReply(future, finish)

    def release(self, request: Release, caller: RequestContext) -> RetrieveReply:
        """Let go of what a worker has read, or will not read."""
        ticket = self.table.take(caller.client, request.ticket, ReadTicket)
        try:
            self._condemn(ticket.work, request.wrong)
        finally:
            self._end(ticket)
        if request.num_bytes is None:
            return RetrieveReply(0)
        return ticket.terms.settle(request.num_bytes)

    def _condemn(self, read: HeldChunks, wrong: tuple[int, ...]) -> None:
        if max(wrong, default=-1) >= len(read.chunks):
            raise BadRequest(f"wrong: there are only {len(read.chunks)} chunks")
        if wrong:
            self._engine.counters.retrieves_missing += 1
            self._copier.condemn(read, wrong)

    # -- ends -------------------------------------------------------------------------

    def _end(self, ticket: WriteTicket | ReadTicket) -> None:
        if isinstance(ticket, WriteTicket):
            self._copier.abort(ticket.work)
        else:
            self._copier.release(ticket.work)
        ticket.terms.leave()

    def _client_gone(self, client: Hashable) -> None:
        for ticket in self.table.of_client(client):
            self._end(ticket)


def run(lane: Executor, num_chunks: int, call: Callable[[], T]) -> Future[T]:
    """Run here what is short, and the rest on a lane."""
    return run_here(call) if num_chunks <= LOOP_CHUNKS else lane.submit(call)


def run_here(call: Callable[[], T]) -> Future[T]:
    """Run at once, with the outcome as a lane would give it."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
        future.set_exception(error)
    return future
