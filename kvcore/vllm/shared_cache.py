"""How the server reaches a worker's cache: the one place that chooses a transport.

On a GPU it is named by CUDA IPC. On a CPU the cache's storage is moved into POSIX
shared memory, in place: every view that the engine has of it stays valid, and another
process can map the live blocks. Where the worker copies itself, it stays where it is.
Tensors are torch's, known here by what they can do, so that nothing imports torch.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import struct
from collections.abc import Callable
from itertools import cycle
from typing import Any, Protocol

import numpy as np

from kvcore.errors import HandleError
from kvcore.protocol import MemoryHandle, PosixShm, Private
from kvcore.shm import SHM_DIR, Bytes, Claim, remove_dead

SEGMENT_PREFIX = "kvcore-vllm-"
"""Servers remove segments called `kvcore-...` whose owner is gone: at their start, and
when they see a worker die."""

TORCH_HEADER_BYTES = 64
"""Torch keeps its count of users, an int32, before the data."""

MARGIN_BYTES = 64 << 20
"""Left free in shared memory for others."""


class Storage(Protocol):
    """`torch.UntypedStorage`, as far as it is used."""

    def nbytes(self) -> int: ...  # noqa: D102
    def data_ptr(self) -> int: ...  # noqa: D102
    def is_shared(self) -> bool: ...  # noqa: D102
    def _share_filename_cpu_(self) -> tuple[bytes, bytes, int]: ...


class Tensor(Protocol):
    """`torch.Tensor`, as far as it is used."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> object: ...  # noqa: D102
    @property
    def device(self) -> Any: ...  # noqa: D102
    def stride(self) -> tuple[int, ...]: ...  # noqa: D102
    def storage_offset(self) -> int: ...  # noqa: D102
    def element_size(self) -> int: ...  # noqa: D102
    def data_ptr(self) -> int: ...  # noqa: D102
    def untyped_storage(self) -> Any: ...  # noqa: D102


NUM_CUDA_EVENTS = 64
"""Events per worker, used in rotation. A server keeps at most 256 per worker. If an
event is recorded again while a copy waits for it, the copy only waits for more work."""


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
    """What one worker has shared, until `close`.

    The names in /dev/shm are this process's own. Torch would leave them to a daemon,
    which vLLM kills with the worker when it is told to stop, and they would stay.
    """

    arrays: tuple[Bytes, ...] = ()
    """What this process copies itself: nothing."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []
        self._record_event: Callable[[], bytes] = bytes

    def __repr__(self) -> str:
        return f"<SharedCacheMemory {[claim.name for claim in self._claims]}>"

    def share(self, tensor: Tensor) -> MemoryHandle:
        """Make a tensor's whole storage reachable for the server; return its handle.

        A storage is shared once.

        Raises:
            HandleError: it cannot be shared, saying why; the tensor is as it was.
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

    def record_event(self) -> bytes:
        """Say how far the engine's work has come, for a copy to wait for.

        A CUDA event's handle; empty for host memory, whose work is done at return.
        """
        return self._record_event()

    def close(self) -> None:
        """Remove the names: nobody can attach any more. Idempotent."""
        for claim in self._claims:
            claim.release()
        self._claims.clear()

    def _share_device(self, tensor: Tensor) -> MemoryHandle:
        try:
            # Only where there is a GPU: torch with CUDA, and NVIDIA's bindings.
            from kvcore.cuda.ipc import export_tensor

            handle = export_tensor(tensor)
            if self._record_event is bytes:
                self._record_event = CudaEvents().record
        except (ImportError, RuntimeError) as error:
            raise HandleError(
                f"the cache on {tensor.device} cannot be shared: {error}"
            ) from error
        return handle

    def _share_host(self, storage: Storage) -> PosixShm:
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
    """What one worker keeps to itself, since it copies its cache: nothing is moved."""

    def __init__(self) -> None:
        self.arrays: list[Bytes] = []
        """Each storage's bytes, in the order of the handles."""
        self._storages: list[Any] = []

    def share(self, tensor: Tensor) -> Private:
        """Take in a tensor's whole storage, once; return its handle.

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

    def record_event(self) -> bytes:
        """Say nothing: the engine's work is done at return."""
        return b""

    def close(self) -> None:
        """Do nothing: until the client is closed a copy may be under way."""


def _add_torch_user(claim: Claim) -> None:
    """Be one of torch's users: the last of them removes the name that torch gave."""
    (num_users,) = struct.unpack("<i", os.pread(claim.fd, 4, 0))
    os.pwrite(claim.fd, struct.pack("<i", num_users + 1), 0)


def _require_free_space(num_bytes: int) -> None:
    """Refuse what does not fit: writing past the end of /dev/shm kills the process."""
    stat = os.statvfs(SHM_DIR)
    free = stat.f_bavail * stat.f_frsize
    if num_bytes + MARGIN_BYTES > free:
        raise HandleError(
            f"the cache of {num_bytes >> 20} MiB does not fit into {SHM_DIR}, which "
            f"has {free >> 20} MiB free; make it larger (docker: --shm-size)"
        )
