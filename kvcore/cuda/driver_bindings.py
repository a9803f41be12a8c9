"""NVIDIA's bindings, and its errors as ours: the one file that meets them first."""

from __future__ import annotations

import ctypes
from typing import Any

from kvcore.cuda.device import HANDLE_BYTES
from kvcore.errors import DeviceFailed, HandleError, SetupError

try:
    from cuda.bindings import driver as cu
except ImportError as error:
    raise SetupError(
        f"the package cuda-bindings cannot be imported ({error}): "
        "pip install 'kvctl[gpu]'"
    ) from None

__all__ = ["RESULT", "check", "check_opened", "cu", "explain", "handle_of", "named"]

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
"""How the driver answers a handle that it cannot open, where nothing is broken."""


def check(result: tuple[Any, ...], what: str) -> Any:
    """Return the one value that a driver call gave, a tuple of several, or None.

    Raises:
        DeviceFailed: what the driver answered instead.
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
        HandleError: it names nothing that this process can open.
        DeviceFailed: anything else.
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

    By its address: bindings since 13.5 no longer have a field for them.
    """
    return ctypes.string_at(int(made.getPtr()), HANDLE_BYTES)


def named(empty: Any, handle: bytes) -> Any:
    """Write a handle's bytes into an empty one of these, and return it.

    Raises:
        HandleError: not that many bytes.
    """
    if len(handle) != HANDLE_BYTES:
        raise HandleError(f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}")
    ctypes.memmove(int(empty.getPtr()), handle, HANDLE_BYTES)
    return empty


def explain(status: Any) -> str:
    """Name a status and say what it means."""
    _, name = cu.cuGetErrorName(status)
    _, text = cu.cuGetErrorString(status)
    known = (name or b"CUDA_ERROR").decode()
    return f"{known} ({(text or b'unknown').decode()})"
