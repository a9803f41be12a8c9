"""GPU memory of a worker that copies itself, on a fake device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvcore.cuda.worker_device_memory import DeviceWorkerMemory
from kvcore.errors import DeviceFailed
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import RegisterKVCache
from kvcore.worker.copying_client import CopyingClient
from tests.cuda.cuda_fixture import cuda_fixture
from tests.cuda.fake_gpu import FakeDevice, array_at
from tests.cuda.layout_cases import job
from tests.system.server_fixture import CHUNK, Server, wait_until

SLOT = 8
BLOCK = CHUNK // 2
PART = 2 * BLOCK * SLOT
GROUP = CacheGroup(
    axes="KNSD",
    dtype="uint8",
    block_size=BLOCK,
    tensors=(
        TensorView(
            0, 0, (2, 8, BLOCK, SLOT), (8 * BLOCK * SLOT, BLOCK * SLOT, SLOT, 1)
        ),
    ),
)


@dataclass
class Tensor:
    """Device memory with the interface of a torch tensor."""

    address: int
    nbytes: int

    def data_ptr(self) -> int:
        """Return its address."""
        return self.address


def allocate(device: FakeDevice, array: np.ndarray) -> Tensor:
    """Return device memory with the bytes of an array."""
    address = device.allocate(array.nbytes)
    array_at(address, array.nbytes)[:] = array
    return Tensor(address, array.nbytes)


def test_an_arena_is_page_locked_once() -> None:
    """From the first instance to the last one of each arena."""
    made = cuda_fixture(0)
    own = DeviceWorkerMemory(made.device, made.caches)
    move = job("block first", "bfloat16", seed=1)
    memory = [allocate(made.device, handle) for handle in move.handles()]
    arenas = [np.zeros(1 << 12, np.uint8) for _ in range(2)]
    first, second = (own.open([move.case.layout], memory, arenas[0]) for _ in "ab")
    other = own.open([move.case.layout], memory, arenas[1])
    pinned = made.device.timeline.pinned
    assert len(pinned) == 2
    first.close()
    assert len(pinned) == 2
    second.close()
    other.close()
    assert not pinned


def test_a_failed_page_lock_leaks_no_resource(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is raised, and a later call succeeds."""
    made = cuda_fixture(0)
    own = DeviceWorkerMemory(made.device, made.caches)
    arena = np.zeros(1 << 12, np.uint8)
    move = job("block first", "bfloat16", seed=1)
    memory = [allocate(made.device, handle) for handle in move.handles()]

    def refuse(address: int, num_bytes: int) -> None:
        raise DeviceFailed("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(made.device, "pin", refuse)
        with pytest.raises(DeviceFailed, match="cannot be page-locked"):
            own.open([move.case.layout], memory, arena)
    own.open([move.case.layout], memory, arena).close()
    assert not made.device.timeline.pinned


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real server without a device."""
    server = Server(tmp_path)
    yield server
    server.close()


def test_a_worker_copies_its_gpu_s_cache_itself(server: Server) -> None:
    """With a real server that has no device, and with its next run."""
    made = cuda_fixture(3)
    own = DeviceWorkerMemory(made.device, made.caches)
    num_bytes = 8 * PART
    there = allocate(made.device, np.zeros(num_bytes, np.uint8))
    bytes_there = array_at(there.address, num_bytes).reshape(2, 8, PART // 2)
    rng = np.random.default_rng(1)
    tokens = list(range(2 * CHUNK))
    source, target = [0, 3, 1, 7], [2, 4, 6, 5]
    with CopyingClient(server.address, timeout_s=20) as client:
        request = RegisterKVCache("gpu", "e", "m", 1, 0, (), (GROUP,))
        client.register_kv_cache(request, (there,), own.open)

        def move(name: str) -> None:
            """Store blocks, and retrieve them into others."""
            bytes_there[:] = rng.integers(0, 256, bytes_there.shape, np.uint8)
            expected = bytes_there[:, source].copy()
            key = SessionKey("e", name)
            blocks = [source]
            assert client.store(key, "gpu", 0, 2 * CHUNK, blocks, tokens).num_stored
            bytes_there[:, target] = 0
            client.retrieve(key, "gpu", 0, 2 * CHUNK, [target], tokens)
            assert np.array_equal(bytes_there[:, target], expected)
            client.end_session(key)

        move("first")
        assert len(own._arenas) == 1
        server.kill()
        wait_until(lambda: not len(own._arenas))
        run = server.restart()
        wait_until(lambda: client.status().instances)
        move("second")
        client.unregister_kv_cache("gpu")
        assert not len(own._arenas)
    run.close()
