"""Caches in GPU memory: opened by CUDA IPC, copied on separate streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcore.copy.memory_transports import Transport
    from kvcore.extensions import Extensions
    from kvcore.protocol import MemoryHandle
    from kvcore.shm import Bytes


def register(extensions: Extensions) -> None:
    """Register the transport of CUDA IPC handles."""
    extensions.transports.append(_open)


def _open(device: str, arena: Bytes) -> Mapping[type[MemoryHandle], Transport]:
    from kvcore.cuda.ipc import open_cuda_transports

    return open_cuda_transports(device, arena)
