"""Ticket service under random orders of events: each ticket ends exactly once."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcore.config import L1Config, ServerConfig
from kvcore.engine.engine import Engine
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    DeadlineExceeded,
    Overloaded,
    UnknownInstance,
    UnknownTicket,
)
from kvcore.keys import SessionKey, pack_tokens
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import (
    Abort,
    Commit,
    EndSession,
    Hold,
    HoldReply,
    Private,
    RegisterKVCache,
    Release,
    Reserve,
    ReserveReply,
    Retrieve,
    Store,
)
from kvcore.storage.arena import Arena
from kvcore.worker.ticket_service import TicketService

CHUNK = 16
PART = 128
NUM_PAGES = 6
MAX_TICKETS = 4
CONFIG = ServerConfig(chunk_size=CHUNK, l1=L1Config(engine_share=1.0))
GROUP = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, 8), (PART, 8, 1)),))
WATCHED = {name: RequestContext(name, os.getpid(), is_watched=True) for name in "ab"}


def register(engine: Engine, name: str) -> None:
    """Register a client's private instance, named after the client."""
    request = RegisterKVCache(name, name, "m", 1, 0, (Private(4 * PART),), (GROUP,))
    reply = engine.register_kv_cache(request, WATCHED[name])
    assert reply.arena is not None


def finish_request(result: Any) -> Any:
    """Run a request to its end and return the reply."""
    if isinstance(result, Generator):
        try:
            while True:
                next(result)
        except StopIteration as stop:
            result = stop.value
    if isinstance(result, DeferredReply):
        assert result.future.done()
        return result.finish()
    return result


def transfer_fields(name: str, prompt: int, num_chunks: int) -> dict[str, Any]:
    """Return the fields that a store and a retrieve of a prompt's chunks share."""
    tokens = range(1000 * prompt, 1000 * prompt + num_chunks * CHUNK)
    return {
        "session": SessionKey(name, f"request-{prompt}"),
        "instance_id": name,
        "start": 0,
        "end": num_chunks * CHUNK,
        "blocks": (memoryview(pack_tokens(range(num_chunks))),),
        "tokens": memoryview(pack_tokens(tokens)),
    }


@dataclass
class IssuedTicket:
    """A live ticket and the pages that it names."""

    name: str
    kind: str
    pages: frozenset[int]
    is_stale: bool = False
    """Whether its instance was registered again since."""


