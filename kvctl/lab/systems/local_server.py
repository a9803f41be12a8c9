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
from kvcore.shm import SEGMENT_PREFIX, remove_dead

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
        self._config = config
        self.away = False
        """It was ended on purpose, and is to come back."""
        self._folder = tempfile.TemporaryDirectory(prefix="kvlab-")
        self._log = Path(self._folder.name) / "stderr"
        self._ready_file = Path(self._folder.name) / "address"
        self._start()

    def _start(self) -> None:
        ready_file = self._ready_file
        command = [sys.executable, "-m", "kvctl", "serve"]
        command += ["--ready-file", str(ready_file)]
        for setting in _settings(self._config):
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

    def kill(self) -> None:
        """End it at once; `begin` starts it again."""
        self.away = True
        self._process.kill()

    def freeze(self) -> None:
        """Make it stand still."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def begin(self) -> None:
        """Start it again, at the same address, after it was killed or has ended."""
        self._forget()
        self._ready_file.unlink(missing_ok=True)
        self.away = False
        self._config = msgspec.structs.replace(self._config, address=self.address)
        self._start()

    def end(self) -> None:
        """Ask it to end; `begin` starts it again."""
        self.away = True
        self._process.send_signal(signal.SIGTERM)

    def _forget(self) -> None:
        """Release what belongs to a process that has ended."""
        self._process.wait(STOP_S)
        # Killed, it could not; the next server's start may be long from now.
        remove_dead(f"{SEGMENT_PREFIX}{self.pid}-")
        if self._process.stdout:
            self._process.stdout.close()
        os.close(self.exited)

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
        code = self._process.wait(STOP_S)
        why = self.last_words() or f"exit code {code}"
        raise SetupError(f"the server did not start: {why}")

    def last_words(self) -> str:
        """Return the last line of its log that is more than news; "" without one."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if " INFO " not in line), "")

    def stop(self) -> str | None:
        """Stop it; say what was wrong with how it ended, if anything."""
        early = self._process.poll() is not None and not self.away
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        told = self.epitaph("early" if early else "when told to stop")
        self._forget()
        self._folder.cleanup()
        return told if early or (code and not self.away) else None

    def epitaph(self, when: str = "early") -> str:
        """Say how it ended; waits until it has."""
        code = self._process.wait(STOP_S)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        words = self.last_words()
        return f"the server ended {when}, {how}" + (f": {words}" if words else "")


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
