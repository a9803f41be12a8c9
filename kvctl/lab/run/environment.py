"""The machine and the software versions of a result."""

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
"""Fields that must be equal for the timings of two results to be comparable."""


class Gpu(msgspec.Struct, frozen=True):
    """One accelerator and its link, in the words of its driver."""

    name: str
    driver: str
    memory: str
    link: str


class Environment(msgspec.Struct, frozen=True):
    """Machine and software versions."""

    cpu: str
    num_cores: int
    memory_bytes: int
    kernel: str
    python: str
    versions: dict[str, str]
    git_commit: str | None
    """With a trailing `+` if the tree had changes; None outside a checkout."""
    gpus: tuple[Gpu, ...] = ()
    shm_bytes: int = 0
    """Size of /dev/shm."""
    load: float = 0.0
    """Load average of the last minute, after the run."""

    def unlike(self, other: Environment) -> list[str]:
        """Return a sentence per difference between the two machines."""
        ours, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        return [
            f"{name}: {ours[name]} and {theirs[name]}"
            for name in MACHINE
            if ours[name] != theirs[name]
        ]


def detect() -> Environment:
    """Return the environment of this process."""
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
    """Return what nvidia-smi reports; nothing without it."""
    output = _output("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader")
    rows = [line.split(", ") for line in (output or "").splitlines()]
    return tuple(
        Gpu(name, driver, memory, f"PCIe {generation} x{width}")
        for name, driver, memory, generation, width in rows
    )


def _git_commit() -> str | None:
    folder = Path(kvcore.__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # Installed inside a checkout of something else.
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git; None without git or outside a checkout."""
    return _output("git", "-C", str(folder), *arguments)


def _output(*command: str) -> str | None:
    """Return the output of a command; None if it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def anonymous_bytes(pid: int) -> int:
    """Return the private memory of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