class Tickets(RuleBasedStateMachine):
    """Two clients, more prompts than fit in L1, and a model of the tickets."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(NUM_PAGES * PART, PART, f"kvtest-{os.getpid()}-tickets")
        self.engine = Engine(CONFIG, self.arena)
        self.service = TicketService(self.engine, MAX_TICKETS)
        self.issued: dict[int, IssuedTicket] = {}
        self.ended: list[int] = []
        for name in "ab":
            register(self.engine, name)

    def teardown(self) -> None:
        """End both clients and check that nothing remains held or reserved."""
        for name in "ab":
            self.engine.end_client(name)
        stats = self.engine.l1.stats()
        assert (stats.num_reserved, stats.num_held) == (0, 0)
        assert self.service.num_tickets() == 0
        assert all(
            session.num_running == 0
            for session in self.engine.sessions._sessions.values()
        )
        self.engine.close()
        self.arena.close()

    def record_ticket(
        self, name: str, kind: str, reply: ReserveReply | HoldReply
    ) -> None:
        """Record a ticket from a reply."""
        if reply.ticket is None:
            assert reply.parts == ()
            return
        extents = [e for places in reply.parts for p in places for e in p.extents]
        pages = frozenset(extent.offset // PART for extent in extents)
        assert reply.ticket not in self.issued
        self.issued[reply.ticket] = IssuedTicket(name, kind, pages)

    def num_tickets(self, name: str) -> int:
        """Return the number of a client's live tickets."""
        return sum(issued.name == name for issued in self.issued.values())

    names = st.sampled_from("ab")
    prompts = st.integers(0, 3)
    counts = st.integers(1, 4)
    picks = st.integers(0, 7)

    @rule(name=names, prompt=prompts, count=counts)
    def reserve(self, name: str, prompt: int, count: int) -> None:
        """Reserve; a client with too many tickets is refused."""
        request = Reserve(Store(**transfer_fields(name, prompt, count)))
        if self.num_tickets(name) >= MAX_TICKETS:
            with pytest.raises(Overloaded):
                finish_request(self.service.reserve(request, WATCHED[name]))
            return
        reply = finish_request(self.service.reserve(request, WATCHED[name]))
        num_parts = sum(map(len, reply.parts))
        assert num_parts + reply.num_present + reply.num_dropped == count
        self.record_ticket(name, "reserved", reply)

    @rule(name=names, prompt=prompts, count=counts)
    def hold(self, name: str, prompt: int, count: int) -> None:
        """Hold, which succeeds if L1 has every chunk."""
        request = Hold(Retrieve(**transfer_fields(name, prompt, count)))
        if self.num_tickets(name) >= MAX_TICKETS:
            with pytest.raises(Overloaded):
                finish_request(self.service.hold(request, WATCHED[name]))
            return
        try:
            reply = finish_request(self.service.hold(request, WATCHED[name]))
        except ChunksMissing:
            return
        assert sum(map(len, reply.parts)) == count
        self.record_ticket(name, "held", reply)

    def pick(self, number: int) -> int | None:
        """Return one of the live tickets, None if there is none."""
        live = list(self.issued)
        return live[number % len(live)] if live else None

    @rule(number=picks, is_complete=st.booleans())
    def end(self, number: int, is_complete: bool) -> None:
        """End a ticket by its worker, after a complete or a failed copy."""
        ticket = self.pick(number)
        if ticket is None:
            return
        issued = self.issued.pop(ticket)
        self.ended.append(ticket)
        me = WATCHED[issued.name]
        if issued.kind == "held":
            reply = self.service.release(
                Release(ticket, PART if is_complete else None), me
            )
            assert (reply.num_tokens > 0) == is_complete
        elif not is_complete:
            self.service.abort(Abort(ticket), me)
        elif issued.is_stale:
            with pytest.raises(UnknownInstance):
                self.service.commit(Commit(ticket), me)
        else:
            assert self.service.commit(Commit(ticket), me).num_stored == len(
                issued.pages
            )

    @rule(number=picks)
    def end_wrongly(self, number: int) -> None:
        """Ending another client's ticket, or one of another kind, is refused."""
        ticket = self.pick(number)
        if ticket is None:
            return
        issued = self.issued[ticket]
        other = WATCHED["a" if issued.name == "b" else "b"]
        for end in (self.service.commit, self.service.abort):
            with pytest.raises(UnknownTicket):
                end(Commit(ticket), other)  # type: ignore[operator]
        with pytest.raises(UnknownTicket):
            self.service.release(Release(ticket), other)
        unlike: Any = self.service.commit
        if issued.kind == "reserved":
            unlike = self.service.release
        with pytest.raises(UnknownTicket):
            unlike(Release(ticket), WATCHED[issued.name])

    @rule(number=picks)
    def end_again(self, number: int) -> None:
        """Ending a ticket a second time is refused."""
        if self.ended:
            ticket = self.ended[number % len(self.ended)]
            for name in "ab":
                with pytest.raises(UnknownTicket):
                    self.service.abort(Abort(ticket), WATCHED[name])

    @rule(name=names, prompt=prompts)
    def end_session(self, name: str, prompt: int) -> None:
        """End a session, whether its tickets are live or not."""
        key = SessionKey(name, f"request-{prompt}")
        self.engine.end_session(EndSession(key), WATCHED[name])

    @rule(name=names)
    def register_again(self, name: str) -> None:
        """Register an instance again: its tickets stay, their stores are not kept."""
        register(self.engine, name)
        for issued in self.issued.values():
            issued.is_stale = issued.is_stale or issued.name == name

    @rule(name=names)
    def end_client(self, name: str) -> None:
        """End a client's process, and with it all its tickets."""
        self.engine.end_client(name)
        gone = [n for n, issued in self.issued.items() if issued.name == name]
        for number in gone:
            del self.issued[number]
        self.ended += gone
        register(self.engine, name)

    @invariant()
    def written_pages_are_exclusive(self) -> None:
        """Check that no page being written is written or read under another ticket."""
        self.engine.l1.check()
        written = [h.pages for h in self.issued.values() if h.kind == "reserved"]
        read = [h.pages for h in self.issued.values() if h.kind == "held"]
        taken = [page for pages in written for page in pages]
        assert len(taken) == len(set(taken))
        assert not set(taken) & {page for pages in read for page in pages}
        stats = self.engine.l1.stats()
        assert stats.num_reserved == len(taken)
        assert self.service.num_tickets() == len(self.issued)

    @invariant()
    def pages_of_tickets_are_allocated(self) -> None:
        """Check that the pages of live tickets are not free."""
        free = {
            page
            for start, count in self.arena._pages.free_runs()
            for page in range(start, start + count)
        }
        assert not any(issued.pages & free for issued in self.issued.values())


