"""Torch tensors; on a real GPU also long kernels and use of device memory."""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from tests.gpu.conftest import StartWorker
from tests.gpu.torch_gpu_worker import LAYERS, TorchWorkerCommands
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK
from tests.system.worker_process import Worker, WorkerCommands

pytestmark = pytest.mark.gpu

FROM, INTO = [9, 3, 4, 60], [20, 7, 40, 11]
GROWTH_BYTES = 32 << 20
"""Allowance for other processes; a leak of 1,000 caches is far larger."""


@pytest.fixture(scope="module")
def commands() -> type[WorkerCommands]:
    """Workers with torch."""
    return TorchWorkerCommands


def test_a_tensor_reaches_another_process(
    workers: list[Worker], model: str, session: SessionKey, prompt: Prompt
) -> None:
    """Random bfloat16 through L1 into other blocks; the rest is unchanged."""
    first, second = workers
    tokens = prompt(CHUNK)
    first.call("register", "a", model)
    second.call("register", "b", model)
    first.call("fill", "a", FROM)
    reply = first.call("store_now", session, "a", CHUNK, FROM, tokens)
    assert reply.num_stored == 1
    second.call("poison", "b", list(range(64)))
    second.call("retrieve", session, "b", 0, CHUNK, [INTO], tokens)
    for sent, got in zip(
        first.call("values", "a", FROM), second.call("values", "b", INTO), strict=True
    ):
        assert np.array_equal(sent, got)
    others = sorted(set(range(64)) - set(INTO))
    assert all((layer == -7).all() for layer in second.call("values", "b", others))


@pytest.mark.card
def test_a_store_waits_for_the_kernel_that_writes(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Data is stored that was only queued when the request was sent."""
    first, second = workers
    tokens = prompt(CHUNK)
    first.call("register", "a", model)
    second.call("register", "b", model)
    reply, was_early = first.call("store_late", session, "a", CHUNK, FROM, tokens)
    assert was_early, "the kernel was too short: the test shows nothing"
    assert reply.num_stored == 1
    second.call("retrieve", session, "b", 0, CHUNK, [INTO], tokens)
    got = second.call("values", "b", INTO)
    assert [set(layer.reshape(-1)) for layer in got] == [
        {float(layer + 1)} for layer in range(LAYERS)
    ]


@pytest.mark.card
def test_device_memory_does_not_grow(workers: list[Worker], model: str) -> None:
    """A thousand instances are registered and unregistered."""
    worker = workers[0]
    worker.call("cycle", "c", model, 20)
    before = worker.call("free_bytes")
    for _ in range(10):
        worker.call("cycle", "c", model, 100)
    assert before - worker.call("free_bytes") < GROWTH_BYTES


@pytest.mark.card
def test_expandable_segments_are_refused_by_name(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the setting to change."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "expandable_segments:False" in start_worker().call("export_virtual")
