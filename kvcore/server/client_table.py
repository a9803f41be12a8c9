"""Connected clients and their liveness.

ZeroMQ does not report that a peer ended. A client in the same pid namespace is watched
through a pidfd, which becomes readable when its process ends; any other client sends
heartbeats and counts as ended after four missed ones.

This module detects a death; `Engine.end_client` handles it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from time import monotonic

from kvcore.errors import Overloaded
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import Hello

MISSED_HEARTBEATS = 4

MAX_PER_PROCESS = 1024
"""Limit of clients per process, for one that opens many and never says goodbye."""


@dataclass(slots=True)
class Client:
    """One connection. `identity` is its ZeroMQ routing id."""

    identity: bytes
    pid: int
    label: str
    pidfd: int | None
    last_seen: float
    scope: bytes
    """Digest of its engine key: clients of one scope share their sessions."""
    num_running: int = 0
    """Requests received and not answered."""
    running_bytes: int = 0
    """Bytes of their frames."""


@dataclass(slots=True)
class WatchedProcess:
    """A process and its clients, which share one pidfd."""

    process: tuple[int, int]
    pidfd: int
    clients: dict[bytes, Client] = field(default_factory=dict)


class ClientTable:
    """Connected clients by identity and by pidfd. Loop thread only."""

    def __init__(
        self,
        heartbeat_s: float,
        watch: Callable[[int], None],
        unwatch: Callable[[int], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._heartbeat_s = heartbeat_s
        self._watch = watch
        self._unwatch = unwatch
        self._clock = clock
        self._namespace = pid_namespace()
        self._clients: dict[bytes, Client] = {}
        self._by_pidfd: dict[int, WatchedProcess] = {}
        self._by_process: dict[tuple[int, int], WatchedProcess] = {}
        self._num_unwatched = 0

    def __len__(self) -> int:
        return len(self._clients)

    def get(self, identity: bytes) -> Client | None:
        """Return a client that said hello."""
        return self._clients.get(identity)

    def by_pidfd(self, pidfd: int) -> Client | None:
        """Return a client of the process that a pidfd watches."""
        watched = self._by_pidfd.get(pidfd)
        return next(iter(watched.clients.values())) if watched else None

    def seen(self, client: Client) -> None:
        """Record a sign of life of a client without a pidfd."""
        if client.pidfd is None:
            client.last_seen = self._clock()

    def add(self, identity: bytes, hello: Hello) -> Client:
        """Add a client and watch its process if possible.

        Raises:
            Overloaded: its process has `MAX_PER_PROCESS` clients.
        """
        watched = self._watched(hello)
        if watched is not None and len(watched.clients) >= MAX_PER_PROCESS:
            raise Overloaded(
                f"process {hello.pid} has {MAX_PER_PROCESS} clients that have not "
                "said goodbye"
            )
        pidfd = watched.pidfd if watched else None
        # Logged as it is: a newline would forge a line of the log.
        label = "".join(c if c.isprintable() else "?" for c in hello.label)
        client = Client(
            identity, hello.pid, label, pidfd, self._clock(), _scope(identity, hello)
        )
        self._clients[identity] = client
        if watched is None:
            self._num_unwatched += 1
        else:
            watched.clients[identity] = client
        return client

    def _watched(self, hello: Hello) -> WatchedProcess | None:
        """Return the watched process that said hello; None if it cannot be watched."""
        if hello.pid_namespace != self._namespace:
            return None
        process = hello.pid, hello.pid_start
        watched = self._by_process.get(process)
        if watched is None:
            pidfd = self._open(hello)
            if pidfd is None:
                return None
            watched = WatchedProcess(process, pidfd)
            self._by_process[process] = self._by_pidfd[pidfd] = watched
            self._watch(pidfd)
        return watched

    def _open(self, hello: Hello) -> int | None:
        """Open a pidfd for exactly the process that said hello."""
        try:
            pidfd = os.pidfd_open(hello.pid)
        except (OSError, OverflowError):  # Gone, or no pid at all.
            return None
        # The pid may have been given to another process since: compare start times
        # while the descriptor holds the number.
        if start_time(hello.pid) == hello.pid_start:
            return pidfd
        os.close(pidfd)
        return None

    def remove(self, client: Client) -> None:
        """Remove a client; stop watching its process after the last one."""
        self._clients.pop(client.identity, None)
        if client.pidfd is None:
            self._num_unwatched -= 1
            return
        watched = self._by_pidfd[client.pidfd]
        del watched.clients[client.identity]
        if not watched.clients:
            del self._by_pidfd[watched.pidfd], self._by_process[watched.process]
            self._unwatch(watched.pidfd)
            os.close(watched.pidfd)

    def silent(self) -> list[Client]:
        """Return the unwatched clients that missed their heartbeats."""
        if not self._num_unwatched:
            return []
        horizon = self._clock() - MISSED_HEARTBEATS * self._heartbeat_s
        return [
            client
            for client in self._clients.values()
            if client.pidfd is None and client.last_seen < horizon
        ]

    def next_deadline(self) -> float | None:
        """Return when to check for silent clients again; None if all are watched."""
        return self._clock() + self._heartbeat_s if self._num_unwatched else None

    def close(self) -> None:
        """Remove every client."""
        for client in list(self._clients.values()):
            self.remove(client)


def _scope(identity: bytes, hello: Hello) -> bytes:
    secret = b"key" + hello.engine_key if hello.engine_key else b"client" + identity
    return sha256(secret).digest()[:16]
