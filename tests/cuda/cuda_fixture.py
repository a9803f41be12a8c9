"""Caches on a fake device, and rates that make one copy method the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from kvcore.cuda.calibration import CopyMethod
from kvcore.cuda.cuda_cache import CudaCache, CudaCaches
from kvcore.cuda.kernel_launches import Kernels
from kvcore.cuda.staging import StagingSizes
from kvcore.layout import KVLayout
from kvcore.status import CopyRates, DeviceRates, PieceRate
from tests.cuda.fake_gpu import FakeDevice, FakeTimeline, array_at
from tests.cuda.numpy_kernels import PlainKernels

SMALL = StagingSizes(slot_bytes=96, table_bytes=4096, max_buffers=2)
"""Slots of a few pieces each, so that every copy needs many loads."""
_NEVER_S = 1e6


def published() -> DeviceRates:
    """Return expected, not measured, rates of an H100 on PCIe 5 x16.

    Source: vLLM's notes on KV offloading, 2026-01, for link and batches.
    """
    batched = ((4096, 4e9), (16384, 7e9), (65536, 45e9), (1 << 20, 54e9))
    kernels = ((1024, 100e9), (4096, 140e9), (32768, 140e9))
    one_way = CopyRates(
        link_bytes_s=54e9,
        start_s=20e-6,
        call_s=2e-6,
        staged_start_s=60e-6,
        batched=tuple(PieceRate(*rate) for rate in batched),
        kernels=tuple(PieceRate(*rate) for rate in kernels),
    )
    return DeviceRates(to_host=one_way, to_device=one_way, measured_s=0.0)


def favouring(method: CopyMethod) -> DeviceRates:
    """Return rates that make one method the fastest."""
    rates = published().to_host
    if method is not CopyMethod.STAGED:
        rates = replace(rates, staged_start_s=_NEVER_S)
    if method is not CopyMethod.SINGLE:
        rates = replace(rates, call_s=_NEVER_S)
    if method is CopyMethod.STAGED:
        rates = replace(rates, start_s=_NEVER_S)
    return DeviceRates(rates, rates, 0.0)


@dataclass(frozen=True, slots=True)
class CudaFixture:
    """A fake device and the shared state of its caches."""

    device: FakeDevice
    caches: CudaCaches

    def cache(self, layout: KVLayout, handles: Sequence[np.ndarray]) -> Placed:
        """Return a cache on the device, with the handles' bytes."""
        addresses = []
        for handle in handles:
            addresses.append(self.device.allocate(max(handle.size, 1)))
            array_at(addresses[-1], handle.size)[:] = handle
        return Placed(self.caches.cache(layout, addresses), addresses, handles)

    @contextmanager
    def pinned(self, arena: np.ndarray) -> Iterator[np.ndarray]:
        """Page-lock an arena within the context."""
        self.device.pin(arena.ctypes.data, arena.size)
        yield arena
        self.device.unpin(arena.ctypes.data)

    @property
    def is_idle(self) -> bool:
        """Whether no stream has queued work."""
        return not any(stream.queue for stream in self.device.timeline.streams)


@dataclass(frozen=True, slots=True)
class Placed:
    """A cache, its addresses and the bytes that were put there."""

    cache: CudaCache
    addresses: list[int]
    handles: Sequence[np.ndarray]

    def bytes(self) -> list[np.ndarray]:
        """Return the current bytes of its handles."""
        pairs = zip(self.addresses, self.handles, strict=True)
        return [array_at(address, handle.size).copy() for address, handle in pairs]


def cuda_fixture(
    seed: int,
    method: CopyMethod = CopyMethod.STAGED,
    sizes: StagingSizes = SMALL,
    kernels: Kernels | None = None,
) -> CudaFixture:
    """Return a device that runs its work in an order that `seed` decides."""
    device = FakeDevice(FakeTimeline(seed))
    made = CudaCaches(
        device, kernels or PlainKernels(), rates=favouring(method), sizes=sizes
    )
    return CudaFixture(device, made)
