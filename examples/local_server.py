"""A `kvctl serve` process for the examples."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = (sys.executable, "-m", "kvctl", "serve")


@contextmanager
def start_server(*options: str, command: tuple[str, ...] = SERVE) -> Iterator[str]:
    """Start a server on a free port, yield its address, and stop it."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "address"
        arguments = ("--l1-size", "64MiB", "--port", "0", "--ready-file", str(ready))
        with subprocess.Popen(
            [*command, *arguments, *options], stdout=subprocess.PIPE
        ) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()  # One line: ready at ADDRESS.
                yield ready.read_text().strip()
            finally:
                server.terminate()
