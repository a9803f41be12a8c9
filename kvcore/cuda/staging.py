"""Page-locked host memory, and staging buffers in device memory.

A staging buffer has two slots and a table. Kernels fill or empty one slot while the
copy engine works on the other. The table holds the kernels' arrays; it is written in
page-locked host memory and uploaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import Any

import numpy as np

from kvcore.cuda.device_interface import Device
from kvcore.errors import DeviceFailed
from kvcore.shm import Bytes

PIECE_BYTES = 1 << 30
"""Registered per call: a failure shows early, and other threads reach the driver
between two calls."""


class PinnedMemory:
    """Host memory that is page-locked until `close`; the caller keeps it mapped."""

    def __init__(
        self, device: Device, memory: Bytes, piece_bytes: int = PIECE_BYTES
    ) -> None:
        """Page-lock all of `memory`, for every GPU of this process.

        Raises:
            DeviceFailed: it cannot be page-locked; none of it stays locked.
        """
        self._device = device
        self._pieces: list[int] = []
        start = memory.ctypes.data
        try:
            for offset in range(0, memory.nbytes, piece_bytes):
                size = min(piece_bytes, memory.nbytes - offset)
                device.pin(start + offset, size)
                self._pieces.append(start + offset)
        except DeviceFailed as error:
            done = len(self._pieces) * piece_bytes
            self.close()
            raise DeviceFailed(
                f"{memory.nbytes:,} bytes cannot be page-locked, of which {done:,} "
                f"could: {error.message}",
                **error.details,
            ) from None

    def close(self) -> None:
        """Unlock the memory, after the last copy."""
        while self._pieces:
            self._device.unpin(self._pieces.pop())


NUM_SLOTS = 2


@dataclass(frozen=True, slots=True)
class StagingSizes:
    """Sizes and number of a device's staging buffers; at most 256 MiB in all."""

    slot_bytes: int = (16 << 20) - (256 << 10)
    table_bytes: int = 512 << 10
    max_buffers: int = 8

    @property
    def buffer_bytes(self) -> int:
        """Device memory of a buffer."""
        return NUM_SLOTS * self.slot_bytes + self.table_bytes


@dataclass(frozen=True, slots=True)
class StagingBuffer:
    """Addresses of one buffer: `slots` and `table` on the device, `host_table` not."""

    slots: tuple[int, ...]
    table: int
    host_table: int
    sizes: StagingSizes

    def write(self, arrays: Sequence[np.ndarray[Any, Any]]) -> KernelTable:
        """Write arrays into the host table; they MUST fit into `table_bytes`."""
        memory: Bytes = np.ctypeslib.as_array(
            (ctypes.c_uint8 * self.sizes.table_bytes).from_address(self.host_table)
        )
        places = []
        end = 0
        for array in arrays:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            memory[end : end + raw.size] = raw
            places.append(self.table + end)
            end = rounded(end + raw.size)
        return KernelTable(self.table, self.host_table, end, tuple(places))


@dataclass(frozen=True, slots=True)
class KernelTable:
    """Arrays for kernels in page-locked memory, and where they are uploaded to.

    `places` are the device addresses of the arrays.
    """

    on_device: int
    on_host: int
    num_bytes: int
    places: tuple[int, ...]


def rounded(num_bytes: int) -> int:
    """Return a size rounded up to the alignment of a table's arrays, 16 bytes."""
    return -(-num_bytes // 16) * 16


class StagingPool:
    """The buffers of one device. Any thread borrows one, waiting if none is free."""

    def __init__(self, device: Device, sizes: StagingSizes) -> None:
        self.sizes = sizes
        self._device = device
        self._made: list[StagingBuffer] = []
        self._free: list[StagingBuffer] = []
        self._is_full = False
        self._changed = Condition()

    @property
    def num_bytes(self) -> int:
        """Device memory allocated so far."""
        return len(self._made) * self.sizes.buffer_bytes

    @contextmanager
    def buffer(self) -> Iterator[StagingBuffer]:
        """Borrow a buffer; its work MUST have ended when the context ends.

        Raises:
            DeviceFailed: the device has no memory for any buffer.
        """
        with self._changed:
            while not self._free and not self._grow():
                self._changed.wait()
            lent = self._free.pop()
        try:
            yield lent
        finally:
            with self._changed:
                self._free.append(lent)
                self._changed.notify()

    def close(self) -> None:
        """Free all memory, after the last buffer is returned."""
        for buffer in self._made:
            self._device.free(buffer.table)
            self._device.free_host(buffer.host_table)
        self._made.clear()
        self._free.clear()

    def _grow(self) -> bool:
        """Allocate one more buffer, if the limit and the device's memory allow it."""
        if self._is_full or len(self._made) == self.sizes.max_buffers:
            return False
        try:
            table = self._device.allocate(self.sizes.buffer_bytes)
        except DeviceFailed:
            if not self._made:
                raise
            self._is_full = True
            return False
        try:
            host_table = self._device.allocate_host(self.sizes.table_bytes)
        except BaseException:
            self._device.free(table)
            raise
        first = table + self.sizes.table_bytes
        slots = range(first, table + self.sizes.buffer_bytes, self.sizes.slot_bytes)
        made = StagingBuffer(tuple(slots), table, host_table, self.sizes)
        self._made.append(made)
        self._free.append(made)
        return True
