"""GPU memory of workers in the server: exported by the worker, opened here by CUDA IPC.

A handle is the driver's 64 bytes for one allocation; a tensor lies anywhere in it. An
allocation is opened once, however many instances lie in it, and closed with the last.
Devices are identified by UUID: their ordinals differ between processes.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from threading import Event as Flag
from threading import Lock
from typing import Any, Protocol

from kvcore.copy.memory_transports import AttachedMemory, Transport
from kvcore.copy.paged_cache import PagedCache
from kvcore.cuda.device_interface import Device, Event, OpenedAllocation
from kvcore.cuda.shared_resources import SharedResources, quietly
from kvcore.cuda.staging import PinnedMemory
from kvcore.errors import (
    BadRequest,
    DeviceFailed,
    HandleError,
    SetupError,
    UnknownInstance,
)
from kvcore.layout import KVLayout
from kvcore.protocol import CudaIpc, MemoryHandle
from kvcore.shm import Bytes
from kvcore.status import DeviceStatus

log = logging.getLogger(__name__)

_DRIVER = "libcuda.so.1"
FIRST_PAUSE_S = 20e-6
LONGEST_PAUSE_S = 500e-6
"""Pauses between polls of a worker's event: doubled from the first to the longest."""
MAX_EVENTS = 256
"""Most events of one instance: a worker reuses its events."""


# -- the worker's side ---------------------------------------------------------------


def export(address: int, num_bytes: int, device: Device) -> CudaIpc:
    """Return a handle by which the server opens device memory of this process.

    The memory must stay allocated until the instance is unregistered.

    Raises:
        HandleError: not memory of this device, longer than its allocation, or of a
            kind that CUDA IPC cannot share; the message says what to change.
    """
    exported = device.export(address)
    if exported.offset + num_bytes > exported.allocation_bytes:
        raise HandleError(
            f"{num_bytes:,} bytes from byte {exported.offset:,} on: the allocation "
            f"has {exported.allocation_bytes:,}"
        )
    return CudaIpc(device.uuid, exported.handle, exported.offset, num_bytes)


def export_tensor(tensor: Any) -> CudaIpc:
    """Return a handle of the whole storage of a `torch.Tensor`; see `export`.

    Offsets of views count from the storage's first byte.
    """
    storage = tensor.untyped_storage()
    device = _worker_devices()[tensor.device.index or 0]
    return export(storage.data_ptr(), storage.nbytes(), device)


# -- the server's side ---------------------------------------------------------------


def open_cuda_transports(
    device: str, arena: Bytes
) -> Mapping[type[MemoryHandle], Transport]:
    """Return the transport of GPU memory, or none; page-lock the arena for it.

    Args:
        device: "cuda", "cpu", or "auto", which uses CUDA where there is a driver and
            logs why not.
        arena: all of L1, `[bytes]`.

    Raises:
        SetupError: "cuda" without a working driver, or the arena cannot be page-locked.
    """
    if device == "cpu" or (device == "auto" and not _has_driver()):
        return {}
    try:
        devices = _open_devices()
    except SetupError as error:
        if device == "cuda":
            raise SetupError(f"device = cuda: {error.message}") from None
        log.warning("device = auto: caches in host memory only: %s", error.message)
        return {}
    try:
        cuda = CudaTransport(devices, arena)
    except DeviceFailed as error:
        raise SetupError(
            f"device = {device}: {error.message}; make L1 smaller (--l1-size), or "
            "start with --device cpu for caches in host memory"
        ) from None
    log.info("device = %s: %s", device, ", ".join(map(repr, devices)))
    return {CudaIpc: cuda}


def _has_driver() -> bool:
    """Return whether the driver's library can be loaded, the cheapest check."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def _open_devices() -> Sequence[Device]:
    # Imported here: it is slow, and most servers have no GPU.
    from kvcore.cuda.driver import open_devices

    return open_devices()


_worker_devices = cache(_open_devices)


class DeviceCaches(Protocol):
    """State that the caches of one device share: staging, kernels, copy rates."""

    def cache(self, layout: KVLayout, addresses: Sequence[int]) -> PagedCache:
        """Return a new cache; `addresses` are those of its handles' first bytes."""

    def status(self) -> DeviceStatus:
        """Describe the device and its caches. Any thread."""

    def close(self) -> None:
        """Release it, after all caches are closed."""


def open_caches(device: Device) -> DeviceCaches:
    """Return the shared state of a device's caches.

    Without working kernels, copies use the copy engines only; a warning is logged.
    """
    from kvcore.cuda.cuda_cache import CudaCaches
    from kvcore.cuda.kernel_launches import NoKernels, TritonKernels

    kernels = TritonKernels(device)
    try:
        kernels.check()
    except DeviceFailed as error:
        reason = f"{device.name} runs no kernels of ours: {error.message}"
        log.warning("%s; small pieces are copied slowly", reason)
        return CudaCaches(device, NoKernels(reason))
    return CudaCaches(device, kernels)


