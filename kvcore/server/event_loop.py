"""The event loop: one thread that receives, serves short requests, and replies.

Nothing in it blocks. Handlers with much to hash or look up are generators and run one
slice at a time between receives; copies run on other threads and report finished
futures through an eventfd. The loop sleeps in one poll over the socket, that eventfd
and the clients' pidfds, until one is ready or the next deadline.
"""

from __future__ import annotations

import logging
import os
import select
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf
from time import monotonic, monotonic_ns
from typing import Any

import msgspec
import zmq

from kvcore.engine.request_context import DeferredReply
from kvcore.errors import (
    BadRequest,
    DeadlineExceeded,
    Internal,
    KVError,
    Overloaded,
    StaleBoot,
)
from kvcore.protocol import BootToken, Goodbye, Hello, Request
from kvcore.server.client_table import Client, ClientTable
from kvcore.wire import (
    RequestEnvelope,
    RequestType,
    decode_envelope,
    decode_request,
    encode_error,
    encode_reply,
)

log = logging.getLogger(__name__)

Handler = Callable[[Any, Client, int], Any]
"""Takes a request, its client and its deadline; returns a reply, a
`DeferredReply`, or a generator that yields between slices and returns either."""


MAX_SKIPPED = 256
"""Frames dropped per poll, in 0.1 ms; then other requests are served."""


@dataclass(slots=True)
class RequestTask:
    """A request being served, and the client that its reply goes to."""

    client: Client
    request_id: int
    name: str
    num_bytes: int
    steps: Generator[None, None, Any] | None = None
    running: DeferredReply | None = None


