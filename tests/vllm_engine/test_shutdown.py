"""Shared memory of stopped and killed engines is removed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcore.client import KVClient
from kvcore.shm import SHM_DIR
from kvctl.lab.vllm.vllm_scenario import transfer_config
from kvctl.lab.vllm.vllm_server import VLLMServer
from tests.system.server_fixture import CHUNK, wait_until
from tests.vllm_engine.conftest import Serve, Start, make_prompt
from tests.vllm_engine.engine import ENVIRONMENT, LONG_TIMEOUTS

API_SERVER = (
    "--dtype=float32", "--block-size=32", "--max-model-len=4096", "--enforce-eager",
    f"--kv-cache-memory-bytes={64 << 20}",
)  # fmt: skip


def segments_of(pid: int) -> list[str]:
    """List the shared-memory segments of a worker, including torch's."""
    kinds = (f"kvcore-vllm-{pid}-*", f"torch_{pid}_*")
    return [path.name for kind in kinds for path in SHM_DIR.glob(kind)]


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_stopped_api_server_leaves_no_segments(
    how: str,
    model: Callable[[str], Path],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopping vLLM kills its worker together with torch's cleanup daemon."""
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    server = serve()
    options = [*API_SERVER, "--kv-transfer-config", transfer_config(server.address)]
    engine = VLLMServer(sys.executable, str(model("llama")), options, tmp_path / "log")
    try:
        with KVClient(server.address, timeout_s=30) as client:
            wait_until(lambda: client.status().instances)
            (instance,) = client.status().instances
            assert len(segments_of(instance.pid)) == 1
            engine.complete(make_prompt(2 * CHUNK), 1)
            wait_until(lambda: client.status().counters["parts_stored"] == 2)
            if how == "SIGTERM":
                os.kill(engine.pid, signal.SIGTERM)
                engine.wait()
            engine.stop()
            wait_until(lambda: not segments_of(instance.pid))
            wait_until(lambda: not client.status().instances)
    finally:
        engine.stop()


def test_a_killed_engine_leaves_no_segments(serve: Serve, start: Start) -> None:
    """A running server removes them at once, otherwise the next one at its start."""
    server = serve()
    engine, other = (
        start(address=server.address, connector=LONG_TIMEOUTS) for _ in range(2)
    )
    assert (
        len(segments_of(engine.process.pid)) == len(segments_of(other.process.pid)) == 1
    )
    engine.kill()
    wait_until(lambda: not segments_of(engine.process.pid))
    assert len(segments_of(other.process.pid)) == 1
    server.kill()
    other.kill()
    serve()
    assert not segments_of(other.process.pid)
