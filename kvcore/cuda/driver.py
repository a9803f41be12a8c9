"""The real device, over NVIDIA's `cuda.bindings.driver`.

Each GPU's primary context is retained for as long as the process lives; torch uses the
same one. Every call that needs a context makes it the thread's current one first, and
takes the thread out of what others capture: an engine that captures a graph meanwhile
would find its capture broken by our calls, and our calls would fail. The bindings
release the interpreter's lock in every call.
"""

from __future__ import annotations

from threading import Lock, local
from typing import Any
from uuid import UUID

from kvcore.cuda.device import ExportedAllocation, Function, OpenedAllocation
from kvcore.cuda.driver_bindings import (
    RESULT,
    check,
    check_opened,
    cu,
    handle_of,
    named,
)
from kvcore.cuda.memcpy_batch import BatchCopy
from kvcore.cuda.streams import CudaEvent, CudaStream, Pins
from kvcore.errors import DeviceFailed, HandleError, KVError, SetupError

MIN_DRIVER_VERSION = 12000
_NAME_BYTES = 256
_MAX_STATIC_SHARED_BYTES = 48 << 10
# The older bindings' first version knows nothing of MIG.
_uuid_of = getattr(cu, "cuDeviceGetUuid_v2", cu.cuDeviceGetUuid)


class _Thread(local):
    is_apart = False
    """Captures of other threads are nothing to its calls."""


_thread = _Thread()


def open_devices() -> tuple[CudaDevice, ...]:
    """Find the GPUs that this process may use; their contexts are made when needed.

    Raises:
        SetupError: there is no driver, none that will do, or no GPU.
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
        batch = BatchCopy.find(cu, version)
        devices = tuple(CudaDevice(number, pins, batch) for number in range(count))
    except RuntimeError as error:  # The bindings' own, when they find no library.
        raise SetupError(f"no NVIDIA driver: {error}") from None
    except DeviceFailed as error:
        raise SetupError(error.message) from None
    if not devices:
        raise SetupError("the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES?)")
    return devices


class CudaDevice:
    """A `Device` of the driver's."""

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
        """Make this device's context the calling thread's."""
        if not _thread.is_apart:
            apart = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            check(cu.cuThreadExchangeStreamCaptureMode(apart), "a thread of our own")
            _thread.is_apart = True
        if self._context is None:
            self._retain()
        check(cu.cuCtxSetCurrent(self._context), f"entering {self.uuid}")

    def load(self, cubin: bytes, name: str, shared_bytes: int = 0) -> Function:
        """Load a kernel; see `Device`."""
        self.enter()
        module = check(cu.cuModuleLoadData(cubin), f"loading kernel {name}")
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
        """Make a stream; see `Device`."""
        self.enter()
        flags = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        least, greatest = check(cu.cuCtxGetStreamPriorityRange(), "priorities")
        made = cu.cuStreamCreateWithPriority(flags, greatest if urgent else least)
        handle = check(made, "making a stream")
        return CudaStream(self.enter, handle, self._pins, self._batch)

    def event(self, *, shared: bool = False) -> CudaEvent:
        """Make an event; see `Device`."""
        self.enter()
        kind = cu.CUevent_flags
        flags = kind.CU_EVENT_DISABLE_TIMING | kind.CU_EVENT_BLOCKING_SYNC
        if shared:
            flags |= kind.CU_EVENT_INTERPROCESS
        handle = check(cu.cuEventCreate(flags), "making an event")
        return CudaEvent(self.enter, handle)

    def open_event(self, handle: bytes) -> CudaEvent:
        """Open another process's event; see `Device`. May wait for the GPU."""
        self.enter()
        opened = cu.cuIpcOpenEventHandle(named(cu.CUipcEventHandle(), handle))
        return CudaEvent(self.enter, check_opened(opened, "an event"))

    def allocate(self, num_bytes: int) -> int:
        """Take device memory; see `Device`."""
        self.enter()
        taken = cu.cuMemAlloc(num_bytes)
        address = check(taken, f"{num_bytes:,} bytes of {self.name}")
        return int(address)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self.enter()
        check(cu.cuMemFree(address), "freeing device memory")

    def allocate_host(self, num_bytes: int) -> int:
        """Take page-locked host memory."""
        self.enter()
        taken = cu.cuMemHostAlloc(num_bytes, cu.CU_MEMHOSTALLOC_PORTABLE)
        address = check(taken, f"{num_bytes:,} bytes of page-locked memory")
        return int(address)

    def free_host(self, address: int) -> None:
        """Give page-locked host memory back."""
        self.enter()
        check(cu.cuMemFreeHost(address), "freeing page-locked memory")

    def pin(self, address: int, num_bytes: int) -> None:
        """Page-lock host memory; see `Device`."""
        self.enter()
        check(
            cu.cuMemHostRegister(address, num_bytes, cu.CU_MEMHOSTREGISTER_PORTABLE),
            f"page-locking {num_bytes:,} bytes",
        )
        self._pins.add(address)

    def unpin(self, address: int) -> None:
        """Undo a `pin`."""
        self.enter()
        check(cu.cuMemHostUnregister(address), "undoing a page-lock")
        self._pins.remove(address)

    def export(self, address: int) -> ExportedAllocation:
        """Name an allocation for other processes; see `Device`.

        Called in an engine's own thread, whose current GPU stays as it was.
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
        self.enter()
        check(cu.cuIpcCloseMemHandle(address), "closing an opened allocation")

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
