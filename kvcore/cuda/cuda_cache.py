"""Paged caches in a GPU's memory, their copy streams, and the state that they share.

In a staged gather a kernel packs one slot of a buffer while the copy engine copies the
other across the link; in a staged scatter the copy comes first. Kernels run on one
stream per direction, shared by all caches of the device, so that each direction takes
the SMs of one launch at most. A launch is queued there only when it can run at once: a
cache waits on the host, never in that stream, so no cache delays another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock

import numpy as np

from kvcore.blend.key_rotation import RAW_DTYPES, BlockRotation, rotation_factors
from kvcore.copy.block_arrays import ChunkSpans
from kvcore.cuda.calibration import CopyMethod, choose_method, measure
from kvcore.cuda.copy_plan import I64, ByteRanges, CopyPieces, CopyPlan, PartRows
from kvcore.cuda.device_interface import Device
from kvcore.cuda.kernel_launches import Kernels, KeyRotation, RowCopy
from kvcore.cuda.staging import (
    NUM_SLOTS,
    KernelTable,
    StagingBuffer,
    StagingPool,
    StagingSizes,
    rounded,
)
from kvcore.errors import DeviceFailed, LayoutError
from kvcore.extents import Checksum, buffers_of, checksum_of
from kvcore.layout import KVLayout
from kvcore.rope import Rope
from kvcore.shm import Bytes
from kvcore.status import DeviceRates, DeviceStatus

FIRST_BYTES = 4 << 20
"""Bytes of the load that is packed, or unpacked, while the link is idle."""
GROWTH = 3
"""Factor from one load's bytes to the next, until slots are full: kernels are faster
than the link."""
FEW = 4
"""Number of copies up to which single calls are faster than a batch."""
RANGE_BYTES, BLOCK_BYTES, FACTOR_BYTES = 16, 4, 16
"""Of a span's range, a block id and a pair's cosine and sine in a kernel's table."""


@dataclass(frozen=True, slots=True)
class LaunchLoad:
    """What one slot holds at once: [begin, end) of the line, and its arena ranges."""

    begin: int
    end: int
    extents: ByteRanges


