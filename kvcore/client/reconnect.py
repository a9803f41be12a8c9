"""Handshake, re-registration, liveness and failover across server restarts.

Requests that are submitted before the handshake has completed wait here.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import monotonic_ns

from kvcore.client.pending_requests import NEVER_NS, PendingRequest, PendingTable
from kvcore.errors import Closed, DeadlineExceeded, KVError, StaleBoot, Unavailable
from kvcore.process import ServerProcess, pid_namespace, start_time
from kvcore.protocol import (
    NO_BOOT,
    PROTOCOL_VERSION,
    BootToken,
    CBRegisterKVCache,
    Hello,
    HelloReply,
    Ping,
    RegisterKVCache,
    RegisterReply,
)

log = logging.getLogger(__name__)

Registration = RegisterKVCache | CBRegisterKVCache
OnRegistered = Callable[[RegisterReply], object]
"""Called with each reply, by the thread that received it; must not block."""

HELLO_RETRY_NS = 1_000_000_000
"""Back-off before a failed handshake is repeated; doubles with every failure."""
MAX_DOUBLINGS = 6
"""Limits the back-off. ZeroMQ queues the hellos that an absent server does not read."""
PROCESS_KEY = secrets.token_bytes(32)
"""Engine key of the clients that are given none: those of one process share sessions,
and those of its forked children."""


class ReconnectPolicy:
    """The current server process, retired ones, and the registrations to restore.

    Not thread-safe: only the thread that holds the socket calls it.
    `remove_registration` may be called by any thread.
    """

    def __init__(
        self,
        address: str,
        label: str,
        engine_key: bytes | None,
        send: Callable[[PendingRequest], None],
        pending: PendingTable,
        epoll: select.epoll,
    ) -> None:
        self._address = address
        self._label = label
        self._engine_key = PROCESS_KEY if engine_key is None else engine_key
        self._send = send
        self._pending = pending
        self._epoll = epoll
        self.boot = NO_BOOT
        """Boot token of the current server; `NO_BOOT` before the handshake."""
        self.server: ServerProcess | None = None
        self.on_disconnect: list[Callable[[], None]] = []
        """Called when a server is gone, by the thread that noticed."""
        self.waiting: deque[PendingRequest] = deque()
        """Requests to send once the handshake completes."""
        self._next_expiry_ns = NEVER_NS
        self._registered: dict[str, SavedRegistration] = {}
        # Servers that lost their address to another, with requests still pending: their
        # processes may still write to blocks.
        self._retired: list[ServerProcess] = []
        self._hello: PendingRequest | None = None
        self._num_attempts = 0
        """Hellos sent since the last handshake whose registrations succeeded."""
        self._last_hello_ns = 0
        self._next_hello_ns = NEVER_NS
        """Time of the next scheduled hello."""
        self._next_heartbeat_ns = NEVER_NS

    @property
    def next_timer_ns(self) -> int:
        """Time of the next call of `run_timers`, at the latest."""
        return min(self._next_hello_ns, self._next_heartbeat_ns, self._next_expiry_ns)

    @property
    def needs_goodbye(self) -> bool:
        """Whether a server knows this client or may still read its hello."""
        return self.boot != NO_BOOT or self._num_attempts > 0

    def enqueue(self, pending: PendingRequest) -> None:
        """Queue a request until the handshake completes, and start one."""
        self.waiting.append(pending)
        if pending.deadline_ns:
            self._next_expiry_ns = min(self._next_expiry_ns, pending.deadline_ns)
        self._start_handshake()

    def mark_stale(self, boot: BootToken) -> None:
        """Record that the server rejected this boot token: a handshake is needed."""
        if self.boot == boot:
            self.boot = NO_BOOT

    def run_timers(self, now: int) -> None:
        """Send due hellos and heartbeats; fail waiting requests past their deadline."""
        if self._next_hello_ns <= now:
            self._start_handshake()
        if self.server is not None and self._next_heartbeat_ns <= now:
            self._send_heartbeat(now + self.server.heartbeat_interval_ns)
        if self._next_expiry_ns <= now:
            self._expire(now)

    def _send_heartbeat(self, next_ns: int) -> None:
        self._next_heartbeat_ns = next_ns
        if self.boot == NO_BOOT:
            self._start_handshake()
        else:
            self._send(PendingRequest(Ping(), next_ns))

    def _expire(self, now: int) -> None:
        expired = [p for p in self.waiting if 0 < p.deadline_ns <= now]
        for pending in expired:
            self.waiting.remove(pending)
        remaining = (p.deadline_ns for p in self.waiting if p.deadline_ns)
        self._next_expiry_ns = min(remaining, default=NEVER_NS)
        for pending in expired:
            pending.fail(Unavailable(f"no server answers at {self._address}"))

    def close(self) -> None:
        """Close the pidfds of all servers."""
        for server in (self.server, *self._retired):
            if server is not None:
                server.close()

    # -- registrations ----------------------------------------------------------------

    def add_registration(
        self,
        request: Registration,
        on_registered: OnRegistered | None,
        reply: RegisterReply,
    ) -> None:
        """Repeat a registration with every later server.

        Called as soon as the first reply is received: a later handshake could
        otherwise complete before the registration is known, and would not repeat it.
        """
        self._registered[request.instance_id] = SavedRegistration(
            request, on_registered
        )
        if on_registered is not None:
            on_registered(reply)

    def remove_registration(self, instance_id: str) -> None:
        """Stop repeating a registration. Thread-safe."""
        self._registered.pop(instance_id, None)

    def _restore_registrations(self) -> None:
        for registered in list(self._registered.values()):
            restoring = PendingRequest(registered.request, 0)
            restoring.is_restoring = True
            restoring.create_future().add_done_callback(
                partial(self._finish_restore, registered)
            )
            self._send(restoring)

    def _finish_restore(
        self, registered: SavedRegistration, future: Future[RegisterReply]
    ) -> None:
        """Handle the reply to a repeated registration."""
        try:
            reply = future.result()
            if registered.on_registered is not None:
                registered.on_registered(reply)
        except StaleBoot:  # The server restarted; the next handshake repeats it.
            if self.boot == NO_BOOT:
                self._start_handshake()
            return
        except Closed:
            return
        except KVError as error:
            log.warning("could not restore a registration: %s", error)
        self._num_attempts = 0

    # -- handshake --------------------------------------------------------------------

    def _start_handshake(self) -> None:
        """Send a hello unless one is pending; `_finish_handshake` handles the reply.

        From the third hello without success on, `run_timers` sends it after a back-off:
        a server may accept every hello and then reject the registrations as stale.
        """
        if self._hello is not None:
            return
        now = monotonic_ns()
        self._next_hello_ns = now
        if self._num_attempts > 1:
            self._next_hello_ns = self._last_hello_ns + _back_off_ns(
                self._num_attempts - 2
            )
        if self._next_hello_ns <= now:
            self._send_hello(now)

    def _send_hello(self, now: int) -> None:
        pid = os.getpid()
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            pid=pid,
            pid_start=start_time(pid) or 0,
            pid_namespace=pid_namespace(),
            label=self._label,
            engine_key=self._engine_key,
        )
        self._hello = PendingRequest(hello, now + _back_off_ns(self._num_attempts))
        self._next_hello_ns = NEVER_NS
        self._last_hello_ns = now
        self._num_attempts += 1
        self._hello.create_future().add_done_callback(self._finish_handshake)
        self._send(self._hello)

    def _finish_handshake(self, future: Future[HelloReply]) -> None:
        self._hello = None
        error = future.exception()
        if isinstance(error, DeadlineExceeded):
            # The server that received it may have died: repeat it while needed.
            if self.waiting or self._registered:
                self._start_handshake()
            return
        if error is not None:
            self._num_attempts = 0
            waiting, self.waiting = self.waiting, deque()
            for pending in waiting:
                pending.fail(error)
            return
        self._accept(future.result())
        self._restore_registrations()
        for _ in range(len(self.waiting)):
            self._send(self.waiting.popleft())

    def _accept(self, hello: HelloReply) -> None:
        """Make a server the current one, and watch its process if it is visible."""
        previous = self.server
        self.boot = hello.boot
        if not self._registered:
            self._num_attempts = 0
        if previous is not None:
            if previous.hello.boot == hello.boot:
                return
            self._retire(previous)
        self.server = ServerProcess.watch(hello)
        self._next_heartbeat_ns = NEVER_NS
        if not hello.watched:
            self._next_heartbeat_ns = monotonic_ns() + self.server.heartbeat_interval_ns
        if self.server.pidfd is not None:
            self._epoll.register(self.server.pidfd, select.EPOLLIN)

    # -- failover ---------------------------------------------------------------------

    def _retire(self, server: ServerProcess) -> None:
        """Replace a server that lost its address to another; it may still run."""
        if server.pidfd is None:
            # Its process is not visible: losing the address counts as its end.
            self._fail_pending(server)
        self._notify_disconnect()
        if self._pending.has_boot(server.hello.boot):
            self._retired.append(server)
        else:
            self._unwatch(server)

    def handle_exit(self, pidfd: int) -> None:
        """Handle the exit of a server's process."""
        server = self.server
        if server is not None and server.pidfd == pidfd:
            self._notify_disconnect()
            self._unwatch(server)
            self.server = None
            self._next_heartbeat_ns = NEVER_NS
            self.boot = NO_BOOT
            self._fail_pending(server)
            if self._registered:
                self._start_handshake()
            return
        for retired in [server for server in self._retired if server.pidfd == pidfd]:
            self._retired.remove(retired)
            self._unwatch(retired)
            self._fail_pending(retired)

    def _fail_pending(self, server: ServerProcess) -> None:
        error = Unavailable(f"the server (process {server.hello.pid}) is gone")
        self._pending.fail(error, server.hello.boot)

    def _notify_disconnect(self) -> None:
        for callback in self.on_disconnect:
            callback()

    def _unwatch(self, server: ServerProcess) -> None:
        if server.pidfd is not None:
            self._epoll.unregister(server.pidfd)
        server.close()


@dataclass(frozen=True, slots=True)
class SavedRegistration:
    """A registration to repeat with every server, and the callback for its replies."""

    request: Registration
    on_registered: OnRegistered | None


def _back_off_ns(num_failures: int) -> int:
    return HELLO_RETRY_NS << min(num_failures, MAX_DOUBLINGS)
