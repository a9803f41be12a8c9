"""Connection to one server: sends requests and matches each reply to its request.

A ZeroMQ socket must not be used by two threads at once. `_socket_lock` decides which
thread uses it:

1. A call takes the lock if it is free, sends its request, waits for the reply in the
   calling thread and releases the lock. No other thread takes part, which saves 50 us
   per call (docs/performance.md).
2. When it releases the lock, and requests of others or timers remain, it wakes the
   background thread, which takes the lock and serves the socket while any request is
   pending.
3. A call that finds the lock taken, and every `submit`, appends its request to the
   outbox and writes to an eventfd. The thread that holds the lock polls that eventfd
   along with the socket, and sends the request.

A restarted server rejects requests that carry its predecessor's boot token.
`ReconnectPolicy` then repeats the handshake and the registrations, and the rejected
requests are sent again. Callers only notice the delay.
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
    OnLateReply,
    PendingRequest,
    PendingTable,
    Retry,
)
from kvcore.client.reconnect import OnRegistered, ReconnectPolicy, Registration
from kvcore.errors import (
    BadRequest,
    Closed,
    KVError,
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
"""Frames read at most between two checks of the deadlines."""

MAX_SENDS = 4
"""Sends of one request at most; then its error is final."""


class Connection:
    """A DEALER socket, its pending requests, and a background thread to serve them."""

    def __init__(
        self, address: str, label: str, engine_key: bytes | None = None
    ) -> None:
        self._address = address
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        # Set explicitly so that it stays the same when TCP reconnects.
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
        self._socket_lock = threading.Lock()
        # Held to submit and to start closing: no request is submitted afterwards.
        self._submit_lock = threading.Lock()
        self._ids = count(1)
        self._outbox: deque[PendingRequest] = deque()
        self._pending = PendingTable()
        self._closed = False
        # The calling thread that holds `_socket_lock`; 0 for none.
        self._calling_thread_id = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self.reconnect = ReconnectPolicy(
            address, label, engine_key, self._send_now, self._pending, self._epoll
        )
        self._sources: list[tuple[Any, int]] = [
            (self._socket, zmq.POLLIN),
            (self._epoll.fileno(), zmq.POLLIN),
        ]
        self._wake_at_ns = NEVER_NS
        self._thread = threading.Thread(
            target=self._run_background_thread, name="kvcore", daemon=True
        )
        self._thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"boot {self.reconnect.boot:x}"
        return f"<Connection {self._address} {state}, {len(self._pending)} pending>"

    # -- any thread -----------------------------------------------------------------

    def submit(
        self,
        request: Request[R],
        timeout_s: float,
        retry: Retry | None = None,
        on_late_reply: OnLateReply | None = None,
    ) -> Future[R]:
        """Send a request without waiting for the network.

        Its callbacks run on the thread that holds the socket and must not wait for
        other requests; they may close the connection.

        Args:
            request: the request.
            timeout_s: seconds until the deadline.
            retry: returns the request to send in place of a failed one, or None.
            on_late_reply: called with a reply that arrives after the deadline.

        Raises (through the future):
            DeadlineExceeded: no reply in time. Never for a retrieve: its blocks belong
                to the server until it replies or its process ends.
            Unavailable: the server's process ended.
            KVError: the error that the server replied.
        """
        return self._enqueue(_new_pending(request, timeout_s, retry, on_late_reply))

    def call(
        self,
        request: Request[R],
        timeout_s: float,
        retry: Retry | None = None,
        on_late_reply: OnLateReply | None = None,
    ) -> R:
        """Send a request and wait for its reply. See `submit`."""
        result: R = self._send_and_wait(
            _new_pending(request, timeout_s, retry, on_late_reply)
        )
        return result

    def register(
        self,
        request: Registration,
        timeout_s: float,
        on_registered: OnRegistered | None = None,
    ) -> RegisterReply:
        """Register now, and again with every restarted server.

        `on_registered` is called with every reply, with the first one before this
        method returns. An exception of that first call is raised here.
        """
        pending = _new_pending(request, timeout_s)
        pending.on_reply = partial(
            self.reconnect.add_registration, request, on_registered
        )
        reply: RegisterReply = self._send_and_wait(pending)
        return reply

    def call_all(self, requests: Sequence[Request[Any]], timeout_s: float) -> list[Any]:
        """Send requests at once and wait for all replies; raises the first error.

        The server handles them in this order, in about the time of one.
        """
        if not self._socket_lock.acquire(blocking=False):
            futures = [self.submit(request, timeout_s) for request in requests]
            return [future.result() for future in futures]
        try:
            pendings = [_new_pending(request, timeout_s) for request in requests]
            self._exchange(
                pendings, lambda: self._closed or all(p.is_done for p in pendings)
            )
        finally:
            self._socket_lock.release()
        return [pending.result() for pending in pendings]

    def close(self) -> None:
        """Send a goodbye and fail pending requests with `Closed`. Idempotent.

        Waits for the background thread, except when called on a thread that serves
        the socket (in a future's callback).
        """
        with self._submit_lock:
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)
        if not self.is_serving_thread:
            self._thread.join()

    @property
    def is_serving_thread(self) -> bool:
        """Whether the current thread serves the socket, and so must not wait."""
        return threading.get_ident() in (self._calling_thread_id, self._thread.ident)

    def _enqueue(self, pending: PendingRequest) -> Future[Any]:
        with self._submit_lock:
            self._check_open()
            future = pending.create_future()
            self._outbox.append(pending)
            os.eventfd_write(self._wake, 1)
        return future

    def _send_and_wait(self, pending: PendingRequest) -> Any:
        if not self._socket_lock.acquire(blocking=False):
            return self._enqueue(pending).result()
        try:
            self._exchange((pending,), lambda: pending.is_done or self._closed)
        finally:
            self._socket_lock.release()
        return pending.result()

    def _exchange(
        self, pendings: Sequence[PendingRequest], done: Callable[[], bool]
    ) -> None:
        """Send requests and serve the socket until `done`; requires `_socket_lock`."""
        self._check_open()
        self._calling_thread_id = threading.get_ident()
        try:
            for pending in pendings:
                self._transmit(pending)
            self._poll_until(done)
        finally:
            if self._closed:
                for pending in pendings:
                    pending.fail(_closed())
            self._hand_over_socket()
            self._calling_thread_id = 0

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    def _hand_over_socket(self) -> None:
        """Wake the background thread if pending requests or timers remain.

        This thread may have consumed its wake-up, and a timer may be due before the
        background thread's poll ends.
        """
        sleeps_too_long = self.reconnect.next_timer_ns < self._wake_at_ns
        if self._closed or self._is_busy or sleeps_too_long:
            os.eventfd_write(self._wake, 1)

    # -- background thread ----------------------------------------------------------

    def _run_background_thread(self) -> None:
        """Wait for a wake-up, a timer or a process exit; then serve the socket."""
        try:
            while not self._closed:
                self._epoll.poll(_seconds_until(self._wake_at_ns))
                with self._socket_lock:
                    # `_poll_until` returns at once when nothing is pending; an idle
                    # client must still notice that its server's process ended.
                    self._handle_epoll_events()
                    self.reconnect.run_timers(monotonic_ns())
                    self._poll_until(lambda: self._closed or not self._is_busy)
                    self._wake_at_ns = self.reconnect.next_timer_ns
        finally:
            with self._submit_lock:
                self._closed = True
            with self._socket_lock:
                self._shut_down()

    @property
    def _is_busy(self) -> bool:
        return bool(self._pending or self._outbox or self.reconnect.waiting)

    def _shut_down(self) -> None:
        """Fail pending requests and release all resources."""
        needs_goodbye = self.reconnect.needs_goodbye
        self._pending.fail(_closed())
        for queue in (self._outbox, self.reconnect.waiting):
            while queue:
                queue.popleft().fail(_closed())
        if needs_goodbye:
            self._send_now(PendingRequest(Goodbye(), 0))
        self._socket.close()
        self._context.term()
        self.reconnect.close()
        self._epoll.close()
        os.close(self._wake)

    # -- the thread that holds the socket -------------------------------------------

    def _poll_until(self, done: Callable[[], bool]) -> None:
        """Send, receive and handle timers until `done`."""
        while True:
            while self._outbox:
                self._transmit(self._outbox.popleft())
            if done():
                return
            due_ns = min(self._pending.next_deadline_ns, self.reconnect.next_timer_ns)
            for source, _ in zmq.zmq_poll(self._sources, _milliseconds_until(due_ns)):
                if source is self._socket:
                    self._receive()
                else:
                    self._handle_epoll_events()
            now = monotonic_ns()
            self._pending.expire(now)
            self.reconnect.run_timers(now)

    def _handle_epoll_events(self) -> None:
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            else:
                self.reconnect.handle_exit(fd)

    def _transmit(self, pending: PendingRequest) -> None:
        """Send a request, or queue it until the server accepts it.

        That is after the handshake, and while less than its limit is in progress.
        """
        if self.reconnect.boot == NO_BOOT:
            self.reconnect.enqueue(pending)
        elif self._is_full and not pending.request.ends_work:
            pending.boot = self.reconnect.boot
            self._pending.wait(pending)
        else:
            self._send_now(pending)

    @property
    def _is_full(self) -> bool:
        """Whether as many requests are in progress as the server accepts."""
        server = self.reconnect.server
        return server is not None and len(self._pending.by_id) >= (
            server.hello.max_requests
        )

    def _send_waiting(self) -> None:
        """Send requests that waited for room, the first ones first."""
        unsent = self._pending.unsent
        while unsent and (unsent[0].request.ends_work or not self._is_full):
            first = unsent.popleft()
            if not first.is_done:  # Its deadline may have passed.
                self._transmit(first)
            if unsent and unsent[0] is first:
                return  # The socket's queue is full.

    def _send_now(self, pending: PendingRequest) -> None:
        """Send regardless of the handshake; fail the request if it cannot be sent."""
        pending.id = next(self._ids)
        pending.boot = self.reconnect.boot
        pending.num_sends += 1
        try:
            self._write_frame(pending)
        except Exception as error:  # noqa: BLE001 - the future carries it
            self._pending.by_id.pop(pending.id, None)
            pending.fail(error)

    def _write_frame(self, pending: PendingRequest) -> None:
        frame = encode_request(
            pending.request, pending.id, pending.boot, pending.deadline_ns
        )
        server = self.reconnect.server
        if server is not None and len(frame) > server.hello.max_message_bytes:
            raise TooLarge(
                f"a request of {len(frame)} bytes; the server accepts at most "
                f"{server.hello.max_message_bytes}"
            )
        self._pending.add(pending)
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:  # The queue of the socket is full.
            self._pending.defer(pending)

    def _receive(self) -> None:
        for _ in range(MAX_RECEIVES):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle_reply(frame)
            if self._pending.unsent:
                self._send_waiting()
            if not self._pending:
                return

    def _handle_reply(self, frame: bytes) -> None:
        try:
            envelope = decode_reply(frame)
        except BadRequest as error:
            log.warning("dropped an unreadable frame from %s: %s", self._address, error)
            return
        pending = self._pending.by_id.pop(envelope.id, None)
        if pending is None:
            return
        try:
            if envelope.code:
                body = decode_error(envelope.body)
                self._handle_error(
                    pending, from_wire(envelope.code, body.message, body.details)
                )
            else:
                decoder = BY_CLASS[type(pending.request)].reply_decoder
                pending.succeed(decoder.decode(envelope.body))
        except UNREADABLE as error:
            pending.fail(BadRequest(f"reply: {error}"))

    def _handle_error(self, pending: PendingRequest, error: KVError) -> None:
        if isinstance(error, StaleBoot):
            self.reconnect.mark_stale(pending.boot)
        again = None if pending.is_done else self._next_attempt(pending, error)
        if again is None:
            pending.fail(error)
        else:
            pending.request = again
            self._transmit(pending)

    def _next_attempt(
        self, pending: PendingRequest, error: KVError
    ) -> Request[Any] | None:
        """Return the request to send again after an error, or None."""
        if pending.num_sends >= MAX_SENDS:
            return None
        if isinstance(error, StaleBoot):
            return None if pending.is_restoring else pending.request
        return pending.retry(error) if pending.retry else None


def _new_pending(
    request: Request[Any],
    timeout_s: float,
    retry: Retry | None = None,
    on_late_reply: OnLateReply | None = None,
) -> PendingRequest:
    return PendingRequest(
        request, monotonic_ns() + int(timeout_s * 1e9), retry, on_late_reply
    )


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