class CopyStream:
    """Copies of one direction of one cache; one call at a time.

    No work of a call is left on the device when it returns or raises `DeviceFailed`,
    unless the device has failed for good.
    """

    def __init__(self, shared: CudaCaches, *, to_host: bool) -> None:
        self._to_host = to_host
        self._kernels = shared.kernels
        self._launches = shared.gathers if to_host else shared.scatters
        self._copies = shared.device.stream()
        self._packed = [shared.device.event() for _ in range(NUM_SLOTS)]
        self._copied = [shared.device.event() for _ in range(NUM_SLOTS)]

    def close(self) -> None:
        """Destroy stream and events. No call is running."""
        self._copies.close()
        for event in (*self._packed, *self._copied):
            event.close()

    def copy_staged(self, plan: CopyPlan, buffer: StagingBuffer) -> None:
        """Copy by way of a buffer; its table MUST have room for the plan's tables."""
        with self._all_done():
            table = buffer.write((plan.planes, plan.ranges, plan.spans.blocks))
            self._kernels.launch(self._launches, table)
            (self._gather if self._to_host else self._scatter)(plan, table, buffer)

    def _gather(
        self, plan: CopyPlan, table: KernelTable, buffer: StagingBuffer
    ) -> None:
        """Pack one slot from the cache while the other is copied to the arena."""
        slot = 0
        for number, load in enumerate(loads(plan, buffer.sizes.slot_bytes)):
            slot = number % NUM_SLOTS
            if number >= NUM_SLOTS:
                self._copied[slot].wait()
            self._copy_rows(plan.rows, load, table, buffer, slot)
            self._copies.wait_for(self._packed[slot])
            self._cross(load, buffer, slot)
        self._copied[slot].wait()

    def _scatter(
        self, plan: CopyPlan, table: KernelTable, buffer: StagingBuffer
    ) -> None:
        """Copy one slot from the arena while the other is unpacked into the cache."""
        todo = loads(plan, buffer.sizes.slot_bytes, backwards=True)
        for slot, load in enumerate(todo[:NUM_SLOTS]):
            self._cross(load, buffer, slot)
        slot = 0
        for number, load in enumerate(todo):
            slot = number % NUM_SLOTS
            self._copied[slot].wait()
            self._copy_rows(plan.rows, load, table, buffer, slot)
            if number + NUM_SLOTS < len(todo):
                self._copies.wait_for(self._packed[slot])
                self._cross(todo[number + NUM_SLOTS], buffer, slot)
        self._packed[slot].wait()

    def _copy_rows(
        self,
        rows: PartRows,
        load: LaunchLoad,
        table: KernelTable,
        buffer: StagingBuffer,
        slot: int,
    ) -> None:
        """Queue a load's kernel; the slot's `_packed` is reached after it."""
        begin = (buffer.slots[slot], load.begin)
        task = RowCopy(rows, table.places, *begin, load.end, self._to_host)
        self._kernels.launch(self._launches, task)
        self._launches.record(self._packed[slot])

    def _cross(self, load: LaunchLoad, buffer: StagingBuffer, slot: int) -> None:
        """Queue a load's copy across the link; `_copied` is reached after it."""
        arena = load.extents
        staged = arena.starts + (buffer.slots[slot] - load.begin)
        ends = (arena.at, staged) if self._to_host else (staged, arena.at)
        self._copies.copy_many(*ends, arena.sizes, batched=len(arena) > FEW)
        self._copies.record(self._copied[slot])

    def copy_pieces(self, pieces: CopyPieces, *, batched: bool) -> None:
        """Copy without staging; the pieces are `here` in the cache."""
        ends = pieces.here, pieces.there
        destinations, sources = reversed(ends) if self._to_host else ends
        with self._all_done():
            self._copies.copy_many(destinations, sources, pieces.sizes, batched=batched)
            self._copies.record(self._copied[0])
            self._copied[0].wait()

    def rotate_keys(
        self,
        layout: KVLayout,
        rope: Rope,
        planes: I64,
        rotations: Sequence[BlockRotation],
        buffer: StagingBuffer,
    ) -> None:
        """Rotate keys in place; `planes` are the addresses of K's planes.

        The planes and the factors of all rotations MUST fit the buffer's table.
        """
        factors = [rotation_factors(rope, rotation.distance) for rotation in rotations]
        with self._all_done():
            table = buffer.write((planes, np.array(factors, np.complex128)))
            self._kernels.launch(self._launches, table)
            at_planes, at_factors = table.places
            for number, rotation in enumerate(rotations):
                at = at_factors + number * factors[0].nbytes
                task = KeyRotation(layout, rope, rotation, at_planes, at)
                self._kernels.launch(self._launches, task)
            self._launches.record(self._packed[0])
            self._packed[0].wait()

    @contextmanager
    def _all_done(self) -> Iterator[None]:
        """Wait for queued work to end when a call fails."""
        try:
            yield
        except BaseException:
            with suppress(DeviceFailed):
                self._launches.record(self._packed[0])
                self._copies.record(self._copied[0])
                self._packed[0].wait()
                self._copied[0].wait()
            raise


def loads(
    plan: CopyPlan, slot_bytes: int, *, backwards: bool = False
) -> list[LaunchLoad]:
    """Return a plan's loads, each of which fits a slot, without the empty ones.

    `backwards` makes the last ones small instead of the first ones.
    """
    rows, total = plan.rows, plan.line_bytes
    step = rows.plane_bytes if rows.plane_bytes <= slot_bytes else rows.word
    places = cuts(total, step, slot_bytes)
    if backwards:
        places = [total - place for place in reversed(places)]
    made = [
        LaunchLoad(begin, end, plan.extents.cut(begin, end))
        for begin, end in pairwise(places)
    ]
    return [load for load in made if len(load.extents)]


def cuts(total: int, step: int, slot_bytes: int) -> list[int]:
    """Return places from 0 to `total`, multiples of `step`, first close together."""
    places = [0]
    size = FIRST_BYTES
    while places[-1] < total:
        fit = min(size, slot_bytes) // step * step
        places.append(min(places[-1] + max(fit, step), total))
        size *= GROWTH
    return places


DEFAULT_SIZES = StagingSizes()


