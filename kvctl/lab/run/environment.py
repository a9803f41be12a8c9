"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import msgspec
import zmq

import kvcore
from kvcore.shm import SHM_DIR

PACKAGES = ("msgspec", "numpy", "pyzmq")


GPU_FIELDS = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max"
MACHINE = ("cpu", "num_cores", "memory_bytes", "kernel", "python", "gpus")
"""What must be alike for the timings of two results to be compared."""


class Gpu(msgspec.Struct, frozen=True):
    """One accelerator and its link, as its driver names them."""

    name: str
    driver: str
    memory: str
    link: str


class Environment(msgspec.Struct, frozen=True):
    """The machine and the versions."""

    cpu: str
    num_cores: int
    memory_bytes: int
    kernel: str
    python: str
    versions: dict[str, str]
    git_commit: str | None
    """With `+` behind it when the tree had changes; none outside a checkout."""
    gpus: tuple[Gpu, ...] = ()
    shm_bytes: int = 0
    """Size of /dev/shm."""
    load: float = 0.0
    """Processes that ran or waited in the last minute, when the run had ended."""

    def unlike(self, other: Environment) -> list[str]:
        """Name what differs between the two machines."""
        return [
            f"{name}: {getattr(self, name)} and {getattr(other, name)}"
            for name in MACHINE
            if getattr(self, name) != getattr(other, name)
        ]


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
        gpus=_gpus(),
        shm_bytes=_shm_bytes(),
        load=round(os.getloadavg()[0], 2),
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine()).strip()


def _shm_bytes() -> int:
    try:
        shm = os.statvfs(SHM_DIR)
    except OSError:
        return 0
    return shm.f_frsize * shm.f_blocks


def _gpus() -> tuple[Gpu, ...]:
    """Ask the driver's own tool; none where there is none."""
    said = _output("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader")
    rows = [line.split(", ") for line in (said or "").splitlines()]
    return tuple(
        Gpu(name, driver, memory, f"PCIe {generation} x{width}")
        for name, driver, memory, generation, width in rows
    )


def _git_commit() -> str | None:
    folder = Path(kvcore.__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # Installed somewhere in a checkout, not the checkout itself.
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says, None where there is no git or no checkout of ours."""
    return _output("git", "-C", str(folder), *arguments)


def _output(*command: str) -> str | None:
    """Return what a command prints, None where it is not there or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def anonymous_bytes(pid: int) -> int:
    """Return what a process has allocated for itself; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
