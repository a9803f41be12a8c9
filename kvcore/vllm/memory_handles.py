"""Memory handles by which the server reaches a worker's cache.

A GPU cache is exported by CUDA IPC. A CPU cache's storage is moved into POSIX shared
memory in place: the engine's views stay valid, and the server can map the live blocks.
With `driver = worker` the cache is not moved. Torch is imported only for CUDA events.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import struct
from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from kvcore.errors import HandleError
from kvcore.protocol import MemoryHandle, PosixShm, Private
from kvcore.shm import SHM_DIR, Bytes, Claim, remove_dead

if TYPE_CHECKING:
    import torch

SEGMENT_PREFIX = "kvcore-vllm-"
"""Servers remove segments named `kvcore-...` whose owner has exited, at their start and
when a worker dies."""

TORCH_HEADER_BYTES = 64
"""Torch stores its reference count, an int32, before the data."""

MARGIN_BYTES = 64 << 20
"""Shared memory left free for other processes."""


NUM_CUDA_EVENTS = 64
"""Events per worker, used in rotation. A server keeps at most 256 per worker. If an
event is recorded again while a copy waits for it, the copy waits longer."""


class CudaEvents:
    """Interprocess CUDA events of the current device. Used by one thread.

    Raises:
        ImportError, RuntimeError: torch or CUDA is not available.
    """

    def __init__(self) -> None:
        import torch

        events = [torch.cuda.Event(interprocess=True) for _ in range(NUM_CUDA_EVENTS)]
        self._next = cycle([(event, bytes(event.ipc_handle())) for event in events])

    def record(self) -> bytes:
        """Record an event after all work of the current stream; return its handle."""
        event, handle = next(self._next)
        event.record()
        return handle


class SharedCacheMemory:
    """The shared cache memory of one worker, until `close`.

    This process owns the names in /dev/shm. Torch's own cleanup daemon is killed by
    vLLM together with the worker, so its names would remain.
    """

    arrays: tuple[Bytes, ...] = ()
    """Memory that this process copies itself: none."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []
        self.record_event: Callable[[], bytes] = bytes
        """Records an event after the engine's submitted work; returns its handle.

        Empty for host memory, where the work is complete on return.
        """

    def share(self, tensor: torch.Tensor) -> MemoryHandle:
        """Share a tensor's whole storage with the server; return its handle.

        Call it once per storage.

        Raises:
            HandleError: it cannot be shared; the tensor is unchanged.
        """
        kind = tensor.device.type
        if kind == "cpu":
            return self._share_host(tensor.untyped_storage())
        if kind == "cuda":
            return self._share_device(tensor)
        raise HandleError(
            f"the cache lies on a {kind} device; the server reaches caches in host "
            "memory and on CUDA devices"
        )

    def close(self) -> None:
        """Remove the names, so that no process can attach. Idempotent."""
        for claim in self._claims:
            claim.release()
        self._claims.clear()

    def _share_device(self, tensor: torch.Tensor) -> MemoryHandle:
        try:
            # Optional: needs torch with CUDA, and NVIDIA's bindings.
            from kvcore.cuda.ipc import export_tensor

            handle = export_tensor(tensor)
            if self.record_event is bytes:
                self.record_event = CudaEvents().record
        except (ImportError, RuntimeError) as error:
            raise HandleError(
                f"the cache on {tensor.device} cannot be shared: {error}"
            ) from error
        return handle

    def _share_host(self, storage: torch.UntypedStorage) -> PosixShm:
        num_bytes = storage.nbytes()
        remove_dead(SEGMENT_PREFIX)
        if not storage.is_shared():
            _require_free_space(num_bytes)
        made_as = storage._share_filename_cpu_()[1].decode().removeprefix("/")
        name = f"{SEGMENT_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        claim = Claim(made_as, name)
        self._claims.append(claim)
        _add_torch_user(claim)
        return PosixShm(name, TORCH_HEADER_BYTES, num_bytes)


class PrivateCacheMemory:
    """Private cache memory of a worker that copies its own cache; nothing is moved."""

    record_event: Callable[[], bytes] = bytes
    """Returns no event: the engine's work is complete on return."""

    def __init__(self) -> None:
        self.arrays: list[Bytes] = []
        """The bytes of each storage, in the order of the handles."""
        self._storages: list[torch.UntypedStorage] = []

    def share(self, tensor: torch.Tensor) -> Private:
        """Add a tensor's whole storage; return its handle. Call it once per storage.

        Raises:
            HandleError: it is not in host memory.
        """
        kind = tensor.device.type
        if kind != "cpu":
            raise HandleError(
                f"the cache lies on a {kind} device, and driver = worker copies caches "
                "in host memory so far"
            )
        storage = tensor.untyped_storage()
        num_bytes = storage.nbytes()
        raw = (ctypes.c_uint8 * num_bytes).from_address(storage.data_ptr())
        self.arrays.append(np.frombuffer(raw, np.uint8))
        self._storages.append(storage)
        return Private(num_bytes)

    def close(self) -> None:
        """Do nothing: copies may be in progress until the client is closed."""


def _add_torch_user(claim: Claim) -> None:
    """Increment torch's reference count, so that torch keeps the segment."""
    (num_users,) = struct.unpack("<i", os.pread(claim.fd, 4, 0))
    os.pwrite(claim.fd, struct.pack("<i", num_users + 1), 0)


def _require_free_space(num_bytes: int) -> None:
    """Check the free space: a write beyond it kills the process (SIGBUS)."""
    stat = os.statvfs(SHM_DIR)
    free = stat.f_bavail * stat.f_frsize
    if num_bytes + MARGIN_BYTES > free:
        raise HandleError(
            f"the cache of {num_bytes >> 20} MiB does not fit into {SHM_DIR}, which "
            f"has {free >> 20} MiB free; make it larger (docker: --shm-size)"
        )
