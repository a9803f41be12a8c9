"""Tickets under every order of events: each ends once, and nothing else ends it."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcore.config import ServerConfig
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
from kvcore.worker.ticket_requests import TicketRequests

CHUNK = 16
PART = 128
NUM_PAGES = 6
MAX_TICKETS = 4
GROUP = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, 8), (PART, 8, 1)),))
WATCHED = {name: RequestContext(name, os.getpid(), is_watched=True) for name in "ab"}


def register(engine: Engine, name: str) -> None:
    """Register a client's private instance, which is called as it is."""
    request = RegisterKVCache(name, name, "m", 1, 0, (Private(4 * PART),), (GROUP,))
    reply = engine.register_kv_cache(request, WATCHED[name])
    assert reply.arena is not None


def settle(result: Any) -> Any:
    """Run a request to its reply."""
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


def asked(name: str, prompt: int, num_chunks: int) -> dict[str, Any]:
    """What a store and a retrieve of a prompt's first chunks have in common."""
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
class Handed:
    """A ticket that its client has."""

    name: str
    kind: str
    pages: frozenset[int]
    is_stale: bool = False
    """Its instance was registered anew since."""


class Tickets(RuleBasedStateMachine):
    """Two clients, more prompts than there is room for, and a model of the tickets."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(NUM_PAGES * PART, PART, f"kvtest-{os.getpid()}-tickets")
        self.engine = Engine(ServerConfig(chunk_size=CHUNK), self.arena)
        self.copies = TicketRequests(self.engine, MAX_TICKETS)
        self.handed: dict[int, Handed] = {}
        self.ended: list[int] = []
        for name in "ab":
            register(self.engine, name)

    def teardown(self) -> None:
        """End everything: nothing is left."""
        for name in "ab":
            self.engine.client_gone(name)
        stats = self.engine.l1.stats()
        assert (stats.num_reserved, stats.num_held, len(self.copies.table)) == (0,) * 3
        assert all(
            session.num_running == 0
            for session in self.engine.sessions._sessions.values()
        )
        self.engine.close()
        self.arena.close()

    def take_in(self, name: str, kind: str, reply: ReserveReply | HoldReply) -> None:
        """Note a ticket."""
        if reply.ticket is None:
            assert reply.parts == ()
            return
        extents = [e for places in reply.parts for p in places for e in p.extents]
        pages = frozenset(extent.offset // PART for extent in extents)
        assert reply.ticket not in self.handed
        self.handed[reply.ticket] = Handed(name, kind, pages)

    def num_of(self, name: str) -> int:
        """How many tickets a client has."""
        return sum(handed.name == name for handed in self.handed.values())

    names = st.sampled_from("ab")
    prompts = st.integers(0, 3)
    counts = st.integers(1, 4)
    picks = st.integers(0, 7)

    @rule(name=names, prompt=prompts, count=counts)
    def reserve(self, name: str, prompt: int, count: int) -> None:
        """Ask for room; a client with too many tickets is refused."""
        request = Reserve(Store(**asked(name, prompt, count)))
        if self.num_of(name) >= MAX_TICKETS:
            with pytest.raises(Overloaded):
                settle(self.copies.reserve(request, WATCHED[name]))
            return
        reply = settle(self.copies.reserve(request, WATCHED[name]))
        num_parts = sum(map(len, reply.parts))
        assert num_parts + reply.num_present + reply.num_dropped == count
        self.take_in(name, "reserved", reply)

    @rule(name=names, prompt=prompts, count=counts)
    def hold(self, name: str, prompt: int, count: int) -> None:
        """Ask to read, where everything is there."""
        request = Hold(Retrieve(**asked(name, prompt, count)))
        if self.num_of(name) >= MAX_TICKETS:
            with pytest.raises(Overloaded):
                settle(self.copies.hold(request, WATCHED[name]))
            return
        try:
            reply = settle(self.copies.hold(request, WATCHED[name]))
        except ChunksMissing:
            return
        assert sum(map(len, reply.parts)) == count
        self.take_in(name, "held", reply)

    def pick(self, number: int) -> int | None:
        """One of the live tickets."""
        live = list(self.handed)
        return live[number % len(live)] if live else None

    @rule(number=picks, good=st.booleans())
    def end(self, number: int, good: bool) -> None:
        """End a ticket as its worker would, well or not."""
        ticket = self.pick(number)
        if ticket is None:
            return
        handed = self.handed.pop(ticket)
        self.ended.append(ticket)
        me = WATCHED[handed.name]
        if handed.kind == "held":
            reply = self.copies.release(Release(ticket, PART if good else None), me)
            assert (reply.num_tokens > 0) == good
        elif not good:
            self.copies.abort(Abort(ticket), me)
        elif handed.is_stale:
            with pytest.raises(UnknownInstance):
                self.copies.commit(Commit(ticket), me)
        else:
            assert self.copies.commit(Commit(ticket), me).num_stored == len(
                handed.pages
            )

    @rule(number=picks)
    def end_wrongly(self, number: int) -> None:
        """Another's, of another kind, or with checksums that nobody asked for."""
        ticket = self.pick(number)
        if ticket is None:
            return
        handed = self.handed[ticket]
        other = WATCHED["a" if handed.name == "b" else "b"]
        for end in (self.copies.commit, self.copies.abort):
            with pytest.raises(UnknownTicket):
                end(Commit(ticket), other)  # type: ignore[operator]
        with pytest.raises(UnknownTicket):
            self.copies.release(Release(ticket), other)
        unlike: Any = self.copies.commit
        if handed.kind == "reserved":
            unlike = self.copies.release
        with pytest.raises(UnknownTicket):
            unlike(Release(ticket), WATCHED[handed.name])

    @rule(number=picks)
    def end_again(self, number: int) -> None:
        """What has ended stays so."""
        if self.ended:
            ticket = self.ended[number % len(self.ended)]
            for name in "ab":
                with pytest.raises(UnknownTicket):
                    self.copies.abort(Abort(ticket), WATCHED[name])

    @rule(name=names, prompt=prompts)
    def end_session(self, name: str, prompt: int) -> None:
        """A session ends whenever its engine likes."""
        key = SessionKey(name, f"request-{prompt}")
        self.engine.end_session(EndSession(key), WATCHED[name])

    @rule(name=names)
    def register_again(self, name: str) -> None:
        """The instance takes its own place; its tickets stay, but nothing is kept."""
        register(self.engine, name)
        for handed in self.handed.values():
            handed.is_stale = handed.is_stale or handed.name == name

    @rule(name=names)
    def die(self, name: str) -> None:
        """A client's process ends, and with it all that it had."""
        self.engine.client_gone(name)
        gone = [n for n, handed in self.handed.items() if handed.name == name]
        for number in gone:
            del self.handed[number]
        self.ended += gone
        register(self.engine, name)

    @invariant()
    def pages_are_their_writers_alone(self) -> None:
        """What is being written is nobody else's, to write or to read."""
        self.engine.l1.check()
        written = [h.pages for h in self.handed.values() if h.kind == "reserved"]
        read = [h.pages for h in self.handed.values() if h.kind == "held"]
        taken = [page for pages in written for page in pages]
        assert len(taken) == len(set(taken))
        assert not set(taken) & {page for pages in read for page in pages}
        stats = self.engine.l1.stats()
        assert stats.num_reserved == len(taken)
        assert len(self.copies.table) == len(self.handed)

    @invariant()
    def what_is_handed_out_is_not_free(self) -> None:
        """Pages that somebody writes or reads are not given away."""
        free = {
            page
            for start, count in self.arena._pages.free_runs()
            for page in range(start, start + count)
        }
        assert not any(handed.pages & free for handed in self.handed.values())


