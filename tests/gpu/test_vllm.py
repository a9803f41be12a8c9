"""Memory and event handles of a vLLM worker with a GPU, made from torch objects."""

from __future__ import annotations

from typing import Any

import pytest

from kvcore.protocol import CudaIpc
from kvcore.vllm.memory_handles import SharedCacheMemory

pytestmark = [pytest.mark.gpu, pytest.mark.card]


@pytest.fixture
def torch() -> Any:
    """Torch, if it finds a GPU."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch


def test_a_handle_covers_the_storage_and_events_rotate(torch: Any) -> None:
    """A view's handle is its storage's; 64 events are used in rotation."""
    memory = SharedCacheMemory()
    assert memory.record_event() == b""
    cache = torch.zeros((8, 4096), dtype=torch.uint8, device="cuda")
    handle = memory.share(cache[2:])
    assert isinstance(handle, CudaIpc)
    assert handle.length == cache.untyped_storage().nbytes()
    events = [memory.record_event() for _ in range(65)]
    assert {len(event) for event in events} == {64}
    assert len(set(events)) == 64
    assert events[0] == events[64]
    memory.close()
