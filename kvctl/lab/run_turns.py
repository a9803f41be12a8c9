"""Turns of two interleaved runs, so that background load affects both.

The two runs meet at a Unix socket and pass a token over it; the run that holds it may
begin a request. When one run ends, the other continues without it. Each run may have
only one request in progress, because a run passes the token after each request.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from shutil import disk_usage
from threading import Event
from time import monotonic

from kvcore.errors import SetupError, Unavailable
from kvcore.shm import SHM_DIR
from kvctl.lab.config.arrival_config import ClosedLoop
from kvctl.lab.config.scenario import Scenario

FIRST, SECOND = "first", "second"
CONNECT_S = 60.0
RETRY_S = 0.02


class RunTurns:
    """The turns of one run. `address` is `first:PATH` or `second:PATH`; first begins.

    Raises:
        SetupError: the address has another form.
        Unavailable: the other run does not connect.
    """

    def __init__(self, address: str) -> None:
        side, _, path = address.partition(":")
        if side not in (FIRST, SECOND) or not path:
            raise SetupError(f"--turns {address}: give first:PATH or second:PATH")
        self._has_token = side == FIRST
        self._peer = _accept_peer(path) if self._has_token else _connect_peer(path)
        self._peer_ended = False

    def acquire(self) -> None:
        """Wait until this run may begin a request."""
        if not (self._has_token or self._peer_ended):
            try:
                self._peer.recv_bytes()
            except (EOFError, OSError):
                self._peer_ended = True
        self._has_token = True

    def release(self) -> None:
        """Pass the token to the other run."""
        if self._peer_ended:
            return
        self._has_token = False
        with suppress(OSError):  # `acquire` notices that the other run has ended.
            self._peer.send_bytes(b"")

    def close(self) -> None:
        """Disconnect; the other run continues alone."""
        self._peer.close()


@contextmanager
def run_exclusively(address: str | None) -> Iterator[None]:
    """Run the block when the other run has reached it too, one after the other."""
    if address is None:
        yield
        return
    with closing(RunTurns(f"{address}.after")) as turns:
        turns.acquire()
        yield
        turns.release()


def can_interleave(scenario: Scenario) -> bool:
    """Return whether a scenario has one engine with one request at a time."""
    load = scenario.load
    sequential = isinstance(load, ClosedLoop) and load.concurrency == 1
    return sequential and sum(part.engines for part in scenario.parts().values()) == 1


def fit_in_memory(*scenarios: Scenario) -> bool:
    """Return whether /dev/shm has room for the L1s and caches of all scenarios."""
    needed = sum(
        int(scenario.server.l1.size) * scenario.hosts
        + sum(part.engines * part.cache_bytes for part in scenario.parts().values())
        for scenario in scenarios
    )
    return needed <= disk_usage(SHM_DIR).free


def _accept_peer(path: str) -> Connection:
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(CONNECT_S)
        listener.bind(path)
        listener.listen(1)
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            raise Unavailable(f"--turns: no other run connected to {path}") from None
    peer.setblocking(True)
    return Connection(peer.detach())


def _connect_peer(path: str) -> Connection:
    deadline = monotonic() + CONNECT_S
    while monotonic() < deadline:
        with suppress(OSError):
            return Client(path, "AF_UNIX")
        Event().wait(RETRY_S)
    raise Unavailable(f"--turns: no other run listens at {path}")
