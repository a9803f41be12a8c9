"""GPU memory of a worker that copies itself, with a page-locked arena mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import Protocol

from kvcore.copy.paged_cache import PagedCache
from kvcore.cuda.device_interface import Device
from kvcore.cuda.ipc import DeviceCaches, quietly
from kvcore.cuda.staging import PinnedMemory
from kvcore.layout import KVLayout
from kvcore.shm import Bytes
from kvcore.status import DeviceStatus


class DeviceMemory(Protocol):
    """Flat memory of this process on the device: a tensor of torch's, for one."""

    def data_ptr(self) -> int:
        """Return its address."""


class DeviceWorkerMemory:
    """GPU memory of a worker that copies: what its instances on one GPU share.

    `open` is for `CopyingClient.register_kv_cache`. The memory stays the caller's, and
    so do `caches`, which are closed after the last instance.
    """

    def __init__(self, device: Device, caches: DeviceCaches) -> None:
        self._device = device
        self._caches = caches
        self._lock = Lock()
        self._pinned: dict[int, _PinnedArena] = {}

    def open(
        self,
        layouts: Sequence[KVLayout],
        memory: Sequence[DeviceMemory],
        arena: Bytes,
    ) -> CudaWorkerMemory:
        """Page-lock the arena, once for all instances, and make caches of memory.

        Raises:
            DeviceFailed: it cannot be page-locked.
        """
        addresses = [part.data_ptr() for part in memory]
        with ExitStack() as stack:
            self._pin(arena)
            stack.callback(self._unpin, arena)
            made = []
            for layout in layouts:
                made.append(self._caches.cache(layout, addresses))
                stack.callback(quietly, made[-1].close)
            return CudaWorkerMemory(tuple(made), stack.pop_all().close)

    def status(self) -> DeviceStatus:
        """Describe the device and its caches. Any thread."""
        return self._caches.status()

    def _pin(self, arena: Bytes) -> None:
        with self._lock:
            known = self._pinned.get(arena.ctypes.data)
            if known is None:
                known = _PinnedArena(PinnedMemory(self._device, arena))
                self._pinned[arena.ctypes.data] = known
            known.num_users += 1

    def _unpin(self, arena: Bytes) -> None:
        with self._lock:
            known = self._pinned[arena.ctypes.data]
            known.num_users -= 1
            if not known.num_users:
                del self._pinned[arena.ctypes.data]
                quietly(known.pinned.close)


class _PinnedArena:
    """A page-locked arena, and how many instances copy to and from it."""

    def __init__(self, pinned: PinnedMemory) -> None:
        self.pinned = pinned
        self.num_users = 0


class CudaWorkerMemory:
    """One instance's memory; see `kvcore.worker.mapped_arena.Opened`."""

    def __init__(
        self, caches: tuple[PagedCache, ...], close: Callable[[], None]
    ) -> None:
        self.caches = caches
        self._close = close

    def close(self) -> None:
        """Close the caches, and unlock the arena if it was the last one's."""
        self.caches = ()
        self._close()
