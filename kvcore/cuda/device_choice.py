"""The `device` option of a server: whether it copies to and from GPUs."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping

from kvcore.copy.transport import Transport
from kvcore.errors import DeviceFailed, SetupError
from kvcore.protocol import CudaIpc, MemoryHandle
from kvcore.shm import Bytes

log = logging.getLogger(__name__)

_DRIVER = "libcuda.so.1"


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
        # Imported here: it is slow, and most servers have no GPU.
        from kvcore.cuda.driver import open_devices

        devices = open_devices()
    except SetupError as error:
        if device == "cuda":
            raise SetupError(f"device = cuda: {error.message}") from None
        log.warning("device = auto: caches in host memory only: %s", error.message)
        return {}
    from kvcore.cuda.ipc import CudaTransport

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
