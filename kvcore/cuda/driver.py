"""NVIDIA's driver through `cuda.bindings.driver`: GPUs, streams, events, errors.

Each GPU's primary context is retained until the process exits; torch uses the same
one. Every call that needs a context first makes it current in the calling thread and
sets the thread's stream-capture mode to thread-local: otherwise these calls would break
a graph that an engine captures in another thread, and would fail themselves. The
bindings release the GIL in every call.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from itertools import pairwise
from threading import Lock, local
from typing import Any
from uuid import UUID

import numpy as np

from kvcore.cuda.device_interface import (
    HANDLE_BYTES,
    Addresses,
    Event,
    ExportedAllocation,
    Function,
    Launch,
    OpenedAllocation,
)
from kvcore.errors import DeviceFailed, HandleError, KVError, SetupError

try:
    from cuda.bindings import driver as cu
except ImportError as error:
    raise SetupError(
        f"the package cuda-bindings cannot be imported ({error}): "
        "pip install 'kvctl[gpu]'"
    ) from None

RESULT = cu.CUresult
_FOREIGN = {
    RESULT.CUDA_ERROR_INVALID_VALUE,
    RESULT.CUDA_ERROR_INVALID_CONTEXT,
    RESULT.CUDA_ERROR_MAP_FAILED,
    RESULT.CUDA_ERROR_ALREADY_MAPPED,
    RESULT.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED,
    RESULT.CUDA_ERROR_INVALID_HANDLE,
    RESULT.CUDA_ERROR_NOT_SUPPORTED,
}
"""Statuses for a handle that the driver cannot open, where the device is sound."""


def check(result: tuple[Any, ...], what: str) -> Any:
    """Return a driver call's value, a tuple of several values, or None.

    Raises:
        DeviceFailed: the call failed; with the driver's status.
    """
    status, *values = result
    if status != RESULT.CUDA_SUCCESS:
        raise DeviceFailed(f"{what}: {explain(status)}", status=int(status))
    if len(values) == 1:
        return values[0]
    return tuple(values) if values else None


def check_opened(result: tuple[Any, ...], what: str) -> Any:
    """Return what a handle opened.

    Raises:
        HandleError: this process cannot open the handle.
        DeviceFailed: any other failure.
    """
    status = result[0]
    if status in _FOREIGN:
        raise HandleError(
            f"{what} of another process cannot be opened: {explain(status)}; that "
            "process is gone, is this one, or lies in other IPC or pid namespaces"
        )
    return check(result, f"opening {what}")


def handle_of(made: Any) -> bytes:
    """Return the bytes of a CUipcMemHandle or CUipcEventHandle.

    Read from its address: bindings since 13.5 have no field for them.
    """
    return ctypes.string_at(int(made.getPtr()), HANDLE_BYTES)


def named(empty: Any, handle: bytes) -> Any:
    """Write a handle's bytes into an empty CUipcMemHandle or CUipcEventHandle.

    Raises:
        HandleError: not the number of bytes of a handle.
    """
    if len(handle) != HANDLE_BYTES:
        raise HandleError(f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}")
    ctypes.memmove(int(empty.getPtr()), handle, HANDLE_BYTES)
    return empty


def explain(status: Any) -> str:
    """Return a status's name and meaning."""
    _, name = cu.cuGetErrorName(status)
    _, text = cu.cuGetErrorString(status)
    known = (name or b"CUDA_ERROR").decode()
    return f"{known} ({(text or b'unknown').decode()})"


