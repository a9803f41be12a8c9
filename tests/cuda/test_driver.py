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
    """The stub's control functions."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.stub_hold(0)
    except (OSError, AttributeError):
        pytest.skip("needs the stub of a driver: make test-torch, or .ci/stub")
    return library


def open_devices() -> tuple[Any, ...]:
    """Return the stub's devices."""
    from kvcore.cuda.driver import open_devices

    return open_devices()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("STUB_INIT", "100", "the NVIDIA driver does not start: CUDA_ERROR_100"),
        ("STUB_INIT", "803", "the NVIDIA driver does not start: CUDA_ERROR_803"),
        ("STUB_VERSION", "11080", "for CUDA 11.8; 12.0 is the least that will do"),
        ("STUB_DEVICES", "0", "the NVIDIA driver shows no GPU"),
    ],
)
def test_an_unusable_driver_is_a_one_line_error(
    stub: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    message: str,
) -> None:
    """No driver, a mismatch with its kernel module, too old a driver, no GPU."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SetupError, match=message) as caught:
        open_cuda_transports("cuda", np.zeros(8, np.uint8))
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("device = cuda: ")
    assert open_cuda_transports("auto", np.zeros(8, np.uint8)) == {}


def test_an_arena_that_cannot_be_pinned_stops_the_server(
    stub: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server does not start, instead of copying at a third of its speed."""
    monkeypatch.setenv("STUB_MAX_PIN", "4096")
    with pytest.raises(SetupError, match=r"cannot be page-locked.*--l1-size"):
        open_cuda_transports("auto", np.zeros(8192, np.uint8))


@pytest.mark.parametrize("version", ["13000", "12080", "12000"])
def test_batches_match_the_drivers_version(
    stub: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """With either signature, or one call per piece where the driver has no batches."""
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


def test_an_empty_batch_makes_no_call(stub: ctypes.CDLL) -> None:
    """An empty batch, which the driver refuses, is not passed to it."""
    stream = open_devices()[0].stream()
    none = np.empty(0, np.int64)
    stream.copy_many(none, none, none, batched=True)
    stream.copy(1, 1, 0)
    stream.close()


def test_unfinished_work_is_not_done(stub: ctypes.CDLL) -> None:
    """The driver's NOT_READY is a value, not an error."""
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


def test_a_sticky_failure_has_its_status(stub: ctypes.CDLL) -> None:
    """After a kernel's illegal access every call raises it."""
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
    ("kind", "advice"),
    [
        ("virtual", "expandable_segments:False.*sleep mode"),
        ("pooled", "backend:native"),
    ],
)
def test_memory_without_handles_is_refused_with_advice(
    stub: ctypes.CDLL, kind: str, advice: str
) -> None:
    """The error names expandable segments, sleep mode and pools."""
    device = open_devices()[0]
    getattr(stub, f"stub_next_{kind}")()
    address = device.allocate(4096)
    with pytest.raises(HandleError, match=advice):
        device.export(address)
    device.free(address)


def test_an_export_keeps_the_threads_current_gpu(stub: ctypes.CDLL) -> None:
    """An engine's next tensors are on its own GPU, also after a refused export."""
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
    """The error names both GPUs."""
    first, second = open_devices()
    address = second.allocate(4096)
    with pytest.raises(HandleError, match="lies on GPU 1, not 0"):
        first.export(address)
    second.free(address)


def test_calls_succeed_during_an_engines_capture(stub: ctypes.CDLL) -> None:
    """Kvcore's threads work while another thread captures a graph."""
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


def test_a_gpu_in_exclusive_mode_is_a_one_line_error(
    stub: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error advises MPS, not a smaller L1."""
    monkeypatch.setenv("STUB_RETAIN", "46")
    with pytest.raises(SetupError, match=r"compute mode exclusive.*MPS") as caught:
        open_cuda_transports("cuda", np.zeros(8, np.uint8))
    assert "l1" not in caught.value.message


def test_a_kernel_is_loaded_and_launched(stub: ctypes.CDLL) -> None:
    """A kernel compiled for Hopper reads its arguments at the right offsets."""
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
    """Small pieces are batched, and one warning is logged."""
    monkeypatch.setenv("STUB_REFUSES_KERNELS", "1")
    caches: Any = open_caches(open_devices()[0])
    rates = caches.rates.to_host
    assert rates.batched
    assert not rates.kernels
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "runs no kernels of ours: loading kernel" in caplog.text
    caches.close()


def test_every_resource_is_closed(stub: ctypes.CDLL) -> None:
    """A thousand resources of each kind are opened and closed."""
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