class CudaCaches:
    """State that the caches of one device share: staging, kernel streams, copy rates.

    Without `rates` the constructor measures them, which takes up to 2 s.
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
        """Free device memory and streams, after all caches are closed."""
        self.staging.close()
        self.gathers.close()
        self.scatters.close()

    def forget_cache(self) -> None:
        """Count a closed cache."""
        with self._lock:
            self._num_caches -= 1

    def count_copy(self, method: CopyMethod, direction: str) -> None:
        """Count a call by method and direction."""
        with self._lock:
            self._num_copies[f"{method}_{direction}"] += 1

    def status(self) -> DeviceStatus:
        """Describe the device and its caches. Any thread."""
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

    `gather` and `scatter` return when all bytes are copied. The arena MUST be
    page-locked, and the caller MUST have waited for the worker's event. After
    `DeviceFailed`, no work of the call is left on the device.
    """

    def __init__(
        self, shared: CudaCaches, layout: KVLayout, addresses: Sequence[int]
    ) -> None:
        self.layout = layout
        handles = np.array([addresses[n] for n in layout.plane_handles], np.int64)
        self._planes = layout.plane_offsets + handles
        self._rows = PartRows.of(layout, self._planes)
        self._shared = shared
        self._gathers = CopyStream(shared, to_host=True)
        self._scatters = CopyStream(shared, to_host=False)

    def close(self) -> None:
        """Destroy the streams. No call is running."""
        self._gathers.close()
        self._scatters.close()
        self._shared.forget_cache()

    def gather(
        self, spans: ChunkSpans, arena: Bytes, *, checksums: bool = False
    ) -> list[Checksum]:
        """Copy blocks into parts; see `PagedCache`."""
        spans.check(self.layout, nulls=False)
        self._copy(spans, arena, to_host=True)
        parts = spans.extents if checksums else ()
        return [checksum_of(buffers_of(arena.data, part)) for part in parts]

    def scatter(self, spans: ChunkSpans, arena: Bytes) -> None:
        """Copy parts into blocks; see `PagedCache`."""
        spans.check(self.layout, nulls=True)
        self._copy(spans, arena, to_host=False)

    def rotate_keys(self, rope: Rope, rotations: Sequence[BlockRotation]) -> None:
        """Rotate keys in place; see `kvcore.blend.key_rotation.KeyRotator`.

        Raises:
            LayoutError: keys that do not lie at multiples of an element's size.
        """
        layout, staging = self.layout, self._shared.staging
        planes = self._planes[: layout.part.num_layers]  # K's come first.
        item = RAW_DTYPES[layout.part.dtype].itemsize
        places = (layout.block_stride, layout.slot_stride, *planes.tolist())
        if any(place % item for place in places):
            raise LayoutError(f"rope: keys do not lie at multiples of {item} bytes")
        room = staging.sizes.table_bytes - rounded(planes.nbytes)
        at_once = max(room // (rope.rotary_dim // 2 * FACTOR_BYTES), 1)
        moving = [rotation for rotation in rotations if rotation.distance]
        for first in range(0, len(moving), at_once):
            some = moving[first : first + at_once]
            with staging.buffer() as buffer:
                self._scatters.rotate_keys(layout, rope, planes, some, buffer)

    def _copy(self, spans: ChunkSpans, arena: Bytes, *, to_host: bool) -> None:
        """Copy checked spans by the fastest method."""
        address = arena.ctypes.data
        plan = CopyPlan.of(self.layout, self._rows, self._planes, spans, address)
        if not plan.num_bytes:
            return
        one_way = (
            self._shared.rates.to_host if to_host else self._shared.rates.to_device
        )
        method = choose_method(
            one_way,
            plan.num_bytes,
            plan.num_pieces,
            row_bytes=self._rows.row_bytes,
            word=self._rows.word,
            can_stage=self._max_spans > 0 and bool(one_way.kernels),
        )
        self._shared.count_copy(method, "to_host" if to_host else "to_device")
        stream = self._gathers if to_host else self._scatters
        if method is not CopyMethod.STAGED:
            batched = method is CopyMethod.BATCHED
            stream.copy_pieces(plan.pieces, batched=batched)
            return
        for some in plan.split(self._max_spans):
            if some.num_bytes:
                with self._shared.staging.buffer() as buffer:
                    stream.copy_staged(some, buffer)

    @property
    def _max_spans(self) -> int:
        """Number of spans whose ranges and blocks fit a buffer's table."""
        table_bytes = self._shared.staging.sizes.table_bytes
        room = table_bytes - rounded(self._planes.nbytes) - rounded(1)
        return room // (RANGE_BYTES + BLOCK_BYTES * self._rows.num_blocks)
