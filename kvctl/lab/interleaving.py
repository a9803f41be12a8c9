"""Two runs take turns, some requests each, so that a busy machine slows both alike.

The sides meet at a Unix socket and hand each other the turn over it. When one ends, or
dies, the other goes on alone. Only one request may be under way on each side: there is
nobody else to wait for when the turn is handed over.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from shutil import disk_usage
from threading import Event
from time import monotonic

from kvcore.errors import SetupError, Unavailable
from kvcore.shm import SHM_DIR
from kvctl.lab.scenario import Scenario
from kvctl.lab.workload.load_config import ClosedLoop

FIRST, SECOND = "first", "second"
MEET_S = 60.0
RETRY_S = 0.02


class Interleaving:
    """One side's turns. `place` is `first:PATH` or `second:PATH`; first begins."""

    def __init__(self, place: str, batch: int, ended: Callable[[], None]) -> None:
        """Meet the other side; `ended` is called when a batch of requests is over.

        Raises:
            SetupError: the place is neither.
            Unavailable: the other side did not come.
        """
        side, _, path = place.partition(":")
        if side not in (FIRST, SECOND) or not path:
            raise SetupError(f"--turns {place}: give first:PATH or second:PATH")
        self._batch = batch
        self._ended = ended
        self._done = 0
        self._ours = side == FIRST
        self._peer = _wait_for_peer(path) if self._ours else _find_peer(path)
        self._alone = False

    def take(self) -> None:
        """Wait for our turn."""
        if not (self._ours or self._alone):
            try:
                self._peer.recv_bytes()
            except (EOFError, OSError):
                self._alone = True
        self._ours = True

    def done(self) -> None:
        """Say that a request of ours is over; after a batch the turn is the other's."""
        self._done += 1
        if self._done % self._batch == 0:
            self._ended()
            self._give()

    def _give(self) -> None:
        if self._alone:
            return
        self._ours = False
        with suppress(OSError):  # Its end is seen when the turn would come back.
            self._peer.send_bytes(b"")

    def close(self) -> None:
        """Play no more."""
        self._peer.close()


@contextmanager
def in_turn(place: str | None) -> Iterator[None]:
    """Run the block once the other side has come here too, one after the other."""
    if place is None:
        yield
        return
    turns = Interleaving(f"{place}.after", 1, lambda: None)
    try:
        turns.take()
        yield
        turns.done()
    finally:
        turns.close()


def can_take_turns(scenario: Scenario) -> bool:
    """Say whether a scenario has one request under way at a time, in one engine."""
    load = scenario.load
    alone = isinstance(load, ClosedLoop) and load.concurrency == 1
    return alone and sum(part.engines for part in scenario.parts().values()) == 1


def fit_at_once(*sides: Scenario) -> bool:
    """Say whether there is shared memory for the servers and caches of all sides."""
    needed = sum(
        int(side.server.l1.size) * side.hosts
        + sum(part.engines * part.cache_bytes for part in side.parts().values())
        for side in sides
    )
    return needed <= disk_usage(SHM_DIR).free


def _wait_for_peer(path: str) -> Connection:
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(MEET_S)
        listener.bind(path)
        listener.listen(1)
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            raise Unavailable(f"--turns: nobody else came to {path}") from None
    peer.setblocking(True)
    return Connection(peer.detach())


def _find_peer(path: str) -> Connection:
    give_up = monotonic() + MEET_S
    while monotonic() < give_up:
        with suppress(OSError):
            return Client(path, "AF_UNIX")
        Event().wait(RETRY_S)
    raise Unavailable(f"--turns: nobody else at {path}")
