"""One connection to a server: requests go out, each gets its one answer.

The socket belongs to whoever holds `_io`. A short call takes it, sends, waits for its
own answer and hands it back: no other thread takes part, which is worth 50 us a call
(docs/performance.md). While futures are outstanding the connection's own thread holds
it; a call that finds it taken queues its frame and wakes the holder.

A server that was replaced refuses what was meant for its predecessor.
`ReconnectPolicy` then repeats the handshake and the registrations, and the refused
requests are sent once more; callers see nothing of it but the time it took.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count
from time import monotonic_ns
from typing import Any, TypeVar

import zmq

from kvcore.client.pending_requests import (
    NEVER_NS,
    Late,
    PendingRequest,
    PendingTable,
    Retry,
)
from kvcore.client.reconnect import ReconnectPolicy, Registration, Told
from kvcore.errors import (
    BadRequest,
    Closed,
    KVError,
    Overloaded,
    StaleBoot,
    TooLarge,
    Unavailable,
    from_wire,
)
from kvcore.protocol import NO_BOOT, Goodbye, RegisterReply, Request
from kvcore.wire import BY_CLASS, UNREADABLE, decode_error, decode_reply, encode_request

log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_RECEIVES = 256
"""Frames read before the deadlines are looked at, however many come."""

MAX_SENDS = 4
"""Times that one request is sent before its error counts: an endless loop ends."""


class Connection:
    """A DEALER socket, the requests under way on it, and one thread to serve them."""

    def __init__(self, address: str, label: str) -> None:
        self._address = address
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
        self._outbox: deque[PendingRequest] = deque()
        self._posted = PendingTable()
        self._closed = False
        # The thread of the call that holds `_io`, 0 when it is the connection's own.
        self._caller = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self.runs = ReconnectPolicy(
            address, label, self._post, self._posted, self._epoll
        )
        self._sources: list[tuple[Any, int]] = [
            (self._socket, zmq.POLLIN),
            (self._epoll.fileno(), zmq.POLLIN),
        ]
        self._sleeps_until_ns = NEVER_NS
        self._thread = threading.Thread(target=self._serve, name="kvcore", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"boot {self.runs.boot:x}"
        return f"<Connection {self._address} {state}, {len(self._posted)} pending>"

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
        return self._queue(_make(request, timeout_s, retry, late))

    def call(
        self,
        request: Request[R],
        timeout_s: float,
        retry: Retry | None = None,
        late: Late | None = None,
    ) -> R:
        """Send a request and wait for its answer; errors as for `submit`."""
        result: R = self._ask(_make(request, timeout_s, retry, late))
        return result

    def register(
        self, request: Registration, timeout_s: float, told: Told | None = None
    ) -> RegisterReply:
        """Register now, and again whenever another run of the server is met.

        `told` is given every reply, this one before it is returned. What it raises
        this time is raised here.
        """
        pending = _make(request, timeout_s)
        pending.taken = partial(self.runs.remember, request, told)
        reply: RegisterReply = self._ask(pending)
        return reply

    def call_all(self, requests: Sequence[Request[Any]], timeout_s: float) -> list[Any]:
        """Send requests at once and wait for all answers; raises the first error.

        They are served in this order, in about the time of one.
        """
        if not self._io.acquire(blocking=False):
            futures = [self.submit(request, timeout_s) for request in requests]
            return [future.result() for future in futures]
        try:
            pendings = [_make(request, timeout_s) for request in requests]
            self._carry(
                pendings, lambda: self._closed or all(p.is_done for p in pendings)
            )
        finally:
            self._io.release()
        return [pending.result() for pending in pendings]

    def close(self) -> None:
        """Say goodbye; what is unanswered ends with `Closed`. Idempotent.

        A future's callback does not wait for that: it would wait for itself.
        """
        with self._gate:
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)
        if not self.is_served_here:
            self._thread.join()

    @property
    def is_served_here(self) -> bool:
        """Whether this thread serves the socket: it must not wait for an answer."""
        return threading.get_ident() in (self._caller, self._thread.ident)

    def _queue(self, pending: PendingRequest) -> Future[Any]:
        with self._gate:
            self._check_open()
            future = pending.promise()
            self._outbox.append(pending)
            os.eventfd_write(self._wake, 1)
        return future

    def _ask(self, pending: PendingRequest) -> Any:
        if not self._io.acquire(blocking=False):
            return self._queue(pending).result()
        try:
            self._carry((pending,), lambda: pending.is_done or self._closed)
        finally:
            self._io.release()
        return pending.result()

    def _carry(
        self, pendings: Sequence[PendingRequest], done: Callable[[], bool]
    ) -> None:
        """Send requests and serve the socket until `done`; for who holds `_io`."""
        self._check_open()
        self._caller = threading.get_ident()
        try:
            for pending in pendings:
                self._transmit(pending)
            self._drive(done)
        finally:
            if self._closed:
                for pending in pendings:
                    pending.fail(_closed())
            self._hand_over()
            self._caller = 0

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    def _hand_over(self) -> None:
        """Leave what is still under way to the connection's thread.

        It may have missed why it was woken, since this one took the wake-up; and it
        may sleep for longer than it now should.
        """
        sleeps_too_long = self.runs.due_ns < self._sleeps_until_ns
        if self._closed or self._is_busy or sleeps_too_long:
            os.eventfd_write(self._wake, 1)

    # -- the connection's thread ----------------------------------------------------

    def _serve(self) -> None:
        """Sleep until there is something for this thread, then take the socket."""
        try:
            while not self._closed:
                self._epoll.poll(_seconds_until(self._sleeps_until_ns))
                with self._io:
                    # Here, since `_drive` does not look when there is nothing to do:
                    # an idle client would never see that its server died.
                    self._look_around()
                    self.runs.tick(monotonic_ns())
                    self._drive(lambda: self._closed or not self._is_busy)
                    self._sleeps_until_ns = self.runs.due_ns
        finally:
            with self._gate:
                self._closed = True
            with self._io:
                self._release()

    @property
    def _is_busy(self) -> bool:
        return bool(self._posted or self._outbox or self.runs.waiting)

    def _release(self) -> None:
        """End what is unanswered, and give back all that was opened."""
        is_known = self.runs.is_known
        self._posted.fail(_closed())
        for queue in (self._outbox, self.runs.waiting):
            while queue:
                queue.popleft().fail(_closed())
        if is_known:
            self._post(PendingRequest(Goodbye(), 0))
        self._socket.close()
        self._context.term()
        self.runs.close()
        self._epoll.close()
        os.close(self._wake)

    # -- whoever holds the socket ---------------------------------------------------

    def _drive(self, done: Callable[[], bool]) -> None:
        """Send, receive and expire until `done`."""
        while True:
            while self._outbox:
                self._transmit(self._outbox.popleft())
            if done():
                return
            due_ns = min(self._posted.earliest_ns, self.runs.due_ns)
            for source, _ in zmq.zmq_poll(self._sources, _milliseconds_until(due_ns)):
                if source is self._socket:
                    self._receive()
                else:
                    self._look_around()
            now = monotonic_ns()
            self._posted.expire(now)
            self.runs.tick(now)

    def _look_around(self) -> None:
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            else:
                self.runs.gone(fd)

    def _transmit(self, pending: PendingRequest) -> None:
        """Send to the run that is there, or have it wait for one."""
        if self.runs.boot == NO_BOOT:
            self.runs.wait(pending)
        else:
            self._post(pending)

    def _post(self, pending: PendingRequest) -> None:
        """Send now, met or not; what cannot be sent has failed."""
        pending.id = next(self._ids)
        pending.boot = self.runs.boot
        pending.num_sends += 1
        try:
            self._send(pending)
        except Exception as error:  # noqa: BLE001 - the future carries it
            self._posted.by_id.pop(pending.id, None)
            pending.fail(error)

    def _send(self, pending: PendingRequest) -> None:
        frame = encode_request(
            pending.request, pending.id, pending.boot, pending.deadline_ns
        )
        peer = self.runs.peer
        if peer is not None and len(frame) > peer.hello.max_message_bytes:
            raise TooLarge(
                f"a request of {len(frame)} bytes; the server reads at most "
                f"{peer.hello.max_message_bytes}"
            )
        self._posted.add(pending)
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            if not pending.request.ends_work:
                raise Overloaded("too many requests are waiting to be sent") from None
            # The server must hear of it: sent when the queue has moved.
            self._posted.set_aside(pending)

    def _receive(self) -> None:
        for _ in range(MAX_RECEIVES):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frame)
            for _ in range(len(self._posted.unsent)):
                self._transmit(self._posted.unsent.popleft())
            if not self._posted:
                return

    def _take(self, frame: bytes) -> None:
        try:
            envelope = decode_reply(frame)
        except BadRequest as error:
            log.warning("dropped a frame from %s: %s", self._address, error)
            return
        pending = self._posted.by_id.pop(envelope.id, None)
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

    def _take_error(self, pending: PendingRequest, error: KVError) -> None:
        if isinstance(error, StaleBoot):
            self.runs.refused(pending.boot)
        again = None if pending.is_done else self._again(pending, error)
        if again is None:
            pending.fail(error)
        else:
            pending.request = again
            self._transmit(pending)

    def _again(self, pending: PendingRequest, error: KVError) -> Request[Any] | None:
        """Return what to send once more, if anything."""
        if pending.num_sends >= MAX_SENDS:
            return None
        if isinstance(error, StaleBoot):
            return None if pending.is_restoring else pending.request
        return pending.retry(error) if pending.retry else None


def _make(
    request: Request[Any],
    timeout_s: float,
    retry: Retry | None = None,
    late: Late | None = None,
) -> PendingRequest:
    return PendingRequest(request, monotonic_ns() + int(timeout_s * 1e9), retry, late)


def _closed() -> Closed:
    return Closed("the connection was closed")


def _seconds_until(due_ns: int) -> float | None:
    if due_ns == NEVER_NS:
        return None
    return max(0, due_ns - monotonic_ns()) / 1e9


def _milliseconds_until(due_ns: int) -> int:
    if due_ns == NEVER_NS:
        return -1
    return max(0, (due_ns - monotonic_ns()) // 1_000_000 + 1)
