"""The server of a run, started for it and stopped after it."""

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
from kvcore.options import encode_hook

READY_S = 120.0
"""The touch of a large L1 takes a while on a busy machine."""
STOP_S = 10.0


class LocalServer:
    """A `kvctl serve` process at a free port, or at the scenario's own address.

    In a session of its own, so that Ctrl-C at the terminal reaches only who started
    it: the load ends first, then the server.
    """

    def __init__(self, config: ServerConfig) -> None:
        if config.address == ServerConfig().address:
            config = msgspec.structs.replace(config, address="tcp://127.0.0.1:0")
        self._folder = tempfile.TemporaryDirectory(prefix="kvlab-")
        folder = Path(self._folder.name)
        self._log = folder / "stderr"
        ready_file = folder / "address"
        command = [sys.executable, "-m", "kvctl", "serve"]
        command += ["--ready-file", str(ready_file)]
        for setting in _settings(config):
            command += ["--set", setting]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.exited = os.pidfd_open(self._process.pid)
        """A descriptor that becomes readable when the process has ended."""
        try:
            self.address = self._await(ready_file)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _await(self, ready_file: Path) -> str:
        """Return the address once the server says that it is ready.

        Raises:
            SetupError: with its last words, when it ends instead.
            Unavailable: it says nothing.
        """
        output = self._process.stdout
        if output is None or not wait([output.fileno()], READY_S):
            raise Unavailable(f"the server was not ready in {READY_S:.0f} s")
        if output.readline():
            return ready_file.read_text().strip()
        self._process.wait(STOP_S)
        raise SetupError(f"the server did not start: {self.last_words()}")

    def last_words(self) -> str:
        """Return the last line of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def stop(self) -> str | None:
        """Stop it; say what was wrong with how it ended, if anything."""
        early = self._process.poll() is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        words = self.last_words()
        if self._process.stdout:
            self._process.stdout.close()
        os.close(self.exited)
        self._folder.cleanup()
        if early or code:
            when = "early" if early else "when told to stop"
            return f"the server ended {when} with exit code {code}, saying: {words}"
        return None


def _settings(config: ServerConfig) -> Iterator[str]:
    """Write what differs from the defaults as `key=value`."""
    given = msgspec.to_builtins(config, enc_hook=encode_hook)
    default = msgspec.to_builtins(ServerConfig(), enc_hook=encode_hook)
    return _differences(given, default, "")


def _differences(
    given: Mapping[str, object], default: Mapping[str, object], where: str
) -> Iterator[str]:
    for name, value in given.items():
        if isinstance(value, Mapping):
            inner = default[name]
            if isinstance(inner, Mapping):
                yield from _differences(value, inner, f"{where}{name}.")
        elif value != default[name]:
            yield f"{where}{name}={msgspec.json.encode(value).decode()}"
