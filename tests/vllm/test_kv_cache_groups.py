"""Cache groups and memory handles derived from an engine's tensors."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcore import shm
from kvcore.errors import HandleError, LayoutError
from kvcore.layout import KVLayout
from kvcore.protocol import CudaIpc, PosixShm
from kvcore.shm import SHM_DIR, Segment, remove_dead
from kvcore.vllm import kv_cache_groups as groups
from kvcore.vllm import memory_handles as memory_module
from kvcore.vllm.memory_handles import SEGMENT_PREFIX, SharedCacheMemory

ROOT = Path(__file__).resolve().parents[2]


_numbers = itertools.count()


@dataclass
class Storage:
    """A storage that can be moved into shared memory as by torch."""

    size: int
    made_as: str = ""

    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.size

    def data_ptr(self) -> int:
        """Return the address."""
        return id(self)

    def is_shared(self) -> bool:
        """Return whether it is in shared memory."""
        return bool(self.made_as)

    def _share_filename_cpu_(self) -> tuple[bytes, bytes, int]:
        self.made_as = f"torch_{os.getpid()}_{next(_numbers)}"
        users = (1).to_bytes(4, sys.byteorder) + bytes(60)
        (SHM_DIR / self.made_as).write_bytes(users + bytes(self.size))
        return b"manager", f"/{self.made_as}".encode(), self.size


@dataclass
class Tensor:
    """A float32 view of a storage."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: Storage
    offset: int = 0
    dtype: str = "torch.float32"
    device: Any = field(default_factory=lambda: SimpleNamespace(type="cpu"))

    def stride(self) -> tuple[int, ...]:
        """Return the strides in elements."""
        return self.strides

    def storage_offset(self) -> int:
        """Return the offset in elements."""
        return self.offset

    def element_size(self) -> int:
        """Return the size of an element in bytes."""
        return 4

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        return self.storage.data_ptr() + self.offset

    def untyped_storage(self) -> Storage:
        """Return the storage."""
        return self.storage


@pytest.fixture
def storage() -> Storage:
    """A storage that has not been shared."""
    return Storage(1 << 16)


@pytest.fixture
def memory() -> Iterator[SharedCacheMemory]:
    """Shared memory, removed after the test."""
    memory = SharedCacheMemory()
    yield memory
    memory.close()


def group(*layers: str, **changes: Any) -> groups.EngineGroup:
    """Return a group of the named layers."""
    return groups.EngineGroup(32, layers=layers, **changes)


def test_views_of_one_storage_share_a_handle(
    storage: Storage, memory: SharedCacheMemory
) -> None:
    """Interleaved layers are one group of pages in a segment after 64 header bytes."""
    caches = {
        f"layer{i}": Tensor((8, 2, 32, 4), (512, 128, 4, 1), storage, offset=i * 256)
        for i in range(2)
    }
    described = groups.describe_caches(
        [group("layer0", "layer1")], caches, 8, share=memory.share, replicate_mla=True
    )
    (handle,) = described.handles
    assert handle == PosixShm(handle.name, 64, 1 << 16)
    (one,) = described.groups
    assert (one.axes, one.kind, len(one.tensors)) == ("NPPP", "pages", 2)
    layout = KVLayout.derive(one, [1 << 16], 64)
    assert layout.num_blocks == 8
    assert layout.part.unit_bytes == 2 * 32 * 4 * 4
    assert layout.plane_offsets.tolist() == [0, 1024]


def test_layers_of_different_shapes_are_separate_groups(
    storage: Storage, memory: SharedCacheMemory
) -> None:
    """Each group uses the block ids of its engine group."""
    caches = {
        "wide": Tensor((8, 64), (64, 1), storage),
        "slim": Tensor((8, 32), (32, 1), storage, offset=1024),
        "shared": Tensor((8, 32), (32, 1), storage, offset=1024),
        "mla": Tensor((8, 16), (16, 1), storage, offset=2048),
    }
    described = groups.describe_caches(
        [group("wide", "slim", "shared"), group("mla", is_mla=True, window=64)],
        caches,
        8,
        share=memory.share,
        replicate_mla=True,
    )
    assert described.sources == (0, 0, 1)
    assert [len(g.tensors) for g in described.groups] == [1, 1, 1]
    assert [g.replicated for g in described.groups] == [False, False, True]
    assert [g.window for g in described.groups] == [None, None, 64]


def test_separate_k_and_v_and_smaller_kernel_blocks(
    storage: Storage, memory: SharedCacheMemory
) -> None:
    """K and V are separate planes; consecutive kernel blocks form one page."""
    separate = Tensor((2, 8, 32), (256, 32, 1), storage)
    described = groups.describe_caches(
        [group("layer")],
        {"layer": separate},
        8,
        share=memory.share,
        replicate_mla=False,
    )
    assert [t.offset for t in described.groups[0].tensors] == [0, 1024]
    small = Tensor((16, 32), (32, 1), storage)
    described = groups.describe_caches(
        [group("layer")], {"layer": small}, 8, share=memory.share, replicate_mla=False
    )
    (view,) = described.groups[0].tensors
    assert (view.shape, view.strides) == ((8, 2, 32), (256, 128, 4))