_BATCH_EXTRA: dict[int, tuple[None, ...]] = {13000: (), 12080: (None,)}
"""Arguments before the stream by version of cuMemcpyBatchAsync's signature, newest
first: in 12.8 a pointer to the index of the copy that failed."""
_ORDER_STREAM = 1


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes: sources are read in stream order; the rest is unset."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_location", ctypes.c_int * 2),
        ("destination_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class BatchCopy:
    """The driver's cuMemcpyBatchAsync. Any thread; ctypes releases the GIL."""

    def __init__(self, address: int, version: int) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._extra = _BATCH_EXTRA[version]
        self._function: Callable[..., int] = ctypes.CFUNCTYPE(
            ctypes.c_int,
            *(pointer, pointer, pointer, size),
            *(pointer, pointer, size, *(pointer for _ in self._extra), pointer),
        )(address)
        self._attributes = _Attributes(source_order=_ORDER_STREAM)
        self._first = size(0)

    @classmethod
    def find(cls, driver_version: int) -> BatchCopy | None:
        """Return the driver's function; None for a driver without it."""
        for version in _BATCH_EXTRA:
            if driver_version < version:
                continue
            status, address, _ = cu.cuGetProcAddress(b"cuMemcpyBatchAsync", version, 0)
            if status == RESULT.CUDA_SUCCESS and address:
                return cls(address, version)
        return None

    def __call__(
        self,
        destinations: Addresses,
        sources: Addresses,
        sizes: Addresses,
        stream: int,
    ) -> int:
        """Queue the copies; return the driver's status."""
        return self._function(
            destinations.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            len(sizes),
            ctypes.addressof(self._attributes),
            ctypes.addressof(self._first),
            1,
            *self._extra,
            stream,
        )


class CudaEvent:
    """An `Event` of the driver."""

    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self._call = device.call
        self._enter = device.enter
        self.cu_event = handle

    def is_done(self) -> bool:
        self._enter()
        (status,) = cu.cuEventQuery(self.cu_event)
        if status == RESULT.CUDA_ERROR_NOT_READY:
            return False
        check((status,), "work on the GPU")
        return True

    def wait(self) -> None:
        self._call("work on the GPU", cu.cuEventSynchronize, self.cu_event)

    def handle(self) -> bytes:
        made = self._call("exporting an event", cu.cuIpcGetEventHandle, self.cu_event)
        return handle_of(made)

    def close(self) -> None:
        self._call("closing an event", cu.cuEventDestroy, self.cu_event)


class CudaStream:
    """A `Stream` of the driver."""

    def __init__(
        self, device: CudaDevice, handle: Any, pins: Pins, batch: BatchCopy | None
    ) -> None:
        self._call = device.call
        self._enter = device.enter
        self._stream = handle
        self.handle = int(handle)
        self._pins = pins
        self._batch = batch

    def record(self, event: Event) -> None:
        self._call("recording an event", cu.cuEventRecord, _own(event), self._stream)

    def wait_for(self, event: Event) -> None:
        flags = cu.CUevent_wait_flags.CU_EVENT_WAIT_DEFAULT
        wait = (cu.cuStreamWaitEvent, self._stream, _own(event), flags)
        self._call("waiting for an event", *wait)

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        self._enter()
        for first, size in self._pins.split(destination, source, num_bytes):
            copied = cu.cuMemcpyAsync(
                destination + first, source + first, size, self._stream
            )
            check(copied, "a copy")

    def copy_many(
        self,
        destinations: Addresses,
        sources: Addresses,
        sizes: Addresses,
        *,
        batched: bool,
    ) -> None:
        if self._batch is None or not batched:
            self._copy_each(destinations, sources, sizes)
            return
        whole = self._pins.whole(destinations, sources, sizes)
        if not whole.all():
            cut = ~whole
            self._copy_each(destinations[cut], sources[cut], sizes[cut])
            destinations, sources = destinations[whole], sources[whole]
            sizes = sizes[whole]
        if len(sizes):
            self._enter()
            status = self._batch(destinations, sources, sizes, self.handle)
            check((RESULT(status),), "a batch of copies")

    def _copy_each(
        self, destinations: Addresses, sources: Addresses, sizes: Addresses
    ) -> None:
        pieces = (destinations.tolist(), sources.tolist(), sizes.tolist())
        for destination, source, size in zip(*pieces, strict=True):
            self.copy(destination, source, size)

    def launch(self, function: Function, launch: Launch) -> None:
        arguments = (tuple(launch.arguments), tuple(launch.types))
        grid, block = (launch.programs, 1, 1), (launch.warps * 32, 1, 1)
        shape = (*grid, *block, launch.shared_bytes)
        kernel = (cu.cuLaunchKernel, function, *shape, self._stream, arguments, 0)
        self._call("launching a kernel", *kernel)

    def close(self) -> None:
        self._call("closing a stream", cu.cuStreamDestroy, self._stream)


class Pins:
    """Starts of pinned pieces; a driver may refuse a copy across two of them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._starts: list[int] = []
        self._borders: Addresses = np.empty(0, np.int64)

    def add(self, address: int) -> None:
        """Add a piece."""
        with self._lock:
            insort(self._starts, address)
            self._borders = np.array(self._starts, np.int64)

    def remove(self, address: int) -> None:
        """Remove a piece."""
        with self._lock:
            self._starts.remove(address)
            self._borders = np.array(self._starts, np.int64)

    def split(
        self, destination: int, source: int, num_bytes: int
    ) -> list[tuple[int, int]]:
        """Return (offset, bytes) of a copy's sections, cut at both sides' borders."""
        starts = self._starts
        cuts = {0, num_bytes}
        for address in (destination, source):
            first = bisect_right(starts, address)
            end = bisect_left(starts, address + num_bytes)
            cuts.update(start - address for start in starts[first:end])
        places = sorted(cuts)
        return [(at, to - at) for at, to in pairwise(places)]

    def whole(
        self, destinations: Addresses, sources: Addresses, sizes: Addresses
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return for each copy whether it crosses no border, `[copies]`."""
        borders = self._borders
        crossed = np.zeros(len(sizes), np.bool_)
        for addresses in (destinations, sources):
            first = np.searchsorted(borders, addresses, "right")
            crossed |= first != np.searchsorted(borders, addresses + sizes, "left")
        return ~crossed


def _own(event: Event) -> Any:
    if not isinstance(event, CudaEvent):
        raise DeviceFailed(f"{event} is no event of the driver")
    return event.cu_event


MIN_DRIVER_VERSION = 12000
_NAME_BYTES = 256
_MAX_STATIC_SHARED_BYTES = 48 << 10
try:
    _uuid_of = cu.cuDeviceGetUuid_v2
except AttributeError:  # Newer bindings; in older ones this one ignores MIG.
    _uuid_of = cu.cuDeviceGetUuid


class _Thread(local):
    is_apart = False
    """Whether its calls are independent of stream captures in other threads."""


_thread = _Thread()


def open_devices() -> tuple[CudaDevice, ...]:
    """Return the GPUs that this process sees; contexts are made on first use.

    Raises:
        SetupError: there is no driver, it is too old, or it shows no GPU.
    """
    try:
        check(cu.cuInit(0), "the NVIDIA driver does not start")
        version = check(cu.cuDriverGetVersion(), "the driver's version")
        if version < MIN_DRIVER_VERSION:
            raise SetupError(
                f"the NVIDIA driver is for CUDA {_dotted(version)}; "
                f"{_dotted(MIN_DRIVER_VERSION)} is the least that will do"
            )
        count = check(cu.cuDeviceGetCount(), "counting GPUs")
        pins = Pins()
        batch = BatchCopy.find(version)
        devices = tuple(CudaDevice(number, pins, batch) for number in range(count))
    except RuntimeError as error:  # The bindings' own, when they find no library.
        raise SetupError(f"no NVIDIA driver: {error}") from None
    except DeviceFailed as error:
        raise SetupError(error.message) from None
    if not devices:
        raise SetupError("the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES?)")
    return devices


class CudaDevice:
    """A `Device` of the driver."""

    def __init__(self, ordinal: int, pins: Pins, batch: BatchCopy | None) -> None:
        self.ordinal = ordinal
        self._device = check(cu.cuDeviceGet(ordinal), f"GPU {ordinal}")
        uuid = check(_uuid_of(self._device), "its UUID")
        name = check(cu.cuDeviceGetName(_NAME_BYTES, self._device), "its name")
        self.uuid = f"GPU-{UUID(bytes=bytes(uuid.bytes))}"
        self.name = name.split(b"\0", 1)[0].decode(errors="replace")
        kind = cu.CUdevice_attribute
        major = self._attribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.compute_capability = major * 10 + minor
        self._pins = pins
        self._batch = batch
        self._lock = Lock()
        self._context: Any = None

    def enter(self) -> None:
        """Make this device's context current in the calling thread."""
        if not _thread.is_apart:
            apart = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            check(
                cu.cuThreadExchangeStreamCaptureMode(apart),
                "separating from stream captures",
            )
            _thread.is_apart = True
        if self._context is None:
            self._retain()
        check(cu.cuCtxSetCurrent(self._context), f"entering {self.uuid}")

    def call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Enter this device and return what a driver call gives; see `check`.

        Raises:
            DeviceFailed: the call failed; `what` names it.
        """
        self.enter()
        return check(function(*arguments), what)

    def load(self, cubin: bytes, name: str, shared_bytes: int = 0) -> Function:
        """Load a kernel; see `Device`."""
        module = self.call(f"loading kernel {name}", cu.cuModuleLoadData, cubin)
        found = cu.cuModuleGetFunction(module, name.encode())
        function = check(found, f"finding kernel {name}")
        if shared_bytes > _MAX_STATIC_SHARED_BYTES:
            dynamic = cu.CUfunction_attribute
            check(
                cu.cuFuncSetAttribute(
                    function,
                    dynamic.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes,
                ),
                f"giving kernel {name} {shared_bytes:,} shared bytes",
            )
        return Function(int(function))

    def stream(self, *, urgent: bool = False) -> CudaStream:
        """Return a new stream; see `Device`."""
        least, greatest = self.call("priorities", cu.cuCtxGetStreamPriorityRange)
        flags = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        made = cu.cuStreamCreateWithPriority(flags, greatest if urgent else least)
        handle = check(made, "making a stream")
        return CudaStream(self, handle, self._pins, self._batch)

    def event(self, *, shared: bool = False) -> CudaEvent:
        """Return a new event; see `Device`."""
        kind = cu.CUevent_flags
        flags = kind.CU_EVENT_DISABLE_TIMING | kind.CU_EVENT_BLOCKING_SYNC
        if shared:
            flags |= kind.CU_EVENT_INTERPROCESS
        return CudaEvent(self, self.call("making an event", cu.cuEventCreate, flags))

    def open_event(self, handle: bytes) -> CudaEvent:
        """Open another process's event; see `Device`. May wait for the GPU."""
        self.enter()
        opened = cu.cuIpcOpenEventHandle(named(cu.CUipcEventHandle(), handle))
        return CudaEvent(self, check_opened(opened, "an event"))

    def allocate(self, num_bytes: int) -> int:
        """Allocate device memory; see `Device`."""
        what = f"{num_bytes:,} bytes of {self.name}"
        return int(self.call(what, cu.cuMemAlloc, num_bytes))

    def free(self, address: int) -> None:
        """Free device memory."""
        self.call("freeing device memory", cu.cuMemFree, address)

    def allocate_host(self, num_bytes: int) -> int:
        """Allocate page-locked host memory."""
        what, portable = (
            f"{num_bytes:,} bytes of page-locked memory",
            cu.CU_MEMHOSTALLOC_PORTABLE,
        )
        return int(self.call(what, cu.cuMemHostAlloc, num_bytes, portable))

    def free_host(self, address: int) -> None:
        """Free page-locked host memory."""
        self.call("freeing page-locked memory", cu.cuMemFreeHost, address)

    def pin(self, address: int, num_bytes: int) -> None:
        """Page-lock host memory; see `Device`."""
        pin = (cu.cuMemHostRegister, address, num_bytes, cu.CU_MEMHOSTREGISTER_PORTABLE)
        self.call(f"page-locking {num_bytes:,} bytes", *pin)
        self._pins.add(address)

    def unpin(self, address: int) -> None:
        """Undo a `pin`."""
        self.call("undoing a page-lock", cu.cuMemHostUnregister, address)
        self._pins.remove(address)

    def export(self, address: int) -> ExportedAllocation:
        """Return an allocation's IPC handle; see `Device`.

        The calling thread, which is an engine's, keeps its current GPU.
        """
        before = check(cu.cuCtxGetCurrent(), "the current context")
        try:
            return self._export(address)
        finally:
            check(cu.cuCtxSetCurrent(before), "back to the current context")

    def _export(self, address: int) -> ExportedAllocation:
        self.enter()
        kind = cu.CUpointer_attribute
        status, memory = cu.cuPointerGetAttribute(
            kind.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address
        )
        device = int(cu.CUmemorytype.CU_MEMORYTYPE_DEVICE)
        if status != RESULT.CUDA_SUCCESS or int(memory) != device:
            raise HandleError(f"{address:#x} is not in a GPU's memory")
        ordinal = self._pointer(kind.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
        if ordinal != self.ordinal:
            raise HandleError(f"{address:#x} lies on GPU {ordinal}, not {self.ordinal}")
        if not self._pointer(
            kind.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, address
        ):
            asked = kind.CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE
            status, pool = cu.cuPointerGetAttribute(asked, address)
            from_pool = status == RESULT.CUDA_SUCCESS and bool(int(pool))
            raise _not_capable(from_pool=from_pool)
        found = cu.cuMemGetAddressRange(address)
        base, size = check(found, "finding an allocation")
        handle = check(cu.cuIpcGetMemHandle(base), "naming an allocation")
        return ExportedAllocation(handle_of(handle), address - int(base), int(size))

    def open(self, handle: bytes) -> OpenedAllocation:
        """Map another process's allocation; see `Device`."""
        self.enter()
        lazily = cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        there = named(cu.CUipcMemHandle(), handle)
        address = check_opened(cu.cuIpcOpenMemHandle(there, lazily), "memory")
        try:
            found = cu.cuMemGetAddressRange(address)
            base, size = check(found, "measuring an opened allocation")
        except BaseException:
            self.close_handle(int(address))
            raise
        return OpenedAllocation(int(address), int(base) + int(size) - int(address))

    def close_handle(self, address: int) -> None:
        """Unmap what `open` mapped."""
        self.call("closing an opened allocation", cu.cuIpcCloseMemHandle, address)

    def _retain(self) -> None:
        with self._lock:
            if self._context is None:
                retained = cu.cuDevicePrimaryCtxRetain(self._device)
                if retained[0] == RESULT.CUDA_ERROR_DEVICE_UNAVAILABLE:
                    raise SetupError(
                        f"{self.name} is another process's alone (compute mode "
                        "exclusive): start NVIDIA's MPS, or let workers copy"
                    )
                self._context = check(retained, f"a context on {self.name}")

    def _attribute(self, kind: Any) -> int:
        value = check(cu.cuDeviceGetAttribute(kind, self._device), str(kind))
        return int(value)

    def _pointer(self, kind: Any, address: int) -> Any:
        return check(cu.cuPointerGetAttribute(kind, address), str(kind))

    def __repr__(self) -> str:
        return f"<CudaDevice {self.ordinal} {self.name} {self.uuid}>"


def _not_capable(*, from_pool: bool) -> KVError:
    if from_pool:
        return HandleError(
            "memory of a stream-ordered pool has no IPC handle: set "
            "PYTORCH_CUDA_ALLOC_CONF=backend:native, or copy in the worker"
        )
    return HandleError(
        "this memory has no IPC handle: it comes from expandable segments (set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False) or from sleep mode (start "
        "the engine without it); or copy in the worker"
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
