"""Processes forked from one that has imported the project.

Importing it takes a spawned worker or server half a second of CPU time, and a forked
one a hundredth of that. Each forked process has this one's environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from kvctl.cli import main

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = (
    "tests.system.worker_process",
    "kvctl.commands.inspect",
    "kvctl.commands.serve",
    "kvcore.server.application",
)


@cache
def fork_server() -> ForkServerContext:
    """Return the context that forks processes from the one with `PRELOAD` imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, {"PYTHONPATH": path}):
        forkserver.ensure_running()
    return context


class ForkedCommand:
    """`kvctl ARGUMENTS` in a process of its own, with the methods of `Popen`."""

    def __init__(self, arguments: tuple[str, ...], stderr: Path) -> None:
        context = fork_server()
        reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_run_kvctl,
            args=(arguments, dict(os.environ), writer, stderr),
            daemon=True,
        )
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")
        reader.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        return int(self._process.pid or 0)

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when the process has ended."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"process {self.pid} still runs"
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `kvctl ARGUMENTS` in a forked process until its end, for up to 30 s."""
    with TemporaryDirectory() as folder:
        log = Path(folder, "stderr")
        command = ForkedCommand(arguments, log)
        with command.stdout:
            out = command.stdout.read()
        code = command.wait(30)
        return subprocess.CompletedProcess(arguments, code, out, log.read_text())


def run_with_environment(
    environment: dict[str, str], target: Callable[..., None], *arguments: object
) -> None:
    """Call a function in a forked process with its parent's environment."""
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def _run_kvctl(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    stdout: Connection,
    stderr: Path,
) -> None:
    with stderr.open("wb") as file:
        os.dup2(stdout.fileno(), 1)
        os.dup2(file.fileno(), 2)
    stdout.close()
    sys.argv = ["kvctl", *arguments]
    run_with_environment(environment, main)
