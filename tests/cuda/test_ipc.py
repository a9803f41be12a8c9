"""A worker's GPU memory in the server: export, opening, events, closing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvcore.copy.memory_transports import AttachedMemory, TransportTable
from kvcore.cuda.ipc import MAX_EVENTS, CudaTransport, export
from kvcore.cuda.staging import PinnedMemory
from kvcore.errors import (
    BadRequest,
    DeadlineExceeded,
    DeviceFailed,
    HandleError,
    UnknownInstance,
)
from kvcore.layout import CacheGroup, KVLayout, TensorView
from kvcore.protocol import CudaIpc, PosixShm
from tests.cuda.fake_device_caches import HostCaches
from tests.cuda.fake_gpu import FakeDevice, FakeTimeline, Misuse, array_at

GROUP = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, 8), (128, 8, 1)),))
CACHE_BYTES = 512
LAYOUT = KVLayout.derive(GROUP, [CACHE_BYTES], 16)
UUIDS = ("GPU-a", "GPU-b")


def nothing() -> None:
    """Do nothing."""


@dataclass
class Host:
    """A host with two GPUs: the worker's and the server's devices."""

    timeline: FakeTimeline = field(default_factory=FakeTimeline)
    made: list[HostCaches] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worker = {
            uuid: FakeDevice(self.timeline, uuid, number)
            for number, uuid in enumerate(UUIDS)
        }
        # The server sees them in another order.
        self.server = [
            FakeDevice(self.timeline, uuid, number)
            for number, uuid in enumerate(reversed(UUIDS))
        ]
        self.arena = np.zeros(1 << 16, np.uint8)
        self.cuda = CudaTransport(self.server, self.arena, self.caches)
        self.transports = TransportTable({CudaIpc: self.cuda})

    def caches(self, device: FakeDevice) -> HostCaches:
        """Return the shared state of a device's caches."""
        self.made.append(HostCaches(device))
        return self.made[-1]

    def attach(self, *handles: CudaIpc) -> AttachedMemory:
        """Return the attached memory of an instance with one cache."""
        return self.transports.attach(handles, [LAYOUT]).result(10)

    @property
    def num_open(self) -> int:
        """Number of allocations that the server has open."""
        return sum(len(device.opened) for device in self.server)


@pytest.fixture
def host() -> Iterator[Host]:
    """A host; checks at the end that every resource is closed."""
    host = Host()
    yield host
    host.transports.close()
    assert host.num_open == 0
    assert host.timeline.pinned == set()


def test_a_tensor_within_an_allocation_is_located(host: Host) -> None:
    """The server sees the worker's live bytes from the tensor's first byte on."""
    device = host.worker["GPU-a"]
    base = device.allocate(4096)
    handle = export(base + 1024, CACHE_BYTES, device)
    assert (handle.device, handle.offset, handle.length) == ("GPU-a", 1024, 512)
    memory = host.attach(handle)
    array_at(base + 1024, CACHE_BYTES)[:] = 9
    taken = memory.caches[0]._planes[0].view  # type: ignore[attr-defined]
    assert (taken == 9).all()
    memory.close()


def test_the_uuid_selects_the_gpu(host: Host) -> None:
    """Each handle is opened on its GPU, which has another ordinal in the server."""
    memories = []
    for uuid, device in host.worker.items():
        memories.append(host.attach(export(device.allocate(512), 512, device)))
        assert host.made[-1].device.uuid == uuid
    by_uuid = {device.uuid: len(device.opened) for device in host.server}
    assert by_uuid == {"GPU-a": 1, "GPU-b": 1}
    assert [status.uuid for status in host.transports.devices()] == [*UUIDS]
    for memory in memories:
        memory.close()


def test_an_allocation_is_opened_once(host: Host) -> None:
    """Tensors and instances in one allocation share a mapping until the last ends."""
    device = host.worker["GPU-a"]
    base = device.allocate(4 * CACHE_BYTES)
    handles = [export(base + n * 512, 512, device) for n in range(4)]
    first, second = host.attach(*handles[:2]), host.attach(*handles[2:])
    assert host.num_open == 1
    first.close()
    assert host.num_open == 1
    second.close()
    assert host.num_open == 0
    assert len(host.made) == 1


def test_handles_end_within_their_allocation(host: Host) -> None:
    """Both sides refuse a range past the end, and no allocation stays open."""
    device = host.worker["GPU-a"]
    base = device.allocate(1024)
    with pytest.raises(HandleError, match="the allocation has 1,024"):
        export(base + 1000, 25, device)
    good = export(base, 512, device)
    forged = CudaIpc(good.device, good.handle, 513, 512)
    with pytest.raises(HandleError, match="claims 512 from byte 513") as caught:
        host.attach(good, forged)
    assert caught.value.details == {"size": 1024, "claimed": 1025}
    assert host.num_open == 0


def test_unreachable_memory_is_refused(host: Host) -> None:
    """Unknown or several GPUs, mixed kinds, dead workers, memory without a handle."""
    device = host.worker["GPU-a"]
    one = export(device.allocate(512), 512, device)
    other = export(host.worker["GPU-b"].allocate(512), 512, host.worker["GPU-b"])
    with pytest.raises(HandleError, match="GPU-c is not visible to the server"):
        host.attach(CudaIpc("GPU-c", one.handle, 0, 512))
    with pytest.raises(HandleError, match="of 2 GPUs"):
        host.attach(one, other)
    with pytest.raises(HandleError, match="all of one kind"):
        host.transports.attach((one, PosixShm("x", 0, 512)), [LAYOUT])
    with pytest.raises(HandleError, match="cannot be opened"):
        host.attach(CudaIpc("GPU-a", bytes(64), 0, 512))
    with pytest.raises(HandleError, match="memory of a GPU"):
        TransportTable().attach((one,), [LAYOUT])
    virtual = device.allocate(512)
    device.no_ipc.add(virtual)
    with pytest.raises(HandleError, match="no handle"):
        export(virtual, 512, device)