def test_unsupported_caches_are_refused(
    storage: Storage, memory: SharedCacheMemory
) -> None:
    """A tensor without blocks, no layers, and a cache that is not a tensor."""
    odd = Tensor((7, 32), (32, 1), storage)
    with pytest.raises(LayoutError, match="8 blocks"):
        groups.describe_caches(
            [group("layer")], {"layer": odd}, 8, share=memory.share, replicate_mla=False
        )
    with pytest.raises(LayoutError, match="no layers"):
        groups.describe_caches(
            [group("layer")], {}, 8, share=memory.share, replicate_mla=False
        )
    with pytest.raises(LayoutError, match="list"):
        groups.describe_caches(
            [group("layer")],
            {"layer": []},
            8,
            share=memory.share,
            replicate_mla=False,  # type: ignore[dict-item]
        )


def test_a_shared_segment_is_renamed_after_its_owner(
    storage: Storage, memory: SharedCacheMemory
) -> None:
    """Torch's name is removed, and its reference count keeps the segment."""
    handle = memory.share(Tensor((8, 32), (32, 1), storage))
    assert isinstance(handle, PosixShm)
    assert handle.name.startswith(f"{SEGMENT_PREFIX}{os.getpid()}-")
    assert not (SHM_DIR / storage.made_as).exists()
    with Segment.attach(handle.name, offset=0, length=64) as header:
        assert header.array[:4].view(np.int32).tolist() == [2]
    assert handle.name not in remove_dead(SEGMENT_PREFIX)
    memory.close()
    assert not (SHM_DIR / handle.name).exists()


SHARE_AND_WAIT = """
import sys
from kvcore.vllm.memory_handles import SharedCacheMemory
from tests.vllm.test_kv_cache_groups import Storage, Tensor
memory = SharedCacheMemory()
print(memory.share(Tensor((8, 32), (32, 1), Storage(1024))).name, flush=True)
sys.stdin.read()
"""


def test_the_next_engine_removes_segments_of_a_killed_one(
    storage: Storage, memory: SharedCacheMemory
) -> None:
    """Segments of running engines are kept."""
    living = memory.share(Tensor((8, 32), (32, 1), storage))
    with subprocess.Popen(
        [sys.executable, "-c", SHARE_AND_WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert (SHM_DIR / name).exists()
        process.kill()
    memory.share(Tensor((8, 32), (32, 1), Storage(1024)))
    assert not (SHM_DIR / name).exists()
    assert isinstance(living, PosixShm)
    assert (SHM_DIR / living.name).exists()


def test_servers_recognize_segments_of_shared_caches() -> None:
    """Servers remove the segments of dead processes."""
    assert SEGMENT_PREFIX.startswith(shm.SEGMENT_PREFIX)


def test_memory_that_cannot_be_shared_is_refused(
    storage: Storage, memory: SharedCacheMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown devices, storages that do not fit, and missing segments."""
    tensor = Tensor((8, 32), (32, 1), storage)
    tensor.device = SimpleNamespace(type="tpu")
    with pytest.raises(HandleError, match="tpu device"):
        memory.share(tensor)
    tensor.device = SimpleNamespace(type="cpu")
    monkeypatch.setattr(memory_module, "MARGIN_BYTES", 1 << 60)
    with pytest.raises(HandleError, match="does not fit"):
        memory.share(tensor)
    monkeypatch.undo()

    def elsewhere() -> tuple[bytes, bytes, int]:
        return b"", b"/torch_elsewhere", 0

    monkeypatch.setattr(storage, "_share_filename_cpu_", elsewhere)
    with pytest.raises(HandleError, match="torch_elsewhere"):
        memory.share(tensor)


def test_gpu_memory_is_exported_by_cuda_ipc(
    storage: Storage, memory: SharedCacheMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes with an event; without CUDA's libraries it is refused."""
    tensor = Tensor((8, 32), (32, 1), storage)
    tensor.device = SimpleNamespace(type="cuda")
    handle = CudaIpc("GPU-0", bytes(64), 0, storage.size)
    monkeypatch.setitem(sys.modules, "kvcore.cuda.ipc", None)
    with pytest.raises(HandleError, match="cannot be shared"):
        memory.share(tensor)
    assert memory.record_event() == b""
    exporter = SimpleNamespace(export_tensor=lambda _: handle)
    monkeypatch.setitem(sys.modules, "kvcore.cuda.ipc", exporter)
    events = SimpleNamespace(record=lambda: b"event")
    monkeypatch.setattr(memory_module, "CudaEvents", lambda: events)
    assert memory.share(tensor) is handle
    assert memory.record_event() == b"event"
