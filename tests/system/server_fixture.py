"""A real `kvctl serve` for tests, and ways to wait for what it comes to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

CHUNK = 64
"""Tokens a chunk of these servers, four blocks."""

OPTIONS = ("--l1-size", "8MiB", "--chunk-size", str(CHUNK), "--set", "l1.page=4KiB")


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Ask until it is so, at most so long."""
    deadline = monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert monotonic() < deadline, "it did not come to be so"
        pause.wait(0.005)


class Server:
    """A `kvctl serve` process, ready when this returns."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        address: str = "tcp://127.0.0.1:0",
        inside: Sequence[str] = (),
        program: Sequence[str] = ("-m", "kvctl"),
    ) -> None:
        self.folder = folder
        self.options = options
        self.log = folder / f"stderr-{len(list(folder.iterdir()))}"
        ready = folder / "ready"
        self.inside = inside
        command = [
            *inside,  # Replaced by what it runs, as `ip netns exec` is.
            *(sys.executable, *program, "serve", "--address", address),
            *("--ready-file", str(ready), *OPTIONS, *options),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True
            )
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
        """Its process."""
        return self.process.pid

    @property
    def segments(self) -> list[str]:
        """What it has in /dev/shm."""
        return [
            n for n in os.listdir("/dev/shm") if n.startswith(f"kvcore-{self.pid}-")
        ]

    def pause(self) -> None:
        """SIGSTOP it, and wait until it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        """SIGCONT it."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.kill()
        self.process.wait()

    def again(self) -> Server:
        """Start another run at the same address."""
        where = {"address": self.address, "inside": self.inside}
        return Server(self.folder, *self.options, **where)

    def close(self) -> None:
        """End it if it lives; whatever came, it must not have logged a defect."""
        if self.process.poll() is None:
            self.resume()
            assert self.stop() == 0
            assert not self.segments
        log = self.log.read_text()
        assert "Traceback" not in log, log
