"""Who is connected, and whether they still live.

ZeroMQ does not say that a peer died. A client in the same pid namespace is watched
through a pidfd, which becomes readable the moment its process ends; any other sends
heartbeats and counts as dead after four of them are missed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from kvcore.process import pid_namespace, start_time
from kvcore.protocol import Hello

MISSED_HEARTBEATS = 4


@dataclass(slots=True)
class Client:
    """One connection. `identity` is its ZeroMQ routing id."""

    identity: bytes
    pid: int
    label: str
    pidfd: int | None
    last_seen: float
    num_running: int = 0
    """Requests taken and not yet answered."""


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
        self._by_pidfd: dict[int, Client] = {}
        self._num_unwatched = 0

    def __len__(self) -> int:
        return len(self._clients)

    def get(self, identity: bytes) -> Client | None:
        """Return a client that said hello."""
        return self._clients.get(identity)

    def by_pidfd(self, pidfd: int) -> Client | None:
        """Return the client that a pidfd watches."""
        return self._by_pidfd.get(pidfd)

    def seen(self, client: Client) -> None:
        """Note a sign of life of a client that cannot be watched."""
        if client.pidfd is None:
            client.last_seen = self._clock()

    def add(self, identity: bytes, hello: Hello) -> Client:
        """Enter a client and watch its process if that can be done."""
        pidfd = self._open(hello)
        client = Client(identity, hello.pid, hello.label, pidfd, self._clock())
        self._clients[identity] = client
        if pidfd is None:
            self._num_unwatched += 1
        else:
            self._by_pidfd[pidfd] = client
            self._watch(pidfd)
        return client

    def _open(self, hello: Hello) -> int | None:
        """Open a pidfd for exactly the process that said hello."""
        if hello.pid_namespace != self._namespace:
            return None
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
        """Forget a client and stop watching it."""
        self._clients.pop(client.identity, None)
        if client.pidfd is None:
            self._num_unwatched -= 1
            return
        del self._by_pidfd[client.pidfd]
        self._unwatch(client.pidfd)
        os.close(client.pidfd)

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
        """Return when to look for silent clients again; None when all are watched."""
        return self._clock() + self._heartbeat_s if self._num_unwatched else None

    def close(self) -> None:
        """Forget everyone."""
        for client in list(self._clients.values()):
            self.remove(client)