Tickets.TestCase.settings = settings(stateful_step_count=40)
TestTickets = Tickets.TestCase


@pytest.fixture
def copies() -> Iterator[TicketRequests]:
    """A server's side with nothing in it."""
    arena = Arena(NUM_PAGES * PART, PART, f"kvtest-{os.getpid()}-tickets")
    engine = Engine(ServerConfig(chunk_size=CHUNK), arena)
    yield TicketRequests(engine, MAX_TICKETS)
    engine.close()
    arena.close()


def test_who_cannot_be_watched_does_not_copy(copies: TicketRequests) -> None:
    """Its end could be missed, and with it the moment from which pages are free."""
    request = RegisterKVCache("i", "e", "m", 1, 0, (Private(4 * PART),), (GROUP,))
    with pytest.raises(BadRequest, match="must live in the server's pid namespace"):
        copies._engine.register_kv_cache(request, RequestContext("c", os.getpid()))


@pytest.mark.parametrize("ask", ["reserve", "hold"])
def test_asking_at_once_gets_no_more(copies: TicketRequests, ask: str) -> None:
    """Requests that all found room get as many tickets as there are, and no more."""
    register(copies._engine, "a")
    if ask == "hold":
        request = Reserve(Store(**asked("a", 0, 1)))
        ticket = settle(copies.reserve(request, WATCHED["a"])).ticket
        copies.commit(Commit(ticket), WATCHED["a"])
    running = []
    for number in range(MAX_TICKETS + 1):
        if ask == "reserve":
            steps = copies.reserve(
                Reserve(Store(**asked("a", number, 1))), WATCHED["a"]
            )
        else:
            steps = copies.hold(Hold(Retrieve(**asked("a", 0, 1))), WATCHED["a"])
        with pytest.raises(StopIteration) as stop:
            next(steps)
        running.append(stop.value.value)
    for one in running[:-1]:
        assert one.finish().ticket
    with pytest.raises(Overloaded):
        running[-1].finish()
    assert len(copies.table) == MAX_TICKETS
    copies._engine.client_gone("a")
    stats = copies._engine.l1.stats()
    assert (stats.num_reserved, stats.num_held, len(copies.table)) == (0, 0, 0)


def test_a_late_commit_keeps_nothing(copies: TicketRequests) -> None:
    """The deadline is that of the reservation, whatever the commit's own is."""
    register(copies._engine, "a")
    caller = RequestContext("a", os.getpid(), is_watched=True, deadline_ns=1)
    request = Reserve(Store(**asked("a", 0, 2)))
    with pytest.raises(DeadlineExceeded):
        settle(copies.reserve(request, caller))
    clock = iter([0, 2])
    copies._copier._clock_ns = lambda: next(clock)
    ticket = settle(copies.reserve(request, caller)).ticket
    with pytest.raises(DeadlineExceeded):
        copies.commit(Commit(ticket), WATCHED["a"])
    stats = copies._engine.l1.stats()
    assert (stats.num_chunks, stats.num_reserved, stats.used_bytes) == (0, 0, 0)
    assert len(copies.table) == 0


def test_checksums_that_are_missing_end_the_ticket(copies: TicketRequests) -> None:
    """A reservation is never left behind by a commit that cannot be."""
    register(copies._engine, "a")
    request = Reserve(Store(**asked("a", 0, 2)))
    ticket = settle(copies.reserve(request, WATCHED["a"])).ticket
    with pytest.raises(BadRequest, match="checksums: 5 bytes, but 0 parts"):
        copies.commit(Commit(ticket, memoryview(b"12345")), WATCHED["a"])
    assert copies._engine.l1.stats().num_reserved == 0
