"""The real device and NVIDIA's bindings over a stub of the driver (`.ci/stub`)."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvcore.cuda.ipc import open_caches, open_cuda_transports
from kvcore.cuda.kernel_launches import TritonKernels, arguments_of, compiled
from kvcore.cuda.staging import KernelTable
from kvcore.errors import DeviceFailed, HandleError, SetupError

pytestmark = pytest.mark.torch


@pytest.fixture
def stub() -> ctypes.CDLL:
    """The stub's own knobs."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.stub_hold(0)
    except (OSError, AttributeError):
        pytest.skip("needs the stub of a driver: make test-torch, or .ci/stub")
    return library


def open_devices() -> tuple[Any, ...]:
    """Open the stub's devices."""
    from kvcore.cuda.driver import open_devices

    return open_devices()


@pytest.mark.parametrize(
    ("knob", "value", "told"),
    [
        ("STUB_INIT", "100", "the NVIDIA driver does not start: CUDA_ERROR_100"),
        ("STUB_INIT", "803", "the NVIDIA driver does not start: CUDA_ERROR_803"),
        ("STUB_VERSION", "11080", "for CUDA 11.8; 12.0 is the least that will do"),
        ("STUB_DEVICES", "0", "the NVIDIA driver shows no GPU"),
    ],
)
def test_a_driver_that_will_not_do_is_one_line(
    stub: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    knob: str,
    value: str,
    told: str,
) -> None:
    """Missing, too old, of another version than its module, without a GPU."""
    monkeypatch.setenv(knob, value)
    with pytest.raises(SetupError, match=told) as caught:
        open_cuda_transports("cuda", np.zeros(8, np.uint8))
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("device = cuda: ")
    assert open_cuda_transports("auto", np.zeros(8, np.uint8)) == {}


def test_an_arena_that_cannot_be_pinned_stops_the_server(
    stub: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that would copy at a third of its speed says so instead."""
    monkeypatch.setenv("STUB_MAX_PIN", "4096")
    with pytest.raises(SetupError, match=r"cannot be page-locked.*--l1-size"):
        open_cuda_transports("auto", np.zeros(8192, np.uint8))


@pytest.mark.parametrize("version", ["13000", "12080", "12000"])
def test_batches_suit_the_drivers_version(
    stub: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """With either signature, and one by one where the driver has no batches."""
    monkeypatch.setenv("STUB_VERSION", version)
    device = open_devices()[0]
    stream, target = device.stream(), device.allocate(64 * 8)
    source = np.arange(64 * 8, dtype=np.uint8)
    places = np.arange(64, dtype=np.int64)
    before = stub.stub_num_batches(), stub.stub_num_copies()
    stream.copy_many(
        target + places * 8,
        source.ctypes.data + places[::-1].copy() * 8,
        np.full(64, 8, np.int64),
        batched=True,
    )
    batches = stub.stub_num_batches() - before[0]
    assert (batches, stub.stub_num_copies() - before[1]) == (version != "12000", 64)
    got = (ctypes.c_uint8 * 512).from_address(target)
    assert bytes(got) == source.reshape(64, 8)[::-1].tobytes()
    stream.close()
    device.free(target)


def test_no_pieces_are_no_call(stub: ctypes.CDLL) -> None:
    """An empty batch, which a driver refuses, is not handed to it."""
    stream = open_devices()[0].stream()
    none = np.empty(0, np.int64)
    stream.copy_many(none, none, none, batched=True)
    stream.copy(1, 1, 0)
    stream.close()


def test_work_that_is_not_done_is_not_done(stub: ctypes.CDLL) -> None:
    """The driver's NOT_READY is an answer, and no error."""
    device = open_devices()[0]
    stream, event = device.stream(), device.event()
    assert event.is_done()
    stub.stub_hold(1)
    stream.record(event)
    assert not event.is_done()
    stub.stub_hold(0)
    stream.record(event)
    assert event.is_done()
    event.wait()
    event.close()
    stream.close()


def test_a_sticky_failure_is_told_with_its_number(stub: ctypes.CDLL) -> None:
    """After a kernel's bad access every call says so."""
    device = open_devices()[0]
    event = device.event()
    stub.stub_break(1)
    try:
        for call in (event.is_done, event.wait, device.stream):
            with pytest.raises(DeviceFailed) as caught:
                call()
            assert caught.value.details == {"status": 700}
    finally:
        stub.stub_break(0)
    event.close()


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        ("virtual", "expandable_segments:False.*sleep mode"),
        ("pooled", "backend:native"),
    ],
)
def test_memory_without_handles_is_refused_with_its_cure(
    stub: ctypes.CDLL, kind: str, cure: str
) -> None:
    """Expandable segments, sleep mode and pools are named."""
    device = open_devices()[0]
    getattr(stub, f"stub_next_{kind}")()
    address = device.allocate(4096)
    with pytest.raises(HandleError, match=cure):
        device.export(address)
    device.free(address)


