"""`cuMemcpyBatchAsync` over arrays: many copies for the price of one call.

The bindings take Python lists, half a microsecond and more an entry; here the arrays
go by address. The function came with CUDA 12.8 and lost an argument with 13.0; the
driver hands out whichever version it is asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from kvcore.cuda.device import Addresses

VERSIONS = (13000, 12080)
"""In which the function's signature changed, newest first."""
_ORDER_STREAM = 1
_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_size_t
_PROTOTYPES = {
    13000: ctypes.CFUNCTYPE(
        ctypes.c_int,
        *(_POINTER, _POINTER, _POINTER, _SIZE),
        *(_POINTER, _POINTER, _SIZE, _POINTER),
    ),
    12080: ctypes.CFUNCTYPE(
        ctypes.c_int,
        *(_POINTER, _POINTER, _POINTER, _SIZE),
        *(_POINTER, _POINTER, _SIZE, _POINTER, _POINTER),
    ),
}


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes: sources are read in stream order, nothing else is said."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_location", ctypes.c_int * 2),
        ("destination_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class BatchCopy:
    """The driver's function. Any thread; ctypes lets go of the interpreter."""

    def __init__(self, address: int, version: int) -> None:
        self._function: Callable[..., int] = _PROTOTYPES[version](address)
        self._attributes = _Attributes(source_order=_ORDER_STREAM)
        self._first = ctypes.c_size_t(0)
        # The index of the copy that failed, which tells us nothing.
        self._extra = (None,) if version < 13000 else ()

    @classmethod
    def find(cls, cu: Any, driver_version: int) -> BatchCopy | None:
        """Ask a driver for the function; None when it is older than that."""
        for version in VERSIONS:
            if driver_version < version:
                continue
            status, address, _ = cu.cuGetProcAddress(b"cuMemcpyBatchAsync", version, 0)
            if status == cu.CUresult.CUDA_SUCCESS and address:
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