class EventLoop:
    """Serves the requests in `handlers`, for clients that sent HELLO."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        boot: BootToken,
        clients: ClientTable,
        max_requests_per_client: int,
        max_bytes_per_client: int,
    ) -> None:
        self._socket = socket
        self._boot = boot
        self._clients = clients
        self._max_requests = max_requests_per_client
        self._max_bytes = max_bytes_per_client
        self._handlers: dict[str, Handler] = {}
        self._on_gone: Callable[[Client], None]
        self._sliced: deque[RequestTask] = deque()
        self._finished: deque[RequestTask] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        # The remaining frames of a refused message are still to be read.
        self._is_skipping = False
        self._stopping = False
        self.num_requests = 0
        self.num_errors = 0
        self.num_replies_lost = 0

    def serve(
        self,
        handlers: dict[str, Handler],
        on_gone: Callable[[Client], None],
        upkeep: Callable[[], float | None],
        upkeep_s: float,
    ) -> None:
        """Run until `stop`.

        `upkeep` ends what has expired and returns when to call it again, None if
        nothing can expire; nothing that begins later expires within `upkeep_s`.
        """
        self._handlers = handlers
        self._on_gone = on_gone
        sources: list[tuple[Any, int]] = [
            (self._socket, zmq.POLLIN),
            (self._epoll.fileno(), zmq.POLLIN),
        ]
        look_again = inf
        while not self._stopping:
            if monotonic() >= look_again:
                due = upkeep()
                look_again = inf if due is None else due
            for source, _ in zmq.zmq_poll(sources, self._timeout_ms(look_again)):
                if source is self._socket:
                    self._receive()
                else:
                    self._handle_events()
                # What begins now may expire then, and not earlier.
                look_again = min(look_again, monotonic() + upkeep_s)
            self._step()

    def stop(self) -> None:
        """Make `serve` return soon. Any thread, and signal handlers."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def watch(self, fd: int) -> None:
        """Wake the loop when a pidfd is ready."""
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Stop watching a pidfd."""
        self._epoll.unregister(fd)

    def close(self) -> None:
        """Close the loop's own descriptors; not the socket."""
        self._epoll.close()
        os.close(self._wake)

    def _timeout_ms(self, deadline: float) -> int:
        if self._sliced:
            return 0
        if deadline == inf:
            return -1
        return max(0, int((deadline - monotonic()) * 1e3) + 1)

    # -- receiving ----------------------------------------------------------------

    def _receive(self) -> None:
        """Receive one message.

        The next poll tells more cheaply than EAGAIN whether there is another.
        """
        if self._is_skipping:
            self._skip()
            return
        try:
            identity = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
        frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        self._is_skipping = frame.more
        self.num_requests += 1
        self._serve_message(identity, frame)

    def _skip(self) -> None:
        """Drop surplus frames of a message, up to `MAX_SKIPPED` per poll.

        Only the size of a frame is limited, not the number of frames.
        """
        for _ in range(MAX_SKIPPED):
            if not self._socket.recv(zmq.NOBLOCK, copy=False).more:
                self._is_skipping = False
                return

    def _serve_message(self, identity: bytes, frame: zmq.Frame) -> None:
        request_id = 0
        try:
            if frame.more:
                raise BadRequest("a request is one frame, and this has more")
            envelope = decode_envelope(frame.buffer)
            request_id = envelope.id
            kind, request = decode_request(envelope)
            num_bytes = len(frame.buffer)
            client = self._admit(identity, envelope, request, num_bytes)
        except KVError as error:
            if not request_id:
                request_id = int(error.details.get("id", 0))
            self._send_error(identity, request_id, error)
            return
        except Exception as error:
            log.error("a message could not be read", exc_info=error)
            self._send_error(identity, request_id, Internal(type(error).__name__))
            return
        self._start(client, envelope, kind, request, num_bytes)

    def _admit(
        self,
        identity: bytes,
        envelope: RequestEnvelope,
        request: Request[Any],
        num_bytes: int,
    ) -> Client:
        """Return the client of a request; HELLO adds it."""
        client = self._clients.get(identity)
        if isinstance(request, Hello):
            if client is not None and client.pid == request.pid:
                return client
            if client is not None:
                self._gone(client)
            return self._clients.add(identity, request)
        # GOODBYE may follow HELLO before the client has the boot token.
        is_of_this_run = envelope.boot == self._boot or isinstance(request, Goodbye)
        if client is None or not is_of_this_run:
            raise StaleBoot("not a client of this run of the server: say hello first")
        self._clients.seen(client)
        if client.num_running >= self._max_requests and not request.ends_work:
            raise Overloaded(
                f"{client.num_running} requests of this client are unanswered"
            )
        num_running = client.running_bytes + num_bytes
        if num_running > self._max_bytes and client.num_running:
            raise Overloaded(f"{num_running} bytes of requests are unanswered")
        return client

    def _start(
        self,
        client: Client,
        envelope: RequestEnvelope,
        kind: RequestType,
        request: Request[Any],
        num_bytes: int,
    ) -> None:
        task = RequestTask(client, envelope.id, kind.name, num_bytes)
        client.num_running += 1
        client.running_bytes += num_bytes
        deadline = envelope.deadline_ns
        try:
            if kind.request.is_void_late and 0 < deadline < monotonic_ns():
                raise DeadlineExceeded("the deadline had passed on arrival")
            result = self._handlers[kind.name](request, client, deadline)
        except Exception as error:  # noqa: BLE001 - becomes an error reply
            self._fail(task, error)
            return
        if isinstance(result, Generator):
            task.steps = result
            self._advance(task)
        else:
            self._settle(task, result)

    # -- serving ------------------------------------------------------------------

    def _step(self) -> None:
        """Run one slice of one request; a receive comes between any two."""
        if self._sliced:
            self._advance(self._sliced.popleft())

    def _advance(self, task: RequestTask) -> None:
        if task.steps is None:
            return
        try:
            next(task.steps)
        except StopIteration as stop:
            task.steps = None
            self._settle(task, stop.value)
        except Exception as error:  # noqa: BLE001 - becomes an error reply
            task.steps = None
            self._fail(task, error)
        else:
            self._sliced.append(task)

    def _settle(
        self, task: RequestTask, result: msgspec.Struct | DeferredReply
    ) -> None:
        if not isinstance(result, DeferredReply):
            self._reply(task, result)
            return
        task.running = result

        def done(_: Future[Any]) -> None:
            self._finished.append(task)
            os.eventfd_write(self._wake, 1)

        result.future.add_done_callback(done)

    def _handle_events(self) -> None:
        """Handle finished work and ended clients."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            else:
                client = self._clients.by_pidfd(fd)
                if client is not None:
                    self._gone(client)
        self.finish()

    def finish(self) -> None:
        """Reply to the requests whose work on other threads has ended."""
        while self._finished:
            task = self._finished.popleft()
            if task.running is None:
                continue
            try:
                reply = task.running.finish()
            except Exception as error:  # noqa: BLE001 - becomes an error reply
                self._fail(task, error)
            else:
                self._reply(task, reply)

    def drop(self, client: Client) -> None:
        """Remove a client: its slices end here, its running work gets no reply."""
        for task in [task for task in self._sliced if task.client is client]:
            self._sliced.remove(task)
            if task.steps is not None:
                task.steps.close()
        self._clients.remove(client)

    def _gone(self, client: Client) -> None:
        self.drop(client)
        self._on_gone(client)

    def expire_silent(self) -> None:
        """End unwatched clients that no longer send heartbeats."""
        for client in self._clients.silent():
            log.info("client %s (%s) fell silent", client.pid, client.label)
            self._gone(client)

    # -- replies ------------------------------------------------------------------

    def _reply(self, task: RequestTask, reply: msgspec.Struct) -> None:
        try:
            frame = encode_reply(task.request_id, reply)
        except Exception as error:  # noqa: BLE001 - becomes an error reply
            self._fail(task, error)
            return
        self._end(task)
        self._send(task.client.identity, frame)

    def _fail(self, task: RequestTask, error: Exception) -> None:
        self._end(task)
        if not isinstance(error, KVError):
            log.error("%s failed", task.name, exc_info=error)
            error = Internal(f"{task.name}: {type(error).__name__}: {error}")
        self._send_error(task.client.identity, task.request_id, error)

    def _end(self, task: RequestTask) -> None:
        task.client.num_running -= 1
        task.client.running_bytes -= task.num_bytes

    def _send_error(self, identity: bytes, request_id: int, error: KVError) -> None:
        self.num_errors += 1
        self._send(identity, encode_error(request_id, error))

    def _send(self, identity: bytes, frame: bytes) -> None:
        """Send without waiting; a client that does not read loses the reply.

        A reply to a client that has left is not counted as lost.
        """
        try:
            self._socket.send(identity, zmq.SNDMORE | zmq.NOBLOCK)
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            if self._clients.get(identity) is not None:
                self.num_replies_lost += 1
