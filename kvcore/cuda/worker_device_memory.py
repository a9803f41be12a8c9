"""GPU memory of a worker that copies itself, with a page-locked arena mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from kvcore.copy.paged_cache import PagedCache
from kvcore.cuda.device_interface import Device
from kvcore.cuda.ipc import DeviceCaches, open_group_caches
from kvcore.cuda.shared_resources import SharedResources
from kvcore.cuda.staging import PinnedMemory
from kvcore.layout import KVLayout
from kvcore.shm import Bytes
from kvcore.status import DeviceStatus


class DeviceMemory(Protocol):
    """Contiguous device memory of this process, for example a `torch.Tensor`."""

    def data_ptr(self) -> int:
        """Return its address."""


@dataclass(frozen=True, slots=True)
class CudaWorkerMemory:
    """One instance's memory; see `kvcore.worker.mapped_arena.WorkerMemory`."""

    caches: tuple[PagedCache, ...]
    close: Callable[[], None]


class DeviceWorkerMemory:
    """GPU memory of a worker that copies: state that its instances on one GPU share.

    `open` is for `CopyingClient.register_kv_cache`. The caller keeps the memory
    allocated, and closes `caches` after the last instance.
    """

    def __init__(self, device: Device, caches: DeviceCaches) -> None:
        self._device = device
        self._caches = caches
        self._arenas = SharedResources[int, PinnedMemory]()

    def open(
        self,
        layouts: Sequence[KVLayout],
        memory: Sequence[DeviceMemory],
        arena: Bytes,
    ) -> CudaWorkerMemory:
        """Return caches on the memory; page-lock the arena, once for all instances.

        Raises:
            DeviceFailed: it cannot be page-locked.
        """
        addresses = [part.data_ptr() for part in memory]
        pin = (lambda: PinnedMemory(self._device, arena), PinnedMemory.close)
        with ExitStack() as stack:
            stack.enter_context(self._arenas.use(arena.ctypes.data, *pin))
            made = open_group_caches(self._caches, layouts, addresses, stack)
            return CudaWorkerMemory(made, stack.pop_all().close)

    def status(self) -> DeviceStatus:
        """Describe the device and its caches. Any thread."""
        return self._caches.status()
