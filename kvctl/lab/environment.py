"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import msgspec
import zmq

import kvcore

PACKAGES = ("msgspec", "numpy", "pyzmq")


class Environment(msgspec.Struct, frozen=True):
    """What must be alike for two results to be compared."""

    cpu: str
    num_cores: int
    memory_bytes: int
    kernel: str
    python: str
    versions: dict[str, str]
    git_commit: str | None
    """With `+` behind it when the tree had changes; none outside a checkout."""


def detect() -> Environment:
    """Look at this process's machine."""
    return Environment(
        cpu=_cpu(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        python=platform.python_version(),
        versions={
            "kvctl": kvcore.__version__,
            "libzmq": zmq.zmq_version(),
            **{name: version(name) for name in PACKAGES},
        },
        git_commit=_git_commit(),
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine()).strip()


def _git_commit() -> str | None:
    folder = Path(kvcore.__file__).parent
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says, None where there is no git or no checkout of ours."""
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
