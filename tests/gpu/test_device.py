"""`CudaDevice`: memory, streams, events, handles between processes."""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcore.cuda.device_interface import OpenedAllocation
from kvcore.cuda.ipc import export, export_tensor
from kvcore.cuda.shared_resources import SharedResources
from kvcore.cuda.staging import PinnedMemory
from kvcore.errors import DeviceFailed, HandleError
from kvcore.protocol import CudaIpc

pytestmark = pytest.mark.gpu
MIB = 1 << 20


class Exporter:
    """Another process, which exports GPU memory; see exporter.py."""

    def __init__(self, number: int, num_bytes: int) -> None:
        command = (sys.executable, "-m", "tests.gpu.exporter")
        self._process = subprocess.Popen(
            [*command, str(number), str(num_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        facts = self._answer()
        self.event = bytes.fromhex(facts.pop("event"))
        facts["handle"] = bytes.fromhex(facts["handle"])
        self.handle = CudaIpc(**facts)

    def send(self, command: str) -> dict[str, Any]:
        """Send a command and return the reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """End the process in any state."""
        self._process.kill()
        self._process.communicate(timeout=10)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        facts: dict[str, Any] = json.loads(self._process.stdout.readline())
        return facts


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    """Another process on the first GPU, with 4 MiB."""
    exporter = Exporter(0, 4 * MIB)
    yield exporter
    exporter.close()


class Bench:
    """Page-locked memory, a stream and an event, to copy and read bytes."""

    def __init__(self, device: Any, num_bytes: int) -> None:
        self.device = device
        self.address = device.allocate_host(num_bytes)
        pointer = (ctypes.c_uint8 * num_bytes).from_address(self.address)
        self.host = np.ctypeslib.as_array(pointer)
        self.stream, self.event = device.stream(), device.event()

    def wait(self) -> None:
        """Wait for all work so far."""
        self.stream.record(self.event)
        self.event.wait()
        assert self.event.is_done()

    def close(self) -> None:
        """Free all memory."""
        self.stream.close()
        self.event.close()
        self.device.free_host(self.address)


@pytest.fixture
def bench(device: Any) -> Iterator[Bench]:
    """Four MiB of page-locked memory."""
    bench = Bench(device, 4 * MIB)
    yield bench
    bench.close()


def noise(seed: int, num_bytes: int) -> np.ndarray:
    """Return random bytes."""
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def test_a_device_has_one_uuid_in_every_process(
    exporter: Exporter, device: Any
) -> None:
    """The UUID is well formed, and the same in both processes."""
    assert exporter.handle.device == device.uuid
    assert len(device.uuid) == 40
    assert device.uuid.startswith("GPU-")
    assert device.name
    assert device.compute_capability >= 70


def test_bytes_are_copied_to_the_device_and_back(bench: Bench, device: Any) -> None:
    """Copies of one stream run in order."""
    address = device.allocate(MIB)
    sent = noise(1, MIB)
    bench.host[:MIB] = sent
    bench.host[MIB : 2 * MIB] = 0
    bench.stream.copy(address, bench.address, MIB)
    bench.stream.copy(bench.address + MIB, address, MIB)
    bench.wait()
    assert (bench.host[MIB : 2 * MIB] == sent).all()
    device.free(address)


@pytest.mark.parametrize("size", [1, 100, 4096, 24 << 10])
def test_a_batch_copies_every_piece(bench: Bench, device: Any, size: int) -> None:
    """Scattered pieces are copied to the device and back, and no other bytes."""
    count = 100
    address = device.allocate(4 * MIB)
    sent = noise(size, count * size).reshape(count, size)
    bench.host[: count * size] = sent.reshape(-1)
    places = np.random.default_rng(2).permutation(4 * MIB // (24 << 10))[:count]
    there = address + places.astype(np.int64) * (24 << 10)
    here = bench.address + np.arange(count, dtype=np.int64) * size
    sizes = np.full(count, size, np.int64)
    bench.stream.copy_many(there, here, sizes, batched=True)
    bench.wait()
    bench.host[:] = 0xA5
    back = bench.address + np.arange(count, dtype=np.int64)[::-1].copy() * size
    bench.stream.copy_many(back, there, sizes, batched=True)
    bench.wait()
    got = bench.host[: count * size].reshape(count, size)
    assert (got == sent[::-1]).all()
    assert (bench.host[count * size :] == 0xA5).all()
    device.free(address)


def test_copies_cross_from_one_pinned_piece_to_the_next(
    bench: Bench, device: Any
) -> None:
    """Copies across two registrations succeed, even if the driver refuses them."""
    mapping = mmap.mmap(-1, MIB)
    memory = np.frombuffer(mapping, np.uint8)
    memory[:] = noise(3, MIB)
    pinned = PinnedMemory(device, memory, MIB // 4)
    start = memory.ctypes.data
    address = device.allocate(MIB)
    bench.stream.copy(address, start, MIB)
    bench.stream.copy(bench.address, address, MIB)
    bench.wait()
    assert (bench.host[:MIB] == memory).all()
    # Across a border, across another to the end of a piece, within a piece.
    firsts = np.array([0, MIB // 2, MIB // 8 * 7], np.int64)
    sizes = np.array([MIB // 2, MIB // 8 * 3, MIB // 8], np.int64)
    memory[:] = noise(4, MIB)
    bench.stream.copy_many(address + firsts, start + firsts, sizes, batched=True)
    bench.stream.copy(bench.address, address, MIB)
    bench.wait()
    assert (bench.host[:MIB] == memory).all()
    pinned.close()
    device.free(address)


def test_streams_wait_for_events(bench: Bench, device: Any) -> None:
    """Work before an event is visible to a stream that waits for the event."""
    address = device.allocate(4 * MIB)
    other, between = device.stream(urgent=True), device.event()
    sent = noise(4, 4 * MIB)
    bench.host[:] = sent
    bench.stream.copy(address, bench.address, 4 * MIB)
    bench.stream.record(between)
    other.wait_for(between)
    other.copy(bench.address, address, 4 * MIB)
    other.record(bench.event)
    bench.event.wait()
    assert (bench.host == sent).all()
    other.close()
    between.close()
    device.free(address)


def test_an_impossible_allocation_fails(device: Any) -> None:
    """The error has the driver's status, and the device still works."""
    with pytest.raises(DeviceFailed) as caught:
        device.allocate(1 << 50)
    assert caught.value.details["status"] == 2
    device.free(device.allocate(4096))


def test_host_memory_has_no_handle(bench: Bench, device: Any) -> None:
    """Memory that is not on this GPU is not exported."""
    with pytest.raises(HandleError, match="not in a GPU's memory"):
        export(bench.address, 1, device)
    with pytest.raises(HandleError, match="not in a GPU's memory"):
        export(np.zeros(1).ctypes.data, 1, device)


def test_an_export_ends_within_its_allocation(device: Any) -> None:
    """The offset counts from the allocation's start; the range may not pass its end."""
    address = device.allocate(4 * MIB)
    inside = export(address + 12345, 1000, device)
    assert inside.offset == 12345
    with pytest.raises(HandleError, match="the allocation has"):
        export(address + 12345, 4 * MIB, device)
    assert export(address, MIB, device).handle == inside.handle
    device.free(address)


def test_a_tensor_is_exported_with_its_whole_storage(device: Any) -> None:
    """The handle starts at the storage's first byte, whatever the view."""
    address = device.allocate(MIB)
    storage = SimpleNamespace(data_ptr=lambda: address + 512, nbytes=lambda: 4096)
    tensor = SimpleNamespace(
        device=SimpleNamespace(index=0), untyped_storage=lambda: storage
    )
    handle = export_tensor(tensor)
    assert (handle.offset, handle.length) == (512, 4096)
    assert handle == export(address + 512, 4096, device)
    device.free(address)


def test_another_processs_memory_is_the_same_memory(
    exporter: Exporter, bench: Bench, device: Any
) -> None:
    """Each process reads what the other wrote."""
    opened = device.open(exporter.handle.handle)
    assert opened.num_bytes >= exporter.handle.offset + exporter.handle.length
    address = opened.address + exporter.handle.offset
    exporter.send("fill 7")
    bench.stream.copy(bench.address, address, 4 * MIB)
    bench.wait()
    assert (bench.host == 7).all()
    bench.host[:] = 9
    bench.stream.copy(address, bench.address, 4 * MIB)
    bench.wait()
    assert exporter.send("read") == {"values": [9]}
    device.close_handle(opened.address)


def test_handles_are_opened_again(exporter: Exporter, device: Any) -> None:
    """A handle can be opened and closed a hundred times."""
    allocations = SharedResources[str, OpenedAllocation]()

    def opened() -> AbstractContextManager[OpenedAllocation]:
        return allocations.use(
            "one",
            lambda: device.open(exporter.handle.handle),
            lambda allocation: device.close_handle(allocation.address),
        )

    for _ in range(100):
        with opened() as first, opened() as second:
            assert second is first
        assert len(allocations) == 0


def test_foreign_handles_are_refused(device: Any) -> None:
    """Made-up handles and handles of this process are refused."""
    with pytest.raises(HandleError):
        device.open(bytes(64))
    with pytest.raises(HandleError, match="64 bytes"):
        device.open(b"short")
    address = device.allocate(MIB)
    with pytest.raises(HandleError):
        device.open(device.export(address).handle)
    device.free(address)


def test_another_processs_event_is_seen(exporter: Exporter, device: Any) -> None:
    """The event is reached when the work before its record has ended."""
    event = device.open_event(exporter.event)
    exporter.send("fill 1")
    exporter.send("record")
    while not event.is_done():
        pass
    event.close()


def test_memory_of_a_killed_process_closes(exporter: Exporter, device: Any) -> None:
    """The opener can still close its mapping, and cannot open the handle again."""
    opened = device.open(exporter.handle.handle)
    event = device.open_event(exporter.event)
    exporter.kill()
    event.close()
    device.close_handle(opened.address)
    with pytest.raises(HandleError):
        device.open(exporter.handle.handle)


def test_every_gpu_is_reached_by_its_uuid(devices: tuple) -> None:
    """A process on each GPU exports memory, which is opened on that GPU."""
    by_uuid = {device.uuid: device for device in devices}
    for number in range(len(devices)):
        exporter = Exporter(number, MIB)
        device = by_uuid[exporter.handle.device]
        opened = device.open(exporter.handle.handle)
        device.close_handle(opened.address)
        exporter.close()
