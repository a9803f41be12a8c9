"""How the server reaches a worker's cache: the one place that chooses a transport.

On a CPU the cache's storage is moved into POSIX shared memory, in place: every view
that the engine has of it stays valid, and another process can map the live blocks.
Tensors are torch's, known here by what they can do, so that nothing imports torch.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from kvcore.errors import HandleError
from kvcore.protocol import MemoryHandle, PosixShm
from kvcore.shm import SHM_DIR

TORCH_HEADER_BYTES = 64
"""Torch's shared-memory manager keeps its count of users before the data."""

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


def share(tensor: Tensor) -> MemoryHandle:
    """Make a tensor's whole storage reachable for the server; return its handle.

    Raises:
        HandleError: it cannot be shared, saying why; the tensor is as it was.
    """
    kind = tensor.device.type
    if kind == "cpu":
        return _share_host(tensor.untyped_storage())
    # CUDA IPC takes its place here: a handle of the allocation, for the same groups.
    raise HandleError(
        f"the cache lies on a {kind} device, and the server can only reach caches in "
        "host memory so far"
    )


def _share_host(storage: Storage) -> PosixShm:
    num_bytes = storage.nbytes()
    if not storage.is_shared():
        _require_room(num_bytes)
    name = storage._share_filename_cpu_()[1].decode().removeprefix("/")
    path = SHM_DIR / name
    if not path.exists() or path.stat().st_size < TORCH_HEADER_BYTES + num_bytes:
        raise HandleError(
            f"the cache was shared as {name!r}, which is not a file of "
            f"{TORCH_HEADER_BYTES + num_bytes} bytes in {SHM_DIR}"
        )
    return PosixShm(name, TORCH_HEADER_BYTES, num_bytes)


def _require_room(num_bytes: int) -> None:
    """Refuse what does not fit: writing past the end of /dev/shm kills the process."""
    stat = os.statvfs(SHM_DIR)
    free = stat.f_bavail * stat.f_frsize
    if num_bytes + MARGIN_BYTES > free:
        raise HandleError(
            f"the cache of {num_bytes >> 20} MiB does not fit into {SHM_DIR}, which "
            f"has {free >> 20} MiB free; make it larger (docker: --shm-size)"
        )