def test_an_export_leaves_the_threads_gpu_as_it_was(stub: ctypes.CDLL) -> None:
    """An engine's next tensors lie where it wanted them, also after a refusal."""
    from kvcore.cuda.driver import check, cu

    first, second = open_devices()
    address = first.allocate(4096)
    for current in (second, None):
        check(cu.cuCtxSetCurrent(0), "none")
        if current is not None:
            current.enter()
        before = int(check(cu.cuCtxGetCurrent(), "before"))
        first.export(address)
        with pytest.raises(HandleError):
            first.export(1)
        assert int(check(cu.cuCtxGetCurrent(), "after")) == before
    first.free(address)


def test_memory_of_another_gpu_is_not_exported(stub: ctypes.CDLL) -> None:
    """A worker that names the wrong device is told so."""
    first, second = open_devices()
    address = second.allocate(4096)
    with pytest.raises(HandleError, match="lies on GPU 1, not 0"):
        first.export(address)
    second.free(address)


def test_calls_go_on_beside_an_engines_capture(stub: ctypes.CDLL) -> None:
    """From any thread of ours, while another thread captures a graph."""
    device = open_devices()[0]

    def copy() -> bool:
        stream, event = device.stream(), device.event()
        address = device.allocate(64)
        stream.copy(address, np.zeros(64, np.uint8).ctypes.data, 64)
        stream.record(event)
        event.wait()
        for done in (stream.close, event.close, lambda: device.free(address)):
            done()
        return True

    stub.stub_capture(1)
    try:
        with ThreadPoolExecutor(1) as ours:
            assert ours.submit(copy).result(20)
    finally:
        stub.stub_capture(0)


def test_a_gpu_that_is_anothers_alone_is_one_line(
    stub: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In exclusive mode the cure is named, which is not a smaller L1."""
    monkeypatch.setenv("STUB_RETAIN", "46")
    with pytest.raises(SetupError, match=r"compute mode exclusive.*MPS") as caught:
        open_cuda_transports("cuda", np.zeros(8, np.uint8))
    assert "l1" not in caught.value.message


def test_a_kernel_is_loaded_and_launched(stub: ctypes.CDLL) -> None:
    """What was compiled for Hopper finds its arguments where it has them."""
    device = open_devices()[0]
    with pytest.raises(DeviceFailed, match="loading kernel none"):
        device.load(b"no image", "none")
    made = compiled(arguments_of(KernelTable(0, 0, 0, ())), 90)
    with pytest.raises(DeviceFailed, match="finding kernel none"):
        device.load(made.cubin, "none")
    stream, address = device.stream(), device.allocate(256)
    table = np.arange(200, dtype=np.uint8)
    TritonKernels(device).launch(
        stream, KernelTable(address, table.ctypes.data, table.size, ())
    )
    got = bytes((ctypes.c_uint8 * 256).from_address(address))
    assert got == table.tobytes() + bytes(56)
    stream.close()
    device.free(address)


def test_a_driver_that_refuses_kernels_still_copies(
    stub: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Small pieces go as batches, and the log says so once."""
    monkeypatch.setenv("STUB_REFUSES_KERNELS", "1")
    caches: Any = open_caches(open_devices()[0])
    rates = caches.rates.to_host
    assert rates.batched
    assert not rates.kernels
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "runs no kernels of ours: loading kernel" in caplog.text
    caches.close()


def test_nothing_stays_open(stub: ctypes.CDLL) -> None:
    """A thousand of everything end where they began."""
    device = open_devices()[0]
    before = stub.stub_num_open()
    memory = np.zeros(4096, np.uint8)
    for _ in range(1000):
        stream, event = device.stream(), device.event(shared=True)
        address, host = device.allocate(4096), device.allocate_host(4096)
        device.pin(memory.ctypes.data, 4096)
        assert stub.stub_num_open() == before + 5
        device.unpin(memory.ctypes.data)
        device.free_host(host)
        device.free(address)
        event.close()
        stream.close()
    assert stub.stub_num_open() == before
