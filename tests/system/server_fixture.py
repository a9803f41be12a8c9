"""A real `kvctl serve` process for tests, and a wait for conditions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from kvcore.client import KVClient
from tests.system.fork_server import ForkedCommand

CHUNK = 64
"""Tokens per chunk of these servers, four blocks."""

OPTIONS = (
    "--l1-size", "8MiB", "--chunk-size", str(CHUNK), "--set", "l1.page=4KiB",
    "--set", "l1.engine_share=1",
)  # fmt: skip

ENGINE_KEY = b"the engine of the tests"


def connect(address: str, **options: Any) -> KVClient:
    """Return a client that shares its sessions with the tests' workers."""
    return KVClient(address, engine_key=ENGINE_KEY, **options)


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Poll a condition until it is true.

    Raises:
        AssertionError: it is still false after `seconds`.
    """
    deadline = monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert monotonic() < deadline, f"still false after {seconds} s"
        pause.wait(0.005)


class Server:
    """A `kvctl serve` process, ready when the constructor returns.

    It is forked from a process that has imported the server. A `program` other than
    `-m kvctl`, or a `prefix` such as `ip netns exec NAME`, starts a new interpreter.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        address: str = "tcp://127.0.0.1:0",
        prefix: Sequence[str] = (),
        program: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.options = options
        self.log = folder / f"stderr-{len(list(folder.iterdir()))}"
        ready = folder / "ready"
        self.prefix = prefix
        self.program = program
        arguments = (
            *("serve", "--address", address, "--ready-file", str(ready)),
            *(*OPTIONS, *options),
        )
        self.process: ForkedCommand | subprocess.Popen[str]
        if prefix or program:
            program = program or ("-m", "kvctl")
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [*prefix, sys.executable, *program, *arguments],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        else:
            self.process = ForkedCommand(arguments, self.log)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.process.stdout.close()
        if not line.startswith("kvctl: ready at "):
            self.kill()
            raise AssertionError(self.log.read_text())
        self.address = ready.read_text().strip()
        assert f" {self.address} " in line

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def segments(self) -> list[str]:
        """The names of its segments in /dev/shm."""
        return [
            n for n in os.listdir("/dev/shm") if n.startswith(f"kvcore-{self.pid}-")
        ]

    def pause(self) -> None:
        """Send SIGSTOP and wait until the process is stopped."""
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(self.pid) == "T")

    def resume(self) -> None:
        """Send SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> Server:
        """Start another process with the same address and options."""
        return Server(
            self.folder,
            *self.options,
            address=self.address,
            prefix=self.prefix,
            program=self.program,
        )

    def close(self) -> None:
        """Stop the process if it runs; its log must hold no traceback."""
        if self.process.poll() is None:
            self.resume()
            assert self.stop() == 0
            assert not self.segments
        log = self.log.read_text()
        assert "Traceback" not in log, log


def process_state(pid: int) -> str:
    """Return the state letter of /proc/PID/stat."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
