"""Paged caches in a GPU's memory, their copy streams, and what those of a device share.

In a staged gather a kernel packs one slot of a buffer while the copy engine carries the
other across the link; in a staged scatter the copy comes first. Kernels run on one
stream per direction, shared by all caches of the device, so that copies never take more
SMs than one launch. A launch is queued there only when it can run at once: a cache
waits on the host, never in that stream, so no cache delays another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import ClassVar

import numpy as np

from kvcore.blend.key_rotation import BlockRotation
from kvcore.copy.block_arrays import ChunkSpans
from kvcore.cuda.calibration import CopyMethod, choose_method, measure
from kvcore.cuda.copy_plan import I64, ByteRanges, CopyPlan, PartRows
from kvcore.cuda.device_interface import Device, Stream
from kvcore.cuda.kernel_launches import DeviceKeys, Kernels, RowCopy
from kvcore.cuda.staging import (
    NUM_SLOTS,
    StagingBuffer,
    StagingPool,
    StagingSizes,
    rounded,
)
from kvcore.errors import DeviceFailed
from kvcore.extents import Checksum, buffers_of, checksum_of
from kvcore.layout import KVLayout
from kvcore.rope import Rope
from kvcore.shm import Bytes
from kvcore.status import CopyRates, DeviceRates, DeviceStatus

FIRST_BYTES = 4 << 20
"""What is packed while the link stands idle, or unpacked once it does again."""
GROWTH = 3
"""From one slot's bytes to the next, until slots are full: kernels are faster."""
FEW = 4
"""Number of copies up to which single calls are faster than a batch."""


@dataclass(frozen=True, slots=True)
class LaunchLoad:
    """What passes through a slot at once: [begin, end) of the line, and the arena's."""

    begin: int
    end: int
    extents: ByteRanges

    def staged(self, slot: int) -> I64:
        """Return where the arena's stretches lie in a slot, `[stretches]`."""
        return self.extents.starts + (slot - self.begin)


class CopyStream:
    """Copies of one direction of one cache; one call at a time.

    A call returns, or raises `DeviceFailed`, when none of its work is left on the
    device; only one that has failed for good may still have what it will never run.
    """

    direction: ClassVar[str]

    def __init__(self, device: Device, kernels: Kernels, launches: Stream) -> None:
        self._kernels = kernels
        self._launches = launches
        self._copies = device.stream()
        self._packed = [device.event() for _ in range(NUM_SLOTS)]
        self._copied = [device.event() for _ in range(NUM_SLOTS)]

    def close(self) -> None:
        """Destroy stream and events. No call is running."""
        self._copies.close()
        for event in (*self._packed, *self._copied):
            event.close()

    def _upload(self, plan: CopyPlan, buffer: StagingBuffer) -> _Table:
        table = buffer.write((plan.planes, plan.ranges, plan.spans.blocks))
        self._kernels.upload(self._launches, table)
        return _Table(plan.rows, *table.places)

    def _cross(self, destinations: I64, sources: I64, sizes: I64) -> None:
        """Copy stretches of a slot across the link."""
        way = CopyMethod.SINGLE if len(sizes) <= FEW else CopyMethod.BATCHED
        self._copy(destinations, sources, sizes, way)

    def _copy(
        self, destinations: I64, sources: I64, sizes: I64, way: CopyMethod
    ) -> None:
        if way is CopyMethod.BATCHED:
            self._copies.copy_many(destinations, sources, sizes)
            return
        each = (destinations.tolist(), sources.tolist(), sizes.tolist())
        for destination, source, size in zip(*each, strict=True):
            self._copies.copy(destination, source, size)

    def _directly(
        self, destinations: I64, sources: I64, sizes: I64, way: CopyMethod
    ) -> None:
        with self._all_done():
            self._copy(destinations, sources, sizes, way)
            self._copies.record(self._copied[0])
            self._copied[0].wait()

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


class GatherStream(CopyStream):
    """Copies from a cache to the arena."""

    direction = "to_host"

    def staged(self, plan: CopyPlan, buffer: StagingBuffer) -> None:
        """Pack one slot while the other is copied to the host."""
        with self._all_done():
            table = self._upload(plan, buffer)
            slot = 0
            for number, load in enumerate(loads(plan, buffer.sizes.slot_bytes)):
                slot = number % NUM_SLOTS
                if number >= NUM_SLOTS:
                    self._copied[slot].wait()
                staging = buffer.slots[slot]
                self._kernels.gather(self._launches, table.move(load, staging))
                self._launches.record(self._packed[slot])
                self._copies.wait_for(self._packed[slot])
                arena = load.extents
                self._cross(arena.at, load.staged(staging), arena.sizes)
                self._copies.record(self._copied[slot])
            self._copied[slot].wait()

    def direct(self, plan: CopyPlan, way: CopyMethod) -> None:
        """Copy pieces without staging."""
        pieces = plan.pieces
        self._directly(pieces.there, pieces.here, pieces.sizes, way)


