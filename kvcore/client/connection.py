"""One connection to a server: requests go out, each gets its one answer.

The socket belongs to whoever holds `_io`. A short call takes it, sends, waits for its
own answer and hands it back: no other thread takes part, which is worth 50 us a call
(docs/performance.md). While futures are outstanding the connection's own thread holds
it; a call that finds it taken queues its frame and wakes the holder.

A server that was replaced refuses what was meant for its predecessor. The connection
then says hello, registers again what was registered, and sends the refused requests
once more; callers see nothing of it but the time it took.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from time import monotonic_ns
from typing import Any, TypeVar

import zmq

from kvcore.client.peer import Peer
from kvcore.client.pending import Late, Pending, Retry
from kvcore.errors import (
    BadRequest,
    Closed,
    DeadlineExceeded,
    KVError,
    Overloaded,
    StaleBoot,
    TooLarge,
    Unavailable,
    from_wire,
)
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import (
    NO_BOOT,
    PROTOCOL_VERSION,
    CBRegisterKVCache,
    Goodbye,
    Hello,
    HelloReply,
    Ping,
    RegisterKVCache,
    RegisterReply,
    Request,
)
from kvcore.wire import BY_CLASS, UNREADABLE, decode_error, decode_reply, encode_request

log = logging.getLogger(__name__)

R = TypeVar("R")
Registration = RegisterKVCache | CBRegisterKVCache
NEVER_NS = 2**63 - 1
HELLO_AGAIN_NS = 1_000_000_000
"""An unanswered hello is said again after this, then after twice that, and so on."""
MAX_HELLO_AGAIN_NS = 64 * HELLO_AGAIN_NS
"""ZeroMQ queues what nobody takes, up to a bound: few hellos for a long absence."""

MAX_RECEIVES = 256
"""Frames read before the deadlines are looked at, however many come."""

MAX_SENDS = 4
"""Times that one request is sent before its error counts: an endless loop ends."""


class Connection:
    """A DEALER socket, the requests under way on it, and one thread to serve them."""

    def __init__(self, address: str, label: str) -> None:
        self._address = address
        self._label = label
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        # Chosen here so that it stays the same when TCP reconnects.
        self._socket.setsockopt(zmq.ROUTING_ID, b"k" + secrets.token_bytes(15))
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close(0)
            self._context.term()
            raise Unavailable(
                f"{address}: {error.strerror}; an address is like tcp://HOST:PORT "
                "or ipc://PATH"
            ) from None
        self._io = threading.Lock()
        # Held to submit and to begin to close, so that nothing is submitted later.
        self._gate = threading.Lock()
        self._ids = count(1)
        self._outbox: deque[Pending] = deque()
        self._pending: dict[int, Pending] = {}
        self._refused: deque[Pending] = deque()
        self._earliest_ns = NEVER_NS
        self._beat_ns = NEVER_NS
        # The connection's thread may sleep without end: a call that met a server hands
        # over even when it leaves nothing else.
        self._beat_is_new = False
        self._registrations: dict[str, _Registered] = {}
        self._unsent: deque[Pending] = deque()
        self.on_leave: list[Callable[[], None]] = []
        """Told that a run of the server is gone, by the thread that found out."""
        self._hello: Pending | None = None
        self._hello_again_ns = HELLO_AGAIN_NS
        self._boot = NO_BOOT
        self._closed = False
        # The thread of the call that holds `_io`, 0 when it is the connection's own.
        self._caller = 0
        self.peer: Peer | None = None
        # Runs whose address is another's, while they may still write what was asked.
        self._outlived: list[Peer] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._sources: list[tuple[Any, int]] = [
            (self._socket, zmq.POLLIN),
            (self._epoll.fileno(), zmq.POLLIN),
        ]
        self._thread = threading.Thread(target=self._serve, name="kvcore", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"boot {self._boot:x}"
        return f"<Connection {self._address} {state}, {len(self._pending)} pending>"

    # -- for callers ----------------------------------------------------------------

    def submit(
        self,
        request: Request[R],
        timeout_s: float,
        retry: Retry | None = None,
        late: Late | None = None,
    ) -> Future[R]:
        """Send a request soon; never waits for the network.

        The future ends with the reply or the error that the server named, with
        `DeadlineExceeded` after `timeout_s` (a retrieve's does not: its blocks belong
        to the server until it answers or is gone), or with `Unavailable` when the
        server dies. Its callbacks run on the thread that holds the socket and must not
        wait for other requests; they may close the connection. `late` is given a reply
        that comes after the deadline.
        """
        with self._gate:
            pending = self._make(request, timeout_s, retry, late)
            future = pending.promise()
            self._outbox.append(pending)
            os.eventfd_write(self._wake, 1)
        return future

    def call(
        self,
        request: Request[R],
        timeout_s: float,
        retry: Retry | None = None,
        late: Late | None = None,
    ) -> R:
        """Send a request and wait for its answer; errors as for `submit`."""
        if not self._io.acquire(blocking=False):
            return self.submit(request, timeout_s, retry, late).result()
        try:
            pending = self._make(request, timeout_s, retry, late)
            self._carry((pending,), lambda: pending.is_done or self._closed)
        finally:
            self._io.release()
        result: R = pending.result()
        return result

    def call_all(self, requests: Sequence[Request[Any]], timeout_s: float) -> list[Any]:
        """Send requests at once and wait for all answers; raises the first error.

        They are served in this order, in about the time of one.
        """
        if not self._io.acquire(blocking=False):
            futures = [self.submit(request, timeout_s) for request in requests]
            return [future.result() for future in futures]
        try:
            pendings = [self._make(request, timeout_s) for request in requests]
            self._carry(
                pendings, lambda: self._closed or all(p.is_done for p in pendings)
            )
        finally:
            self._io.release()
        return [pending.result() for pending in pendings]

    def _carry(self, pendings: Sequence[Pending], done: Callable[[], bool]) -> None:
        """Send requests and serve the socket until `done`; for who holds `_io`."""
        self._caller = threading.get_ident()
        try:
            for pending in pendings:
                self._transmit(pending)
            self._drive(done)
        finally:
            self._hand_over()
            self._caller = 0

    def _hand_over(self) -> None:
        """Leave what is still under way to the connection's thread.

        It may have missed why it was woken, since this one took the wake-up.
        """
        if self._closed:
            self._fail_all(Closed("the connection was closed"))
        elif not (self._is_busy or self._beat_is_new):
            return
        os.eventfd_write(self._wake, 1)

    def remember(
        self,
        request: Registration,
        told: Callable[[RegisterReply], object] | None = None,
    ) -> None:
        """Register this again whenever another run of the server is met.

        `told` is given the reply, by the connection's thread.
        """
        self._registrations[request.instance_id] = _Registered(request, told)

    def forget(self, instance_id: str) -> None:
        """Register it no more."""
        self._registrations.pop(instance_id, None)

    def close(self) -> None:
        """Say goodbye; what is unanswered ends with `Closed`. Idempotent.

        A future's callback does not wait for that: it would wait for itself.
        """
        with self._gate:
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)
        if threading.get_ident() not in (self._caller, self._thread.ident):
            self._thread.join()

    def _release(self) -> None:
        """End what is unanswered, and give back all that was opened."""
        self._fail_all(Closed("the connection was closed"))
        if self._boot:
            self._transmit(Pending(Goodbye(), 0))
            self._pending.clear()
        self._socket.close()
        self._context.term()
        for peer in (self.peer, *self._outlived):
            if peer is not None:
                peer.close()
        self._epoll.close()
        os.close(self._wake)

    def _make(
        self,
        request: Request[Any],
        timeout_s: float,
        retry: Retry | None = None,
        late: Late | None = None,
    ) -> Pending:
        if self._closed:
            raise Closed("the connection was closed")
        return Pending(request, monotonic_ns() + int(timeout_s * 1e9), retry, late)

    # -- the connection's thread ----------------------------------------------------

    def _serve(self) -> None:
        """Sleep until there is something for this thread, then take the socket."""
        try:
            while not self._closed:
                self._epoll.poll(self._seconds_to_beat())
                with self._io:
                    # Here, since `_drive` does not look when there is nothing to do:
                    # an idle client would never see that its server died.
                    self._look_around()
                    self._beat_is_new = False
                    self._beat()
                    self._drive(self._idle)
        finally:
            with self._gate:
                self._closed = True
            with self._io:
                self._release()

    def _idle(self) -> bool:
        return self._closed or not (self._is_busy or self._hello)

    @property
    def _is_busy(self) -> bool:
        return bool(self._pending or self._outbox or self._refused or self._unsent)

    def _seconds_to_beat(self) -> float | None:
        if self._beat_ns == NEVER_NS:
            return None
        return max(0, self._beat_ns - monotonic_ns()) / 1e9

    # -- whoever holds the socket ---------------------------------------------------

    def _drive(self, done: Callable[[], bool]) -> None:
        """Send, receive and expire until `done`."""
        while True:
            while self._outbox:
                self._transmit(self._outbox.popleft())
            if done():
                return
            for source, _ in zmq.zmq_poll(self._sources, self._timeout_ms()):
                if source is self._socket:
                    self._receive()
                else:
                    self._look_around()
            if min(self._earliest_ns, self._beat_ns) <= monotonic_ns():
                self._expire()
                self._beat()

    def _timeout_ms(self) -> int:
        earliest_ns = min(self._earliest_ns, self._beat_ns)
        if earliest_ns == NEVER_NS:
            return -1
        return max(0, (earliest_ns - monotonic_ns()) // 1_000_000 + 1)

    def _beat(self) -> None:
        """Show life, when it is time, to a server that cannot watch this process."""
        now = monotonic_ns()
        if self.peer is not None and self._beat_ns <= now:
            self._beat_ns = now + self.peer.beat_ns
            self._transmit(Pending(Ping(), now + self.peer.beat_ns))

    def _transmit(self, pending: Pending) -> None:
        """Send a request; without a server it waits here for a hello's answer."""
        if pending.deadline_ns:
            self._earliest_ns = min(self._earliest_ns, pending.deadline_ns)
        if self._boot == NO_BOOT and pending is not self._hello:
            self._refused.append(pending)
            self._greet()
            return
        pending.id = next(self._ids)
        pending.boot = self._boot
        pending.num_sends += 1
        try:
            self._send(pending)
        except Exception as error:  # noqa: BLE001 - the future carries it
            self._pending.pop(pending.id, None)
            pending.fail(error)

    def _send(self, pending: Pending) -> None:
        frame = encode_request(
            pending.request, pending.id, pending.boot, pending.deadline_ns
        )
        peer = self.peer
        if peer is not None and len(frame) > peer.hello.max_message_bytes:
            raise TooLarge(
                f"a request of {len(frame)} bytes; the server reads at most "
                f"{peer.hello.max_message_bytes}"
            )
        self._pending[pending.id] = pending
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            if not pending.request.ends_work:
                raise Overloaded("too many requests are waiting to be sent") from None
            # The server must hear of it: sent when the queue has moved.
            del self._pending[pending.id]
            self._unsent.append(pending)

    def _receive(self) -> None:
        for _ in range(MAX_RECEIVES):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frame)
            for _ in range(len(self._unsent)):
                self._transmit(self._unsent.popleft())
            if not self._pending:
                return

    def _take(self, frame: bytes) -> None:
        try:
            envelope = decode_reply(frame)
        except BadRequest as error:
            log.warning("dropped a frame from %s: %s", self._address, error)
            return
        pending = self._pending.pop(envelope.id, None)
        if pending is None:
            return
        try:
            if envelope.code:
                body = decode_error(envelope.body)
                self._take_error(
                    pending, from_wire(envelope.code, body.message, body.details)
                )
            else:
                decoder = BY_CLASS[type(pending.request)].reply_decoder
                pending.succeed(decoder.decode(envelope.body))
        except UNREADABLE as error:
            pending.fail(BadRequest(f"reply: {error}"))

    def _take_error(self, pending: Pending, error: KVError) -> None:
        if pending.num_sends < MAX_SENDS and not pending.is_done:
            if isinstance(error, StaleBoot):
                if pending.boot == self._boot:
                    self._boot = NO_BOOT
                if pending.is_restoring:
                    pending.fail(error)
                    if self._boot == NO_BOOT:
                        self._greet()
                    return
                self._transmit(pending)
                return
            request = pending.retry(error) if pending.retry else None
            if request is not None:
                pending.request = request
                self._transmit(pending)
                return
        pending.fail(error)

    # -- greeting -------------------------------------------------------------------

    def _greet(self) -> None:
        """Say hello, once at a time; `_greeted` goes on."""
        if self._hello is not None:
            return
        pid = os.getpid()
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            pid=pid,
            pid_start=start_time(pid) or 0,
            pid_namespace=pid_namespace(),
            label=self._label,
        )
        self._hello = Pending(hello, monotonic_ns() + self._hello_again_ns)
        self._hello_again_ns = min(2 * self._hello_again_ns, MAX_HELLO_AGAIN_NS)
        self._hello.promise().add_done_callback(self._greeted)
        self._transmit(self._hello)

    def _greeted(self, future: Future[HelloReply]) -> None:
        self._hello = None
        error = future.exception()
        if isinstance(error, DeadlineExceeded):
            # It may have reached a server that died: say it again while it matters.
            if not self._closed and (self._refused or self._registrations):
                self._greet()
            return
        if error is not None:
            refused, self._refused = self._refused, deque()
            self._fail(refused, error)
            return
        self._meet(future.result())
        for registered in list(self._registrations.values()):
            again = Pending(registered.request, 0)
            again.is_restoring = True
            again.promise().add_done_callback(registered.again)
            self._transmit(again)
        for _ in range(len(self._refused)):
            self._transmit(self._refused.popleft())

    def _meet(self, hello: HelloReply) -> None:
        """Take up with a run of the server; watch its process if that can be done."""
        earlier = self.peer
        self._boot = hello.boot
        self._hello_again_ns = HELLO_AGAIN_NS
        if earlier is not None:
            if earlier.hello.boot == hello.boot:
                return
            if earlier.pidfd is None:
                # Its address is another's now, so it is gone, although unwatched.
                self._fail_sent(earlier)
            self._leave()
            if any(p.boot == earlier.hello.boot for p in self._pending.values()):
                self._outlived.append(earlier)
            else:
                self._unwatch(earlier)
        self.peer = Peer.meet(hello)
        self._beat_ns = NEVER_NS
        if not hello.watched:
            self._beat_ns = monotonic_ns() + self.peer.beat_ns
            self._beat_is_new = True
        if self.peer.pidfd is not None:
            self._epoll.register(self.peer.pidfd, select.EPOLLIN)

    def _look_around(self) -> None:
        peer = self.peer
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif peer is not None and fd == peer.pidfd:
                self._server_gone(peer)
            else:
                self._outlived_gone(fd)

    def _outlived_gone(self, pidfd: int) -> None:
        for peer in [peer for peer in self._outlived if peer.pidfd == pidfd]:
            self._outlived.remove(peer)
            self._unwatch(peer)
            self._fail_sent(peer)

    def _server_gone(self, peer: Peer) -> None:
        self._leave()
        self._unwatch(peer)
        self.peer = None
        self._beat_ns = NEVER_NS
        self._boot = NO_BOOT
        self._fail_sent(peer)
        if self._registrations:
            self._greet()

    def _leave(self) -> None:
        for told in self.on_leave:
            told()

    def _unwatch(self, peer: Peer) -> None:
        if peer.pidfd is not None:
            self._epoll.unregister(peer.pidfd)
        peer.close()

    # -- failing --------------------------------------------------------------------

    def _expire(self) -> None:
        """End what is past its deadline, and find the earliest of the rest.

        `_earliest_ns` is a lower bound that answers do not raise, so this runs at most
        once a deadline and costs nothing in between.
        """
        now = monotonic_ns()
        refused = [p for p in self._refused if 0 < p.deadline_ns <= now]
        sent = [p for p in self._pending.values() if p.expires and p.deadline_ns <= now]
        for pending in refused:
            self._refused.remove(pending)
        for pending in sent:
            if pending.late is None:
                del self._pending[pending.id]
        sent += [p for p in self._unsent if p.expires and p.deadline_ns <= now]
        left = [p.deadline_ns for p in self._pending.values() if p.expires]
        left += [p.deadline_ns for p in self._refused if p.deadline_ns]
        left += [p.deadline_ns for p in self._unsent if p.expires]
        self._earliest_ns = min(left, default=NEVER_NS)
        self._fail(refused, Unavailable(f"no server answers at {self._address}"))
        self._fail(sent, DeadlineExceeded("no answer before the deadline"))

    def _fail_sent(self, peer: Peer) -> None:
        """End what a dead server was asked; it can write no more."""
        sent = [p for p in self._pending.values() if p.boot == peer.hello.boot]
        for pending in sent:
            del self._pending[pending.id]
        for pending in [p for p in self._unsent if p.boot == peer.hello.boot]:
            self._unsent.remove(pending)
            sent.append(pending)
        self._fail(sent, Unavailable(f"the server (process {peer.hello.pid}) is gone"))

    def _fail_all(self, error: KVError) -> None:
        self._hello = None
        left = [*self._pending.values(), *self._unsent, *self._outbox, *self._refused]
        self._pending.clear()
        self._unsent.clear()
        self._outbox.clear()
        self._refused.clear()
        self._fail(left, error)

    def _fail(self, pendings: Iterable[Pending], error: BaseException) -> None:
        for pending in pendings:
            pending.fail(error)


@dataclass(frozen=True, slots=True)
class _Registered:
    """What every run of the server is told anew, and who is told what it answered."""

    request: Registration
    told: Callable[[RegisterReply], object] | None

    def again(self, future: Future[RegisterReply]) -> None:
        """Take in another run's reply."""
        try:
            reply = future.result()
            if self.told is not None:
                self.told(reply)
        except (Closed, StaleBoot):  # Another run is met, and is told anew.
            return
        except KVError as error:
            log.warning("could not register again: %s", error)
