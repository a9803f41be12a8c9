"""The staging pool: few buffers, each lent to one borrower at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import numpy as np
import pytest

from kvcore.cuda.staging import StagingBuffer, StagingPool, StagingSizes
from kvcore.errors import DeviceFailed
from tests.cuda.fake_gpu import FakeDevice, FakeTimeline, array_at

SIZES = StagingSizes(slot_bytes=64, table_bytes=64, max_buffers=2)


class SmallDevice(FakeDevice):
    """A device with memory for `room` allocations."""

    def __init__(self, room: int) -> None:
        super().__init__(FakeTimeline())
        self.room = room
        self.refused = Event()

    def allocate(self, num_bytes: int) -> int:
        """Allocate while there is room."""
        if not self.room:
            self.refused.set()
            raise DeviceFailed("out of memory", status=2)
        self.room -= 1
        return super().allocate(num_bytes)


def test_a_device_gives_256_mib_at_most() -> None:
    """All buffers of the default size with their tables fit in 256 MiB."""
    sizes = StagingSizes()
    assert sizes.buffer_bytes * sizes.max_buffers <= 256 << 20
    assert sizes.slot_bytes % 256 == sizes.table_bytes % 256 == 0


def test_a_borrower_waits_for_a_free_buffer() -> None:
    """Six borrowers of two buffers: at most two are lent, each to one borrower."""
    staging = StagingPool(FakeDevice(FakeTimeline()), SIZES)
    lock, lent, most = Lock(), set(), []
    first_two = Event()

    def borrow(_: int) -> None:
        with staging.buffer() as buffer:
            with lock:
                assert buffer.table not in lent
                lent.add(buffer.table)
                most.append(len(lent))
                if len(lent) == 2:
                    first_two.set()
            first_two.wait(30)
            with lock:
                lent.remove(buffer.table)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(borrow, range(6)))
    assert max(most) == 2
    assert staging.num_bytes == 2 * SIZES.buffer_bytes


def test_buffers_are_allocated_on_demand() -> None:
    """Borrowers one after the other get the same buffer."""
    staging = StagingPool(FakeDevice(FakeTimeline()), SIZES)
    assert staging.num_bytes == 0
    tables = set()
    for _ in range(3):
        with staging.buffer() as buffer:
            tables.add(buffer.table)
    assert len(tables) == 1
    staging.close()
    assert staging.num_bytes == 0


def test_a_full_device_uses_the_buffers_it_has() -> None:
    """Without memory for a second buffer, a borrower waits for the first."""
    device = SmallDevice(room=1)
    staging = StagingPool(device, SIZES)

    def borrow() -> int:
        with staging.buffer() as buffer:
            return buffer.table

    with ThreadPoolExecutor(1) as pool:
        with staging.buffer() as first:
            second = pool.submit(borrow)
            assert device.refused.wait(30)
            assert not second.done()
        assert second.result(30) == first.table


def test_no_memory_at_all_is_an_error() -> None:
    """The call fails at once; a later call may find memory."""
    device = SmallDevice(room=0)
    staging = StagingPool(device, SIZES)
    with pytest.raises(DeviceFailed, match="out of memory"), staging.buffer():
        pass
    device.room = 1
    with staging.buffer():
        pass


def test_arrays_of_a_table_are_aligned() -> None:
    """Arrays begin at multiples of 16, on the host and on the device."""
    device = FakeDevice(FakeTimeline())
    staging = StagingPool(device, SIZES)
    with staging.buffer() as buffer:
        written = buffer.write((np.arange(3, dtype=np.int64), np.arange(2, dtype="i4")))
        assert written.places == (buffer.table, buffer.table + 32)
        assert written.num_bytes == 48
        host = array_at(buffer.host_table, 64)
        assert host[:24].view(np.int64).tolist() == [0, 1, 2]
        assert host[32:40].view(np.int32).tolist() == [0, 1]
        assert_disjoint(buffer)


def assert_disjoint(buffer: StagingBuffer) -> None:
    """A buffer's table and slots do not overlap."""
    first, second = buffer.slots
    assert buffer.table + SIZES.table_bytes <= first
    assert first + SIZES.slot_bytes <= second
