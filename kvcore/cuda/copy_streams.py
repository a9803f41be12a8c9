"""One direction of one cache: a stream of its own, and the ways that bytes take on it.

Staged, a kernel packs one slot of a buffer while the copy engine carries the other
across the link (scatters: the reverse). Kernels run on a stream that all lanes of
their direction share, so that the SMs of one launch are all that copies ever take.
Nothing is put there before it can run at once: a lane waits on the host, never in that
stream, and so no lane holds up another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kvcore.blend.key_rotation import BlockRotation
from kvcore.cuda.copy_methods import CopyMethod
from kvcore.cuda.copy_plan import I64, ByteRanges, CopyPlan, PartRows
from kvcore.cuda.device import Device, Stream
from kvcore.cuda.device_key_rotation import DeviceKeys
from kvcore.cuda.kernel_launch import Kernels, RowCopy
from kvcore.cuda.staging import NUM_SLOTS, StagingBuffer
from kvcore.errors import DeviceFailed

FIRST_BYTES = 4 << 20
"""What is packed while the link stands idle, or unpacked once it does again."""
GROWTH = 3
"""From one slot's bytes to the next, until slots are full: kernels are faster."""
FEW = 4
"""Copies that are cheaper one by one than as a batch."""


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
    """What both directions have; one call at a time.

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
        """Let go of stream and events. No call is under way."""
        self._copies.close()
        for event in (*self._packed, *self._copied):
            event.close()

    def _upload(self, plan: CopyPlan, buffer: StagingBuffer) -> _Table:
        table = buffer.write((plan.planes, plan.ranges, plan.blocks))
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
        """Leave nothing on the device when a call fails half way."""
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
    """From a cache to the arena."""

    direction = "to_host"

    def staged(self, plan: CopyPlan, buffer: StagingBuffer) -> None:
        """Pack a slot while the other one is carried across."""
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
        """Copy pieces as they are."""
        pieces = plan.pieces
        self._directly(pieces.there, pieces.here, pieces.sizes, way)


class ScatterStream(CopyStream):
    """From the arena to a cache."""

    direction = "to_device"

    def staged(self, plan: CopyPlan, buffer: StagingBuffer) -> None:
        """Carry a slot across while the other one is unpacked."""
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
        """Copy pieces as they are."""
        pieces = plan.pieces
        self._directly(pieces.here, pieces.there, pieces.sizes, way)

    def turn(
        self, keys: DeviceKeys, turns: Sequence[BlockRotation], buffer: StagingBuffer
    ) -> None:
        """Turn keys; `keys.max_turns` at most."""
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
