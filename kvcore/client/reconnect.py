"""The runs of a server, one after the other, as one connection meets them.

Each is greeted, told what is registered, watched or shown life, and outlived. What
cannot be sent before a run is met waits here.
"""

from __future__ import annotations

import logging
import os
import select
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import monotonic_ns

from kvcore.client.pending_requests import NEVER_NS, PendingRequest, PendingTable
from kvcore.client.server_process import ServerProcess
from kvcore.errors import Closed, DeadlineExceeded, KVError, StaleBoot, Unavailable
from kvcore.process import pid_namespace, start_time
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
Told = Callable[[RegisterReply], object]
"""Given what a run answered, by the thread that took it in; must not wait."""

HELLO_AGAIN_NS = 1_000_000_000
"""A hello that led nowhere is said again after this, then after twice that."""
MAX_DOUBLINGS = 6
"""ZeroMQ queues what nobody takes, up to a bound: few hellos for a long absence."""


class ReconnectPolicy:
    """The run that is met, those outlived, and what each is told.

    Whoever holds the socket calls it, but for `remember` and `forget`.
    """

    def __init__(
        self,
        address: str,
        label: str,
        post: Callable[[PendingRequest], None],
        posted: PendingTable,
        epoll: select.epoll,
    ) -> None:
        self._address = address
        self._label = label
        self._post = post
        self._posted = posted
        self._epoll = epoll
        self.boot = NO_BOOT
        """The run that takes requests; `NO_BOOT` before it is met."""
        self.peer: ServerProcess | None = None
        self.on_leave: list[Callable[[], None]] = []
        """Told that a run is gone, by the thread that found out."""
        self.waiting: deque[PendingRequest] = deque()
        """To be sent when a run is met."""
        self._waits_until_ns = NEVER_NS
        self._registered: dict[str, _Registration] = {}
        # Runs whose address is another's, while they may still write what was asked.
        self._outlived: list[ServerProcess] = []
        self._hello: PendingRequest | None = None
        self._num_hellos = 0
        """Said since a run last took what it was told."""
        self._said_ns = 0
        self._hello_ns = NEVER_NS
        """When the next one is to be said."""
        self._beat_ns = NEVER_NS

    @property
    def due_ns(self) -> int:
        """When `tick` has something to do; not after this."""
        return min(self._hello_ns, self._beat_ns, self._waits_until_ns)

    @property
    def is_known(self) -> bool:
        """Whether a run has this client in its table, or may yet read its hello."""
        return self.boot != NO_BOOT or self._num_hellos > 0

    def wait(self, pending: PendingRequest) -> None:
        """Keep a request until a run is met."""
        self.waiting.append(pending)
        if pending.deadline_ns:
            self._waits_until_ns = min(self._waits_until_ns, pending.deadline_ns)
        self._greet()

    def refused(self, boot: BootToken) -> None:
        """Take in that what was meant for this run is stale."""
        if self.boot == boot:
            self.boot = NO_BOOT

    def tick(self, now: int) -> None:
        """Do what is due: say hello, show life, end what has waited long enough."""
        if self._hello_ns <= now:
            self._greet()
        if self.peer is not None and self._beat_ns <= now:
            self._beat(now + self.peer.beat_ns)
        if self._waits_until_ns <= now:
            self._expire(now)

    def _beat(self, next_ns: int) -> None:
        self._beat_ns = next_ns
        if self.boot == NO_BOOT:
            self._greet()
        else:
            self._post(PendingRequest(Ping(), next_ns))

    def _expire(self, now: int) -> None:
        late = [p for p in self.waiting if 0 < p.deadline_ns <= now]
        for pending in late:
            self.waiting.remove(pending)
        left = (p.deadline_ns for p in self.waiting if p.deadline_ns)
        self._waits_until_ns = min(left, default=NEVER_NS)
        for pending in late:
            pending.fail(Unavailable(f"no server answers at {self._address}"))

    def close(self) -> None:
        """Watch nobody any more."""
        for peer in (self.peer, *self._outlived):
            if peer is not None:
                peer.close()

    # -- registrations ----------------------------------------------------------------

    def remember(
        self, request: Registration, told: Told | None, reply: RegisterReply
    ) -> None:
        """Register this again with every other run; `told` is given each reply.

        Called with the first one where that is taken in: later, the run that gave it
        could have gone and the next been met.
        """
        self._registered[request.instance_id] = _Registration(request, told)
        if told is not None:
            told(reply)

    def forget(self, instance_id: str) -> None:
        """Register it no more. Any thread."""
        self._registered.pop(instance_id, None)

    def _register_all(self) -> None:
        for registered in list(self._registered.values()):
            again = PendingRequest(registered.request, 0)
            again.is_restoring = True
            again.promise().add_done_callback(partial(self._restored, registered))
            self._post(again)

    def _restored(
        self, registered: _Registration, future: Future[RegisterReply]
    ) -> None:
        """Take in another run's reply."""
        try:
            reply = future.result()
            if registered.told is not None:
                registered.told(reply)
        except StaleBoot:  # Another run is met, and is told anew.
            if self.boot == NO_BOOT:
                self._greet()
            return
        except Closed:
            return
        except KVError as error:
            log.warning("could not register again: %s", error)
        self._num_hellos = 0

    # -- greeting ---------------------------------------------------------------------

    def _greet(self) -> None:
        """Say hello, once at a time; `_greeted` goes on.

        From the third in a row that led nowhere on, `tick` says it later: a server may
        answer every hello, and then call stale what it is told.
        """
        if self._hello is not None:
            return
        now = monotonic_ns()
        self._hello_ns = now
        if self._num_hellos > 1:
            self._hello_ns = self._said_ns + _doubled(self._num_hellos - 2)
        if self._hello_ns <= now:
            self._say_hello(now)

    def _say_hello(self, now: int) -> None:
        pid = os.getpid()
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            pid=pid,
            pid_start=start_time(pid) or 0,
            pid_namespace=pid_namespace(),
            label=self._label,
        )
        self._hello = PendingRequest(hello, now + _doubled(self._num_hellos))
        self._hello_ns = NEVER_NS
        self._said_ns = now
        self._num_hellos += 1
        self._hello.promise().add_done_callback(self._greeted)
        self._post(self._hello)

    def _greeted(self, future: Future[HelloReply]) -> None:
        self._hello = None
        error = future.exception()
        if isinstance(error, DeadlineExceeded):
            # It may have reached a server that died: say it again while it matters.
            if self.waiting or self._registered:
                self._greet()
            return
        if error is not None:
            self._num_hellos = 0
            waiting, self.waiting = self.waiting, deque()
            for pending in waiting:
                pending.fail(error)
            return
        self._meet(future.result())
        self._register_all()
        for _ in range(len(self.waiting)):
            self._post(self.waiting.popleft())

    def _meet(self, hello: HelloReply) -> None:
        """Take up with a run; watch its process if that can be done."""
        earlier = self.peer
        self.boot = hello.boot
        if not self._registered:
            self._num_hellos = 0
        if earlier is not None:
            if earlier.hello.boot == hello.boot:
                return
            self._outlive(earlier)
        self.peer = ServerProcess.meet(hello)
        self._beat_ns = NEVER_NS
        if not hello.watched:
            self._beat_ns = monotonic_ns() + self.peer.beat_ns
        if self.peer.pidfd is not None:
            self._epoll.register(self.peer.pidfd, select.EPOLLIN)

    # -- leaving ----------------------------------------------------------------------

    def _outlive(self, peer: ServerProcess) -> None:
        """Leave a run whose address is another's; its process may live on."""
        if peer.pidfd is None:
            # It cannot be seen: its address is all that there was of it.
            self._fail_posted(peer)
        self._leave()
        if self._posted.has(peer.hello.boot):
            self._outlived.append(peer)
        else:
            self._unwatch(peer)

    def gone(self, pidfd: int) -> None:
        """Take in that a run's process has ended."""
        peer = self.peer
        if peer is not None and peer.pidfd == pidfd:
            self._leave()
            self._unwatch(peer)
            self.peer = None
            self._beat_ns = NEVER_NS
            self.boot = NO_BOOT
            self._fail_posted(peer)
            if self._registered:
                self._greet()
            return
        for outlived in [peer for peer in self._outlived if peer.pidfd == pidfd]:
            self._outlived.remove(outlived)
            self._unwatch(outlived)
            self._fail_posted(outlived)

    def _fail_posted(self, peer: ServerProcess) -> None:
        error = Unavailable(f"the server (process {peer.hello.pid}) is gone")
        self._posted.fail(error, peer.hello.boot)

    def _leave(self) -> None:
        for told in self.on_leave:
            told()

    def _unwatch(self, peer: ServerProcess) -> None:
        if peer.pidfd is not None:
            self._epoll.unregister(peer.pidfd)
        peer.close()


@dataclass(frozen=True, slots=True)
class _Registration:
    """What every run of the server is told anew, and who is told what it answered."""

    request: Registration
    told: Told | None


def _doubled(times: int) -> int:
    return HELLO_AGAIN_NS << min(times, MAX_DOUBLINGS)
