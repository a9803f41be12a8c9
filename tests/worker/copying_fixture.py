"""Copying clients and a real engine, connected by messages that a test delivers.

Each client call runs as a strand, which pauses while it waits for a reply and around
every chunk that it copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

from kvcore.client.pending_requests import OnLateReply, Retry
from kvcore.client.reconnect import OnRegistered, Registration
from kvcore.config import ServerConfig
from kvcore.copy.paged_cache import ChunkCopier
from kvcore.engine.engine import Engine
from kvcore.errors import Closed, DeadlineExceeded, KVError, Unavailable
from kvcore.extents import Checksum
from kvcore.protocol import Ping, Pong, RegisterReply, Request
from kvcore.storage.arena import Arena
from kvcore.worker.mapped_arena import MappedCache
from kvcore.worker.ticket_service import TicketService
from tests.engine.engine_model import CHUNK, FAR_NS, MAX_TICKETS, PAGE
from tests.engine.manual_threads import Answers, ManualLoop, Strand, current, pause


class Killed(BaseException):
    """Raised in the strands of a killed process."""


@dataclass(eq=False)
class Message:
    """A request message and its outcome."""

    connection: ManualConnection
    request: Request[Any]
    deadline_ns: int
    on_late_reply: OnLateReply | None = None
    future: Future[Any] = field(default_factory=Future)

    def end(self, outcome: Any) -> None:
        """Complete with a reply or an error; pass a late reply on."""
        if self.future.done():
            if self.on_late_reply is not None and not isinstance(
                outcome, BaseException
            ):
                self.on_late_reply(outcome)
        elif isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class ManualConnection:
    """The interface of `Connection`, with messages delivered by the fixture."""

    fixture: ClassVar[CopyingFixture]
    is_serving_thread = False

    def __init__(self, address: str, _label: str, _key: bytes | None) -> None:
        self.identity = address.encode()
        self.registered: dict[str, tuple[Registration, OnRegistered | None]] = {}
        self.is_dead = False
        hello = SimpleNamespace(chunk_size=CHUNK)
        self.reconnect = SimpleNamespace(
            server=SimpleNamespace(hello=hello),
            on_disconnect=[],
            remove_registration=lambda name: self.registered.pop(name, None),
        )
        self.fixture.connect(self)

    def submit(
        self,
        request: Request[Any],
        timeout_s: float,
        _retry: Retry | None = None,
        on_late_reply: OnLateReply | None = None,
    ) -> Future[Any]:
        """Send a message."""
        if self.is_dead:
            raise Closed("the connection was closed")
        deadline_ns = self.fixture.now_ns() + int(timeout_s * 1e9)
        message = Message(self, request, deadline_ns, on_late_reply)
        self.fixture.wire.append(message)
        return message.future

    def call(
        self,
        request: Request[Any],
        timeout_s: float,
        retry: Retry | None = None,
        on_late_reply: OnLateReply | None = None,
    ) -> Any:
        """Wait for the reply; outside a strand, deliver all messages."""
        if isinstance(request, Ping):
            return Pong(0)
        future = self.submit(request, timeout_s, retry, on_late_reply)
        while not future.done():
            if current() is None:
                self.fixture.settle()
            else:
                self.fixture.pause()
        try:
            return future.result()
        except KVError as error:
            again = retry(error) if retry else None
            if again is None:
                raise
            return self.call(again, timeout_s, None, on_late_reply)

    def register(
        self,
        request: Registration,
        timeout_s: float,
        on_registered: OnRegistered | None = None,
    ) -> RegisterReply:
        """Register, now and after every restart."""
        reply: RegisterReply = self.call(request, timeout_s)
        self.registered[request.instance_id] = (request, on_registered)
        if on_registered is not None:
            on_registered(reply)
        return reply

    def close(self) -> None:
        """Disconnect."""
        if not self.is_dead:
            self.is_dead = True
            self.fixture.disconnect(self)


class PausedCopier(ChunkCopier):
    """A `ChunkCopier` that pauses before and after every chunk."""

    def gather(self, caches: Any, blocks: Any, locations: Any) -> list[Checksum]:
        """See `ChunkCopier`."""
        fixture, checksums = ManualConnection.fixture, []
        for location in locations[0]:
            fixture.pause_in_copy()
            checksums += super().gather(caches, blocks, ((location,),))
        fixture.pause_in_copy()
        return checksums

    def scatter(self, caches: Any, blocks: Any, locations: Any, *rest: Any) -> int:
        """See `ChunkCopier`."""
        fixture, num_bytes = ManualConnection.fixture, 0
        for location in locations[0]:
            fixture.pause_in_copy()
            num_bytes += super().scatter(caches, blocks, ((location,),), *rest)
        fixture.pause_in_copy()
        return num_bytes


class CopyingFixture:
    """Successive server processes, messages in transit and a clock."""

    def __init__(self, config: ServerConfig, num_pages: int) -> None:
        self.config = config
        self.num_pages = num_pages
        self.now = 1000.0
        self.wire: deque[Message] = deque()
        self.in_flight: dict[int, Message] = {}
        self.connections: list[ManualConnection] = []
        self.killed: set[Strand] = set()
        self.copying: list[Strand] = []
        """Strands that are copying."""
        self.on_answer: list[Callable[[Message], None]] = []
        ManualConnection.fixture = self
        self._begin()

    def now_ns(self) -> int:
        """Return the time in the clock of deadlines."""
        return FAR_NS + int(self.now * 1e9)

    def _begin(self) -> None:
        self.arena = Arena(self.num_pages * PAGE, PAGE)
        self.engine = Engine(self.config, self.arena, clock=lambda: self.now)
        self.engine.transfers._clock_ns = self.now_ns
        self.tickets = TicketService(self.engine, MAX_TICKETS)
        answers = Answers(lambda *_: None, self._answered)
        self.loop = ManualLoop(self.engine, self.tickets, answers, lambda: self.now)

    def _end(self) -> None:
        self.engine.close()
        self.loop.close()
        self.arena.close()

    # -- strands ----------------------------------------------------------------------

    def pause(self) -> None:
        """Pause the strand; raise `Killed` if its process was killed meanwhile."""
        pause()
        strand = current()
        if strand in self.killed:
            raise Killed

    def pause_in_copy(self) -> None:
        """Pause the strand and mark it as copying."""
        strand = current()
        assert strand is not None
        self.copying.append(strand)
        try:
            self.pause()
        finally:
            self.copying.remove(strand)

    def mapped(self, cache: MappedCache, arena: str, wait: Callable[..., Any]) -> Any:
        """Pause until the new mapping is open: the last copy must end first."""
        mapped = cache._mapped
        while mapped is not None and not mapped.done() and self.copying:
            self.pause()
        return wait(cache, arena)

    # -- messages ---------------------------------------------------------------------

    def connect(self, connection: ManualConnection) -> None:
        """Connect a client."""
        self.connections.append(connection)
        self.loop.greet(connection.identity)

    def disconnect(self, connection: ManualConnection) -> None:
        """Disconnect a client and drop its messages."""
        self.connections.remove(connection)
        for message in self.messages_of(connection):
            self._drop(message)
        self.loop.kill(connection.identity)

    def messages_of(self, connection: ManualConnection) -> list[Message]:
        """Return a client's unanswered messages."""
        asked = [*self.wire, *self.in_flight.values()]
        return [message for message in asked if message.connection is connection]

    def _drop(self, message: Message) -> None:
        if message in self.wire:
            self.wire.remove(message)
        for number, message_in_flight in [*self.in_flight.items()]:
            if message_in_flight is message:
                del self.in_flight[number]
        message.end(Closed("the connection was closed"))

    def deliver(self, pick: int) -> None:
        """Deliver the first message of one client."""
        clients = [*dict.fromkeys(message.connection for message in self.wire)]
        sender = clients[pick % len(clients)]
        self.receive(next(m for m in self.wire if m.connection is sender))

    def receive(self, message: Message) -> None:
        """Deliver a message."""
        self.wire.remove(message)
        number = self.loop.next_id()
        self.in_flight[number] = message
        sender = message.connection.identity
        self.loop.ask(number, sender, message.request, message.deadline_ns)

    def _answered(self, number: int, outcome: Any) -> None:
        message = self.in_flight.pop(number, None)
        if message is not None:
            for callback in self.on_answer:
                callback(message)
            message.end(outcome)

    def settle(self) -> None:
        """Deliver all messages and process them."""
        while self.wire or self.loop.step() or self.loop.look_around():
            if self.wire:
                self.deliver(0)

    def expire(self, message: Message) -> None:
        """Expire the deadline of a message."""
        message.end(DeadlineExceeded("no answer before the deadline"))

    def restart(self, keeps: Sequence[bool]) -> None:
        """Restart the server: `keeps` selects the undelivered messages to keep."""
        lost = [*self.in_flight.values()]
        for at, message in enumerate([*self.wire]):
            if not keeps[at % len(keeps)]:
                self.wire.remove(message)
                lost.append(message)
        self.in_flight.clear()
        for connection in self.connections:
            for callback in connection.reconnect.on_disconnect:
                callback()
        self._end()
        for message in lost:
            message.end(Unavailable("the server is gone"))
        self._begin()
        for connection in self.connections:
            self.loop.greet(connection.identity)
            for request, on_registered in [*connection.registered.values()]:
                self._restore(connection, request, on_registered)

    def _restore(
        self,
        connection: ManualConnection,
        request: Registration,
        on_registered: OnRegistered | None,
    ) -> None:
        message = Message(connection, request, 0)
        number = self.loop.next_id()
        self.in_flight[number] = message
        self.loop.ask(number, connection.identity, request)
        if on_registered is not None:
            on_registered(message.future.result(0))

    def close(self) -> None:
        """Close the server."""
        self._end()
