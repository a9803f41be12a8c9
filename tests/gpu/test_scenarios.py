"""The scenarios of `make gpu` at small sizes over the stub of the driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvctl.lab.results.result import Result, read

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]
SMALL = ("server.l1.size=256MiB", "copies.chunk=1MiB", "copies.rounds=1")
RUN_S = 150


def run_scenario(
    folder: Path, name: str, *settings: str, trace: Path | None = None
) -> Result:
    """Run a scenario in a process; return its saved result."""
    command = [sys.executable, "-m", "kvctl", "bench", "run", f"scenarios/{name}.toml"]
    for setting in settings:
        command += ["--set", setting]
    command += ["--trace", str(trace)] if trace else []
    done = subprocess.run(
        [*command, "--out", str(folder)],
        capture_output=True, text=True, timeout=RUN_S, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = folder.glob(f"{name}-*.json")
    result = read(saved)
    assert result.counts.bytes_wrong == 0
    return result


@pytest.mark.parametrize("driver", ["server", "worker"])
def test_copies_by_several_workers(stub: None, tmp_path: Path, driver: str) -> None:
    """Every piece size, both orders, and two concurrent workers."""
    result = run_scenario(
        tmp_path, "h100_store_retrieve", f"driver={driver}", *SMALL, "engines=2",
        "copies.workers=[1,2]", 'copies.pieces=["4KiB","2MiB"]', "copies.chunks=2",
    )  # fmt: skip
    assert [row.setting.workers for row in result.copies] == [1, 1, 1, 1, 2]
    # One round of four calls per worker, with either driver.
    assert [sum(row.ways.values()) for row in result.copies] == [4, 4, 4, 4, 8]
    rates = {len(one.rates.to_host.kernels) for one in result.devices}
    assert rates == ({3} if driver == "server" else set())


@pytest.mark.parametrize("driver", ["server", "worker"])
def test_copies_during_a_matrix_product(
    stub: None, tmp_path: Path, driver: str
) -> None:
    """Its slowdown is reported, with either driver."""
    result = run_scenario(
        tmp_path, "h100_busy", f"driver={driver}", *SMALL, 'copies.pieces=["8KiB"]'
    )
    assert all(row.product_slowdown is not None for row in result.copies)


def test_a_trace_with_a_real_models_geometry(stub: None, tmp_path: Path) -> None:
    """Two requests of a conversation; the second finds the chunks of the first."""
    lines = [
        {"timestamp": n, "input_length": 512 * len(ids), "output_length": 1}
        | {"hash_ids": ids}
        for n, ids in enumerate(([0, 1], [0, 1, 2]))
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ("cache_blocks=128", "server.l1.size=512MiB")
    result = run_scenario(tmp_path, "h100_llama8b_trace", *settings, trace=trace)
    assert result.counts.chunks_hit == 2
    assert result.counts.retrieved_bytes == 2 * 64 << 20
