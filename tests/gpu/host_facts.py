"""The GPU and the installed software, as one line of JSON.

    python -m tests.gpu.host_facts

Fails if there is no GPU, or if a module that later steps import is missing.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODULES = ("kvctl.cli", "kvcore.server", "hypothesis", "pytest", "pytest_timeout")
PACKAGES = ("torch", "triton", "numpy", "cuda-bindings", "pyzmq", "msgspec", "pytest")
QUERY = (
    "name,uuid,driver_version,memory.total,memory.used,compute_mode,mig.mode.current,"
    "pcie.link.gen.max,pcie.link.gen.current,pcie.link.width.max,"
    "pcie.link.width.current,clocks.max.sm,power.limit,persistence_mode"
)


def facts() -> dict[str, Any]:
    """Return the facts; raises SystemExit with one line if later steps cannot run."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"no torch in this Python: {error} (PYTHON=...)") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: torch {torch.__version__} finds none here")
    for name in MODULES:
        import_module(name)
    from kvcore.cuda.driver import open_devices
    from kvcore.errors import SetupError

    try:
        devices = open_devices()
    except SetupError as error:
        raise SystemExit(error.message) from None
    card = torch.cuda.get_device_properties(0)
    shm = os.statvfs("/dev/shm")
    return {
        "card": card.name,
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "devices": [repr(device) for device in devices],
        "cuda": torch.version.cuda,
        "driver": output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"),
        "topology": output_of("nvidia-smi", "topo", "-m"),
        "python": sys.version,
        "versions": {name: version(name) for name in PACKAGES},
        "num_cores": len(os.sched_getaffinity(0)),
        "shm_bytes": shm.f_frsize * shm.f_blocks,
        "shm_free_bytes": shm.f_frsize * shm.f_bavail,
        "locked_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "memory": Path("/proc/meminfo").read_text().splitlines()[:3],
        "settings": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("CUDA", "PYTORCH", "NVIDIA", "TRITON", "LD_LIBRARY"))
        },
    }


def output_of(*command: str) -> list[str]:
    """Return a command's output lines with stderr, or why it does not run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return [str(error)]
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts()) + "\n")
