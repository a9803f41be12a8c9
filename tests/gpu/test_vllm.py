"""What a vLLM worker with a GPU hands the server: torch's memory, torch's events."""

from __future__ import annotations

from typing import Any

import pytest

from kvcore.protocol import CudaIpc
from kvcore.vllm.memory_handles import SharedCacheMemory

pytestmark = [pytest.mark.gpu, pytest.mark.card]


@pytest.fixture
def torch() -> Any:
    """Torch, where it sees a GPU."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch


def test_a_tensor_is_named_whole_and_events_are_used_in_turn(torch: Any) -> None:
    """A view's handle is its storage's; each mark is an event that can be opened."""
    memory = SharedCacheMemory()
    assert memory.mark() == b""
    cache = torch.zeros((8, 4096), dtype=torch.uint8, device="cuda")
    handle = memory.share(cache[2:])
    assert isinstance(handle, CudaIpc)
    assert handle.length == cache.untyped_storage().nbytes()
    marks = [memory.mark() for _ in range(65)]
    assert {len(mark) for mark in marks} == {64}
    assert len(set(marks)) == 64
    assert marks[0] == marks[64]
    memory.close()
