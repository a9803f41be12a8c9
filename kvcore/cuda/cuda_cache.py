"""Caches in a GPU's memory, and what those of one device share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from threading import Lock

import numpy as np

from kvcore.blend.key_rotation import BlockRotation
from kvcore.copy.paged_cache import BlockIds, ChunkSpan, checked_blocks
from kvcore.cuda.calibration import measure
from kvcore.cuda.copy_methods import CopyMethod, choose_method
from kvcore.cuda.copy_plan import CopyPlan, PartRows
from kvcore.cuda.copy_streams import GatherStream, ScatterStream
from kvcore.cuda.device import Device
from kvcore.cuda.device_key_rotation import DeviceKeys
from kvcore.cuda.kernel_launch import Kernels
from kvcore.cuda.staging import StagingPool, StagingSizes, rounded
from kvcore.extents import Checksum, buffers_of, checksum_of
from kvcore.layout import KVLayout
from kvcore.rope import Rope
from kvcore.shm import Bytes
from kvcore.status import CopyRates, DeviceRates, DeviceStatus

DEFAULT_SIZES = StagingSizes()


class CudaCaches:
    """What the caches of one device share: staging, the kernels' streams, its rates.

    Making it takes up to 2 s where `rates` are to be measured.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        *,
        rates: DeviceRates | None = None,
        sizes: StagingSizes = DEFAULT_SIZES,
    ) -> None:
        self.device = device
        self.kernels = kernels
        self.staging = StagingPool(device, sizes)
        self.rates = rates or measure(device, kernels, self.staging)
        self.gathers = device.stream(urgent=True)
        self.scatters = device.stream(urgent=True)
        self._num_caches = 0
        self._num_copies: Counter[str] = Counter()
        self._lock = Lock()

    def cache(self, layout: KVLayout, addresses: Sequence[int]) -> CudaCache:
        """Make a cache; `addresses` are those of its handles' first bytes."""
        cache = CudaCache(self, layout, addresses)
        with self._lock:
            self._num_caches += 1
        return cache

    def close(self) -> None:
        """Give device memory and streams back. All caches are closed."""
        self.staging.close()
        self.gathers.close()
        self.scatters.close()

    def closed_one(self) -> None:
        """Count a cache that was closed."""
        with self._lock:
            self._num_caches -= 1

    def copied(self, way: CopyMethod, direction: str) -> None:
        """Count a call."""
        with self._lock:
            self._num_copies[f"{way}_{direction}"] += 1

    def status(self) -> DeviceStatus:
        """Return what is shown of the device."""
        with self._lock:
            return DeviceStatus(
                uuid=self.device.uuid,
                name=self.device.name,
                num_caches=self._num_caches,
                staging_bytes=self.staging.num_bytes,
                copies=dict(self._num_copies),
                rates=self.rates,
            )


class CudaCache:
    """A `PagedCache` in a device's memory.

    `gather` and `scatter` return when the bytes are there. The arena MUST be
    page-locked, and what the worker wrote to its cache MUST have been written: whoever
    calls has waited for the worker's event. `DeviceFailed` says that the device could
    not do it; nothing of the call is left on it then.
    """

    def __init__(
        self, shared: CudaCaches, layout: KVLayout, addresses: Sequence[int]
    ) -> None:
        self.layout = layout
        handles = np.array([addresses[n] for n in layout.plane_handles], np.int64)
        self._planes = layout.plane_offsets + handles
        self._rows = PartRows.of(layout, self._planes)
        self._shared = shared
        self._gathers = GatherStream(shared.device, shared.kernels, shared.gathers)
        self._scatters = ScatterStream(shared.device, shared.kernels, shared.scatters)

    def close(self) -> None:
        """Let go of the lanes. No call is under way."""
        self._gathers.close()
        self._scatters.close()
        self._shared.closed_one()

    def gather(
        self, spans: Sequence[ChunkSpan], arena: Bytes, *, checksums: bool = False
    ) -> list[Checksum]:
        """Copy blocks into parts; see `PagedCache`."""
        blocks = checked_blocks(self.layout, spans, nulls=False)
        plan = self._plan(spans, blocks, arena)
        self._move(plan, self._gathers, self._shared.rates.to_host)
        parts = spans if checksums else ()
        return [checksum_of(buffers_of(arena.data, part.extents)) for part in parts]

    def scatter(self, spans: Sequence[ChunkSpan], arena: Bytes) -> None:
        """Copy parts into blocks; see `PagedCache`."""
        blocks = checked_blocks(self.layout, spans, nulls=True)
        plan = self._plan(spans, blocks, arena)
        self._move(plan, self._scatters, self._shared.rates.to_device)

    def rotate_keys(self, rope: Rope, rotations: Sequence[BlockRotation]) -> None:
        """Rotate keys in place; see `kvcore.blend.key_rotation.KeyRotator`.

        Raises:
            LayoutError: keys that do not lie at multiples of an element's size.
        """
        keys = DeviceKeys.of(self.layout, self._planes, rope)
        moving = [rotation for rotation in rotations if rotation.distance]
        at_once = keys.max_turns(self._shared.staging.sizes.table_bytes)
        for first in range(0, len(moving), at_once):
            with self._shared.staging.buffer() as buffer:
                self._scatters.turn(keys, moving[first : first + at_once], buffer)

    def _plan(
        self, spans: Sequence[ChunkSpan], blocks: BlockIds, arena: Bytes
    ) -> CopyPlan:
        at = arena.ctypes.data
        return CopyPlan.of(self.layout, self._rows, self._planes, spans, blocks, at)

    def _move(
        self, plan: CopyPlan, lane: GatherStream | ScatterStream, rates: CopyRates
    ) -> None:
        num_bytes = plan.num_bytes
        if not num_bytes:
            return
        max_spans = self._max_spans
        way = choose_method(
            rates,
            num_bytes,
            plan.num_pieces,
            row_bytes=self._rows.row_bytes,
            word=self._rows.word,
            can_stage=max_spans > 0 and bool(rates.kernels),
        )
        self._shared.copied(way, lane.direction)
        if way is not CopyMethod.STAGED:
            lane.direct(plan, way)
            return
        for some in plan.split(max_spans):
            if not some.num_bytes:
                continue
            with self._shared.staging.buffer() as buffer:
                lane.staged(some, buffer)

    @property
    def _max_spans(self) -> int:
        """Spans that a buffer's table has room for."""
        table_bytes = self._shared.staging.sizes.table_bytes
        room = table_bytes - rounded(self._planes.nbytes) - rounded(1)
        return room // (
            CopyPlan.RANGE_BYTES + CopyPlan.BLOCK_BYTES * self._rows.num_blocks
        )
