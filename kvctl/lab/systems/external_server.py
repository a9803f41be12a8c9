"""Another system's server, started for a run and stopped after it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from threading import Event
from time import monotonic

from kvcore.errors import SetupError, Unavailable
from kvctl.lab.systems.system_interface import StartedSystem

READY_S = 60.0
POLL_S = 0.05
STOP_S = 15.0


class ExternalServer:
    """A process that is none of ours; it is asked nothing but to end."""

    away = False
    """It cannot be struck and come back."""

    def __init__(self, started: StartedSystem, folder: Path) -> None:
        """Start it and wait until it accepts connections; its log is in the folder.

        Raises:
            SetupError: with its last words, when it ends instead.
            Unavailable: it never accepts any.
        """
        self._log = folder / "log"
        self.address = started.address
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    started.command,
                    stdout=log,
                    stderr=log,
                    env=os.environ | started.environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise SetupError(f"{started.command[0]}: {error.strerror}") from None
        self.exited = os.pidfd_open(self._process.pid)
        try:
            self._await(started.is_ready)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _await(self, place: str) -> None:
        give_up = monotonic() + READY_S
        while not _accepts(place):
            if self._process.poll() is not None:
                raise SetupError(f"the server did not start: {self.last_words()}")
            if monotonic() > give_up:
                raise Unavailable(f"the server was not ready in {READY_S:.0f} s")
            Event().wait(POLL_S)

    def last_words(self) -> str:
        """Return the last line of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def epitaph(self) -> str:
        """Say what it said at its end."""
        return f"the server ended early, saying: {self.last_words()}"

    def stop(self) -> str | None:
        """Stop it; say so when it had ended by itself."""
        words = self.epitaph() if self._process.poll() is not None else None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self.exited)
        return words


def _accepts(place: str) -> bool:
    kind, _, where = place.partition("://")
    try:
        if kind == "unix":
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(where)
        else:
            host, _, port = where.rpartition(":")
            socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """Return a port of this host that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