Tickets.TestCase.settings = settings(stateful_step_count=40)
TestTickets = Tickets.TestCase


@dataclass
class TicketServer:
    """An engine and its ticket service."""

    engine: Engine
    service: TicketService


@pytest.fixture
def server() -> Iterator[TicketServer]:
    """An empty server."""
    arena = Arena(NUM_PAGES * PART, PART, f"kvtest-{os.getpid()}-tickets")
    engine = Engine(CONFIG, arena)
    yield TicketServer(engine, TicketService(engine, MAX_TICKETS))
    engine.close()
    arena.close()


def test_an_unwatched_worker_is_refused(server: TicketServer) -> None:
    """The server could miss the worker's end and reuse pages that it still writes."""
    request = RegisterKVCache("i", "e", "m", 1, 0, (Private(4 * PART),), (GROUP,))
    with pytest.raises(BadRequest, match="must live in the server's pid namespace"):
        server.engine.register_kv_cache(request, RequestContext("c", os.getpid()))


@pytest.mark.parametrize("ask", ["reserve", "hold"])
def test_concurrent_requests_respect_the_limit(server: TicketServer, ask: str) -> None:
    """Requests that all passed the first check get no more tickets than the limit."""
    register(server.engine, "a")
    if ask == "hold":
        request = Reserve(Store(**transfer_fields("a", 0, 1)))
        ticket = finish_request(server.service.reserve(request, WATCHED["a"])).ticket
        server.service.commit(Commit(ticket), WATCHED["a"])
    running = []
    for number in range(MAX_TICKETS + 1):
        if ask == "reserve":
            steps = server.service.reserve(
                Reserve(Store(**transfer_fields("a", number, 1))), WATCHED["a"]
            )
        else:
            steps = server.service.hold(
                Hold(Retrieve(**transfer_fields("a", 0, 1))), WATCHED["a"]
            )
        with pytest.raises(StopIteration) as stop:
            next(steps)
        running.append(stop.value.value)
    for one in running[:-1]:
        assert one.finish().ticket
    with pytest.raises(Overloaded):
        running[-1].finish()
    assert server.service.num_tickets() == MAX_TICKETS
    server.engine.end_client("a")
    stats = server.engine.l1.stats()
    assert (stats.num_reserved, stats.num_held, server.service.num_tickets()) == (
        0,
        0,
        0,
    )


def test_a_late_commit_is_aborted(server: TicketServer) -> None:
    """The deadline is that of the RESERVE request, not of COMMIT."""
    register(server.engine, "a")
    caller = RequestContext("a", os.getpid(), is_watched=True, deadline_ns=1)
    request = Reserve(Store(**transfer_fields("a", 0, 2)))
    with pytest.raises(DeadlineExceeded):
        finish_request(server.service.reserve(request, caller))
    clock = iter([0, 2])
    server.engine.transfers._clock_ns = lambda: next(clock)
    ticket = finish_request(server.service.reserve(request, caller)).ticket
    with pytest.raises(DeadlineExceeded):
        server.service.commit(Commit(ticket), WATCHED["a"])
    stats = server.engine.l1.stats()
    assert (stats.num_chunks, stats.num_reserved, stats.used_bytes) == (0, 0, 0)
    assert server.service.num_tickets() == 0


def test_wrong_checksums_end_the_ticket(server: TicketServer) -> None:
    """A refused COMMIT leaves no reservation."""
    register(server.engine, "a")
    request = Reserve(Store(**transfer_fields("a", 0, 2)))
    ticket = finish_request(server.service.reserve(request, WATCHED["a"])).ticket
    with pytest.raises(BadRequest, match="checksums: 5 bytes, but 0 parts"):
        server.service.commit(Commit(ticket, memoryview(b"12345")), WATCHED["a"])
    assert server.engine.l1.stats().num_reserved == 0