def open_group_caches(
    caches: DeviceCaches,
    layouts: Sequence[KVLayout],
    addresses: Sequence[int],
    stack: ExitStack,
) -> tuple[PagedCache, ...]:
    """Return one cache per layout, on handles at `addresses`; `stack` closes them."""
    made = []
    for layout in layouts:
        made.append(caches.cache(layout, addresses))
        stack.callback(quietly, made[-1].close)
    return tuple(made)


class CudaTransport:
    """Transport of workers' GPU memory, with the arena page-locked.

    Attaching runs on a separate thread: the first use of a GPU takes a third of a
    second, and opening a handle can wait for the GPU.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        arena: Bytes,
        caches: Callable[[Device], DeviceCaches] = open_caches,
    ) -> None:
        """Page-lock the arena; raises `DeviceFailed`."""
        self._devices = {device.uuid: device for device in devices}
        self._open_caches = caches
        self._caches: dict[str, DeviceCaches] = {}
        self._allocations = SharedResources[tuple[Device, bytes], OpenedAllocation]()
        self._pinned = PinnedMemory(devices[0], arena)
        self._attacher = ThreadPoolExecutor(1, "attacher")

    def attach(
        self, handles: Sequence[CudaIpc], layouts: Sequence[KVLayout]
    ) -> Future[AttachedMemory]:
        """Open an instance's allocations; see `Transport`."""
        uuids = {handle.device for handle in handles}
        if len(uuids) > 1:
            raise HandleError(f"handles: of {len(uuids)} GPUs; a worker has one")
        device = self._devices.get(uuids.pop())
        if device is None:
            raise HandleError(
                f"GPU {handles[0].device} is not visible to the server, which sees "
                f"{', '.join(self._devices)} (CUDA_VISIBLE_DEVICES)"
            )
        return self._attacher.submit(self._attach, device, handles, layouts)

    def devices(self) -> tuple[DeviceStatus, ...]:
        """Describe the GPUs that hold caches, or have held some."""
        return tuple(caches.status() for caches in [*self._caches.values()])

    def close(self) -> None:
        """Unlock the arena and release the GPUs."""
        self._attacher.shutdown(wait=True)
        for caches in self._caches.values():
            quietly(caches.close)
        quietly(self._pinned.close)

    def _attach(
        self, device: Device, handles: Sequence[CudaIpc], layouts: Sequence[KVLayout]
    ) -> AttachedMemory:
        caches = self._caches.get(device.uuid)
        if caches is None:
            caches = self._caches[device.uuid] = self._open_caches(device)
        with ExitStack() as stack:
            opened = [self._open(stack, device, handle) for handle in handles]
            made = open_group_caches(caches, layouts, opened, stack)
            return CudaMemory(device, made, stack)

    def _open(self, stack: ExitStack, device: Device, handle: CudaIpc) -> int:
        """Return the address of a handle's first byte; `stack` closes the handle."""
        allocation = stack.enter_context(
            self._allocations.use(
                (device, handle.handle),
                lambda: device.open(handle.handle),
                lambda opened: device.close_handle(opened.address),
            )
        )
        if handle.offset + handle.length > allocation.num_bytes:
            raise HandleError(
                f"the allocation has {allocation.num_bytes:,} bytes; the handle claims "
                f"{handle.length:,} from byte {handle.offset:,} on",
                size=allocation.num_bytes,
                claimed=handle.offset + handle.length,
            )
        return allocation.address + handle.offset


class CudaMemory(AttachedMemory):
    """An instance's memory on one GPU."""

    def __init__(
        self, device: Device, caches: tuple[PagedCache, ...], stack: ExitStack
    ) -> None:
        """Take over what `stack` closes, unless this raises."""
        self.caches = caches
        self._device = device
        self._is_abandoned = Flag()
        self._lock = Lock()
        self._events: dict[bytes, Event] = {}
        self._stream = device.stream()
        stack.callback(quietly, self._stream.close)
        self._recorded = device.event(shared=True)
        stack.callback(quietly, self._recorded.close)
        self.event = self._recorded.handle()
        self._stack = stack.pop_all()

    def wait(self, event: bytes, check: Callable[[], None]) -> None:
        """Poll the worker's event until it is reached.

        A stream does not wait for it: the event of a dead process may never be
        reached, and a wait in a stream cannot be cancelled.
        """
        if not event:
            return
        known = self._event(event)
        pause = FIRST_PAUSE_S
        while not known.is_done():
            check()
            if self._is_abandoned.wait(pause):
                raise UnknownInstance("its worker is gone; what it waited for is void")
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def record(self) -> None:
        """Record the instance's event; the copies so far have ended."""
        self._stream.record(self._recorded)

    def abandon(self) -> None:
        """End all waits for the worker."""
        self._is_abandoned.set()

    def close(self) -> None:
        """Close caches, events and handles, also of a GPU that failed."""
        self.caches = ()
        self._stack.close()

    def _event(self, handle: bytes) -> Event:
        with self._lock:
            known = self._events.get(handle)
            if known is None:
                if len(self._events) >= MAX_EVENTS:
                    raise BadRequest(
                        f"event: more than {MAX_EVENTS} events of one instance; use "
                        "one again when its request was answered"
                    )
                known = self._events[handle] = self._device.open_event(handle)
                self._stack.callback(quietly, known.close)
            return known
