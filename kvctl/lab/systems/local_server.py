"""This project's own server, started for a run and stopped after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing.connection import wait
from pathlib import Path

import msgspec

from kvcore.config import ServerConfig
from kvcore.errors import SetupError, Unavailable
from kvcore.option_structs import encode_hook
from kvcore.shm import SEGMENT_PREFIX, remove_dead

READY_S = 120.0
"""Touching a large L1 takes long on a busy machine."""
STOP_S = 10.0


class LocalServer:
    """A `kvctl serve` process at a free port, or at the scenario's own address.

    It runs in a session of its own, which Ctrl-C at the terminal does not reach: the
    load ends first, then the server.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Start it and wait until it is ready.

        Raises:
            SetupError: it ended; the message has the last line of its log.
            Unavailable: it was not ready in time.
        """
        if config.address == ServerConfig().address:
            config = msgspec.structs.replace(config, address="tcp://127.0.0.1:0")
        self._config = config
        self.is_down = False
        """Ended by a fault, and to be started again."""
        self._folder = tempfile.TemporaryDirectory(prefix="kvlab-")
        self._log = Path(self._folder.name) / "stderr"
        self._ready_file = Path(self._folder.name) / "address"
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "kvctl", "serve"]
        command += ["--ready-file", str(self._ready_file)]
        for setting in _settings(self._config):
            command += ["--set", setting]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.exited = os.pidfd_open(self._process.pid)
        """File descriptor that becomes readable when the process has ended."""
        try:
            self.address = self._await_address()
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """Send SIGKILL."""
        self.is_down = True
        self._process.kill()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.is_down = True
        self._process.send_signal(signal.SIGTERM)

    def suspend(self) -> None:
        """Send SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def start_again(self) -> None:
        """Start it again at the same address, after `kill` or `terminate`."""
        self._release()
        self._ready_file.unlink(missing_ok=True)
        self.is_down = False
        self._config = msgspec.structs.replace(self._config, address=self.address)
        self._start()

    def _release(self) -> None:
        """Release the resources of a process that ends."""
        self._process.wait(STOP_S)
        # A killed server could not remove its memory.
        remove_dead(f"{SEGMENT_PREFIX}{self.pid}-")
        if self._process.stdout:
            self._process.stdout.close()
        os.close(self.exited)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def _await_address(self) -> str:
        output = self._process.stdout
        if output is None or not wait([output.fileno()], READY_S):
            raise Unavailable(f"the server was not ready in {READY_S:.0f} s")
        if output.readline():
            return self._ready_file.read_text().strip()
        code = self._process.wait(STOP_S)
        reason = self.last_log_line() or f"exit code {code}"
        raise SetupError(f"the server did not start: {reason}")

    def last_log_line(self) -> str:
        """Return the last line of its log above level INFO; "" without one."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if " INFO " not in line), "")

    def stop(self) -> str | None:
        """Stop it; return a sentence about an unexpected exit, if it was one."""
        early = self._process.poll() is not None and not self.is_down
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        problem = self.describe_exit("early" if early else "after SIGTERM")
        self._release()
        self._folder.cleanup()
        return problem if early or (code and not self.is_down) else None

    def describe_exit(self, when: str = "early") -> str:
        """Wait for its end and return a sentence about it."""
        code = self._process.wait(STOP_S)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        line = self.last_log_line()
        return f"the server ended {when}, {how}" + (f": {line}" if line else "")


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