class ScatterStream(CopyStream):
    """Copies from the arena to a cache."""

    direction = "to_device"

    def staged(self, plan: CopyPlan, buffer: StagingBuffer) -> None:
        """Copy one slot to the device while the other is unpacked."""
        with self._all_done():
            table = self._upload(plan, buffer)
            todo = loads(plan, buffer.sizes.slot_bytes, backwards=True)
            for slot, load in enumerate(todo[:NUM_SLOTS]):
                self._fill(load, buffer, slot)
            slot = 0
            for number, load in enumerate(todo):
                slot = number % NUM_SLOTS
                self._copied[slot].wait()
                move = table.move(load, buffer.slots[slot])
                self._kernels.scatter(self._launches, move)
                self._launches.record(self._packed[slot])
                if number + NUM_SLOTS < len(todo):
                    self._copies.wait_for(self._packed[slot])
                    self._fill(todo[number + NUM_SLOTS], buffer, slot)
            self._packed[slot].wait()

    def direct(self, plan: CopyPlan, way: CopyMethod) -> None:
        """Copy pieces without staging."""
        pieces = plan.pieces
        self._directly(pieces.here, pieces.there, pieces.sizes, way)

    def turn(
        self, keys: DeviceKeys, turns: Sequence[BlockRotation], buffer: StagingBuffer
    ) -> None:
        """Rotate keys; `keys.max_turns` rotations at most."""
        with self._all_done():
            table = buffer.write(keys.arrays(turns))
            self._kernels.upload(self._launches, table)
            for launch in keys.launches(turns, *table.places):
                self._kernels.turn(self._launches, launch)
            self._launches.record(self._packed[0])
            self._packed[0].wait()

    def _fill(self, load: LaunchLoad, buffer: StagingBuffer, slot: int) -> None:
        arena = load.extents
        self._cross(load.staged(buffer.slots[slot]), arena.at, arena.sizes)
        self._copies.record(self._copied[slot])


@dataclass(frozen=True, slots=True)
class _Table:
    """Where a plan's table is on the device."""

    rows: PartRows
    planes: int
    ranges: int
    blocks: int

    def move(self, load: LaunchLoad, staging: int) -> RowCopy:
        """Return what a kernel has to do for a load that lies at `staging`."""
        return RowCopy(
            self.rows,
            self.planes,
            self.ranges,
            self.blocks,
            staging,
            load.begin,
            load.end,
        )


def loads(
    plan: CopyPlan, slot_bytes: int, *, backwards: bool = False
) -> list[LaunchLoad]:
    """Cut a plan into loads that fit into slots, without those that hold nothing.

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
        """Free device memory and streams, after all caches are closed."""
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
        self._gathers = GatherStream(shared.device, shared.kernels, shared.gathers)
        self._scatters = ScatterStream(shared.device, shared.kernels, shared.scatters)

    def close(self) -> None:
        """Destroy the streams. No call is running."""
        self._gathers.close()
        self._scatters.close()
        self._shared.closed_one()

    def gather(
        self, spans: ChunkSpans, arena: Bytes, *, checksums: bool = False
    ) -> list[Checksum]:
        """Copy blocks into parts; see `PagedCache`."""
        spans.check(self.layout, nulls=False)
        plan = self._plan(spans, arena)
        self._move(plan, self._gathers, self._shared.rates.to_host)
        parts = spans.extents if checksums else ()
        return [checksum_of(buffers_of(arena.data, part)) for part in parts]

    def scatter(self, spans: ChunkSpans, arena: Bytes) -> None:
        """Copy parts into blocks; see `PagedCache`."""
        spans.check(self.layout, nulls=True)
        plan = self._plan(spans, arena)
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

    def _plan(self, spans: ChunkSpans, arena: Bytes) -> CopyPlan:
        address = arena.ctypes.data
        return CopyPlan.of(self.layout, self._rows, self._planes, spans, address)

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
        """Number of spans that fit a buffer's table."""
        table_bytes = self._shared.staging.sizes.table_bytes
        room = table_bytes - rounded(self._planes.nbytes) - rounded(1)
        return room // (
            CopyPlan.RANGE_BYTES + CopyPlan.BLOCK_BYTES * self._rows.num_blocks
        )