def test_a_wait_ends_after_the_workers_event(host: Host) -> None:
    """Work queued before the event has run when the wait returns."""
    device = host.worker["GPU-a"]
    base = device.allocate(CACHE_BYTES)
    memory = host.attach(export(base, CACHE_BYTES, device))
    stream, event = device.stream(), device.event(shared=True)
    ran = []
    stream.call(lambda: ran.append(1), ())
    stream.record(event)
    memory.wait(event.handle(), nothing)
    assert ran == [1]
    memory.wait(b"", nothing)
    stream.close()
    memory.close()


def never(device: FakeDevice) -> bytes:
    """Return the handle of an event that is recorded but never reached."""
    stream, event = device.stream(), device.event(shared=True)
    stream.record(event)
    device.timeline.streams.remove(stream)
    device.events = [event]  # type: ignore[attr-defined] # kept alive
    return event.handle()


def test_a_wait_for_a_dead_worker_ends(host: Host) -> None:
    """The wait for an unreachable event ends at the deadline or the worker's death."""
    device = host.worker["GPU-a"]
    memory = host.attach(export(device.allocate(CACHE_BYTES), CACHE_BYTES, device))
    handle = never(device)

    def late() -> None:
        raise DeadlineExceeded("late")

    with pytest.raises(DeadlineExceeded):
        memory.wait(handle, late)
    with pytest.raises(UnknownInstance, match="gone"):
        memory.wait(handle, memory.abandon)
    memory.close()


def test_events_are_bounded_and_opened_once(host: Host) -> None:
    """The 257th event of an instance is refused."""
    device = host.worker["GPU-a"]
    memory = host.attach(export(device.allocate(CACHE_BYTES), CACHE_BYTES, device))
    events = [device.event(shared=True) for _ in range(MAX_EVENTS + 1)]
    for event in events[:-1]:
        memory.wait(event.handle(), nothing)
        memory.wait(event.handle(), nothing)
    with pytest.raises(BadRequest, match="more than 256 events"):
        memory.wait(events[-1].handle(), nothing)
    memory.close()
    for event in events:
        event.close()


def test_the_reply_event_follows_the_copies(host: Host) -> None:
    """The event of a reply is reached after the copies."""
    device = host.worker["GPU-a"]
    memory = host.attach(export(device.allocate(CACHE_BYTES), CACHE_BYTES, device))
    seen = device.open_event(memory.event)
    memory.record()
    assert not seen.reached()()
    host.timeline.run()
    assert seen.is_done()
    memory.close()


def test_a_thousand_instances_leak_no_resource(host: Host) -> None:
    """Numbers of allocations, streams and caches are the same as before."""
    device = host.worker["GPU-a"]
    base = device.allocate(CACHE_BYTES)
    event = device.event(shared=True)
    before = (len(host.timeline.regions), len(host.timeline.streams))
    for _ in range(1000):
        memory = host.attach(export(base, CACHE_BYTES, device))
        memory.wait(event.handle(), nothing)
        memory.record()
        host.timeline.run()
        memory.close()
    assert (len(host.timeline.regions), len(host.timeline.streams)) == before
    assert host.num_open == 0
    assert [caches.num_open for caches in host.made] == [0]


def test_a_broken_gpu_does_not_keep_a_server_from_closing() -> None:
    """A failure while closing is logged, and the rest is closed."""
    host = Host()
    device = host.worker["GPU-a"]
    memory = host.attach(export(device.allocate(CACHE_BYTES), CACHE_BYTES, device))
    host.timeline.breaks_after = 0
    with pytest.raises(DeviceFailed):
        memory.record()
    memory.close()
    host.transports.close()
    assert [(caches.num_open, caches.is_closed) for caches in host.made] == [(0, True)]


def test_memory_is_pinned_in_pieces() -> None:
    """All bytes are pinned, with a shorter last piece, and unpinned by `close`."""
    device = FakeDevice(FakeTimeline())
    memory = np.zeros(10_000, np.uint8)
    pinned = PinnedMemory(device, memory, 4096)
    start = memory.ctypes.data
    assert device.timeline.regions == {
        start: 4096, start + 4096: 4096, start + 8192: 10_000 - 8192
    }  # fmt: skip
    pinned.close()
    assert device.timeline.regions == {}


def test_pinning_is_all_or_nothing() -> None:
    """If a piece cannot be pinned, earlier ones are unpinned; the error says so."""
    device = FakeDevice(FakeTimeline())
    memory = np.zeros(10_000, np.uint8)
    pin = device.pin

    def refuse(address: int, num_bytes: int) -> None:
        if address > memory.ctypes.data + 4096:
            raise DeviceFailed("out of memory", status=2)
        pin(address, num_bytes)

    device.pin = refuse  # type: ignore[method-assign]
    with pytest.raises(DeviceFailed, match=r"10,000 bytes .* of which 8,192") as caught:
        PinnedMemory(device, memory, 4096)
    assert caught.value.details == {"status": 2}
    assert device.timeline.regions == {}
    with pytest.raises(Misuse):
        device.unpin(memory.ctypes.data)
