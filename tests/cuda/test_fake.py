"""The fake device guarantees only the documented order, and detects misuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import DeviceFailed, HandleError
from tests.cuda.fake_gpu import (
    POISON,
    FakeDevice,
    FakeTimeline,
    Misuse,
    Touch,
    array_at,
)


def filled(device: FakeDevice, num_bytes: int, value: int) -> int:
    """Allocate memory and fill it with one value."""
    address = device.allocate(num_bytes)
    array_at(address, num_bytes)[:] = value
    return address


def test_work_runs_only_when_a_caller_waits() -> None:
    """A copy's bytes appear only after a wait for its event."""
    device = FakeDevice(FakeTimeline())
    source, target = filled(device, 64, 1), device.allocate(64)
    stream, event = device.stream(), device.event()
    stream.copy(target, source, 64)
    stream.record(event)
    assert (array_at(target, 64) == POISON).all()
    event.wait()
    assert (array_at(target, 64) == 1).all()


@given(st.integers(0, 2**32))
def test_streams_are_ordered_by_events_alone(seed: int) -> None:
    """Two copies ordered by an event run in that order, whichever stream is chosen."""
    device = FakeDevice(FakeTimeline(seed))
    a, b, c = filled(device, 64, 1), filled(device, 64, 2), filled(device, 64, 3)
    first, second = device.stream(), device.stream()
    between, done = device.event(), device.event()
    first.copy(b, a, 64)
    first.record(between)
    second.wait_for(between)
    second.copy(c, b, 64)
    second.record(done)
    done.wait()
    assert (array_at(c, 64) == 1).all()


def test_without_an_event_some_order_is_wrong() -> None:
    """Without an event, both orders of two copies occur."""
    seen = set()
    for seed in range(50):
        device = FakeDevice(FakeTimeline(seed))
        a, b, c = filled(device, 64, 1), filled(device, 64, 2), filled(device, 64, 3)
        first, second, done = device.stream(), device.stream(), device.event()
        first.copy(b, a, 64)
        second.copy(c, b, 64)
        second.record(done)
        done.wait()
        seen.add(int(array_at(c, 64)[0]))
        device.timeline.run()
    assert seen == {1, 2}


def test_memory_must_be_there() -> None:
    """Work on memory that is not allocated, opened or pinned is refused."""
    device = FakeDevice(FakeTimeline())
    host = np.zeros(64, np.uint8)
    target, stream = device.allocate(64), device.stream()
    with pytest.raises(Misuse, match="not all"):
        stream.copy(target, host.ctypes.data, 64)
    device.pin(host.ctypes.data, 32)
    device.pin(host.ctypes.data + 32, 32)
    stream.copy(target, host.ctypes.data, 64)
    with pytest.raises(Misuse, match="while work uses it"):
        device.unpin(host.ctypes.data)


def test_memory_in_use_cannot_be_freed() -> None:
    """Freeing memory that a kernel still reads is detected, and a second free."""
    device = FakeDevice(FakeTimeline())
    address, stream = device.allocate(64), device.stream()
    ran = []
    stream.call(lambda: ran.append(1), [Touch(address, 64)])
    with pytest.raises(Misuse, match="while work uses it"):
        device.free(address)
    device.timeline.run()
    assert ran == [1]
    other = device.allocate(64)
    device.free(other)
    with pytest.raises(Misuse, match="freed before"):
        device.timeline.leave(other)


def test_a_broken_device_stays_broken() -> None:
    """After a failed step every call fails."""
    device = FakeDevice(FakeTimeline())
    source, target = filled(device, 64, 1), device.allocate(64)
    stream, event = device.stream(), device.event()
    stream.copy(target, source, 64)
    stream.record(event)
    device.timeline.breaks_after = 0
    with pytest.raises(DeviceFailed):
        event.wait()
    with pytest.raises(DeviceFailed):
        stream.copy(target, source, 64)


def test_handles_open_the_same_memory_elsewhere() -> None:
    """The opener sees the bytes at another address, and cannot open a handle twice."""
    timeline = FakeTimeline()
    worker, server = FakeDevice(timeline), FakeDevice(timeline, ordinal=3)
    address = filled(worker, 4096, 7)
    exported = worker.export(address + 100)
    assert (exported.offset, exported.allocation_bytes) == (100, 4096)
    opened = server.open(exported.handle)
    assert opened.address != address
    assert (array_at(opened.address, 4096) == 7).all()
    with pytest.raises(Misuse, match="twice"):
        server.open(exported.handle)
    server.close_handle(opened.address)
    worker.free(address)
    with pytest.raises(HandleError):
        server.open(exported.handle)


def test_an_event_is_seen_through_its_handle() -> None:
    """An event recorded by one process is seen as reached by another."""
    timeline = FakeTimeline(eager=False)
    worker, server = FakeDevice(timeline), FakeDevice(timeline)
    event, stream = worker.event(shared=True), worker.stream()
    seen = server.open_event(event.handle())
    assert seen.reached()()
    stream.record(event)
    assert not seen.reached()()
    timeline.run()
    assert seen.is_done()
    with pytest.raises(Misuse):
        seen.wait()
