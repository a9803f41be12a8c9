"""This project's own server, started for a run and stopped after it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from kvcore.config import ServerConfig
from kvcore.option_structs import encode_hook
from kvcore.shm import SEGMENT_PREFIX, remove_dead
from kvctl.lab.systems.child_processes import ChildProcess


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
