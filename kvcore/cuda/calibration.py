"""Copy rates of a device, measured once, and the copy method that is fastest by them.

- staged: kernels pack and unpack pieces, and the link carries large copies. It reaches
  the link's speed for any size of piece, but costs kernel launches, a second pass
  through device memory, and a few SMs during the copy;
- batched: one call gives all pieces to the copy engines. Nothing is copied twice, but
  each piece has a cost, so small ones are slow;
- single: one call per piece, for few and large pieces.

Pieces are counted after adjacent ones are merged: contiguous blocks make fewer and
larger pieces.

Measuring takes some tens of milliseconds of copies, and up to 2 s for the first
compilation of the kernels, which Triton caches on disk. Processes of one installation
measure one at a time: workers that start together would share the link's bandwidth
while they measure it, and each would compile the same kernels.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from math import exp, log
from statistics import median
from time import monotonic, perf_counter, sleep
from typing import IO

import numpy as np

from kvcore.cuda.copy_plan import I64, PartRows
from kvcore.cuda.device_interface import Device
from kvcore.cuda.kernel_launches import Kernels, NoKernels, RowCopy
from kvcore.cuda.staging import StagingBuffer, StagingPool
from kvcore.status import CopyRates, DeviceRates, PieceRate

KERNEL_PRICE = 1.1
"""Factor on staged times: kernels take SMs from the model, copy engines do not."""


class CopyMethod(StrEnum):
    """How the bytes of a call are copied."""

    SINGLE = "single"
    BATCHED = "batched"
    STAGED = "staged"


def choose_method(
    rates: CopyRates,
    num_bytes: int,
    num_pieces: int,
    *,
    row_bytes: int,
    word: int,
    can_stage: bool = True,
) -> CopyMethod:
    """Return the method with the shortest expected time.

    `num_pieces` counts merged pieces. A kernel copies rows of `row_bytes` contiguous
    bytes in words of `word` bytes; its rates were measured with words of 16.
    """
    link = num_bytes / rates.link_bytes_s
    batched = num_bytes / speed(rates.batched, num_bytes / max(num_pieces, 1))
    times = {
        CopyMethod.SINGLE: rates.start_s + max(num_pieces * rates.call_s, link),
        CopyMethod.BATCHED: rates.start_s + max(batched, link),
    }
    if can_stage:
        kernels = num_bytes / speed(rates.kernels, row_bytes) * 16 / word
        staged = rates.staged_start_s + max(kernels, link)
        times[CopyMethod.STAGED] = KERNEL_PRICE * staged
    return min(times, key=times.__getitem__)


def speed(rates: Sequence[PieceRate], piece_bytes: float) -> float:
    """Return the rate, in bytes per second, for a piece's size.

    Interpolated between measured sizes on logarithmic scales, constant beyond them.
    """
    sizes = [log(rate.piece_bytes) for rate in rates]
    speeds = [log(rate.bytes_s) for rate in rates]
    return exp(float(np.interp(log(max(piece_bytes, 1)), sizes, speeds)))


BATCHED_BYTES = (4096, 16384, 65536, 262144, 1 << 20)
ROW_BYTES = (1024, 4096, 32768)
MAX_PIECES = 1024
"""Most pieces of one timed batch."""
SMALL_BYTES = 4096
NUM_CALLS = 64
REPEATS = 3
TURN_S, TURN_PAUSE_S = 10.0, 0.01
"""Longest wait for other processes that measure, and the pause between two tries."""


def measure(device: Device, kernels: Kernels, staging: StagingPool) -> DeviceRates:
    """Return the rates of every copy method, measured in both directions."""
    begun = perf_counter()
    with _turn(), staging.buffer() as buffer, ExitStack() as stack:
        host = device.allocate_host(buffer.sizes.slot_bytes)
        stack.callback(device.free_host, host)
        bench = _Bench(device, kernels, buffer, host)
        stack.callback(bench.close)
        to_host, to_device = bench.rates(to_host=True), bench.rates(to_host=False)
    return DeviceRates(to_host, to_device, measured_s=perf_counter() - begun)


@contextmanager
def _turn() -> Iterator[None]:
    """Wait until no other process measures, for `TURN_S` seconds at most."""
    give_up = monotonic() + TURN_S
    with open(__file__, "rb") as ours:
        while not _locked(ours) and monotonic() < give_up:
            sleep(TURN_PAUSE_S)
        yield


def _locked(file: IO[bytes]) -> bool:
    """Return whether this process has the lock; true where files have no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


class _Bench:
    """Timed copies. One slot of a buffer stands for the cache, the other is staging."""

    def __init__(
        self, device: Device, kernels: Kernels, buffer: StagingBuffer, host: int
    ) -> None:
        self._kernels = kernels
        self._buffer = buffer
        self._cache, self._staging = buffer.slots
        self._host = host
        self._slot_bytes = buffer.sizes.slot_bytes
        self._stream = device.stream()
        self._event = device.event()
        self._noise = np.random.default_rng(0)

    def close(self) -> None:
        """Destroy stream and event."""
        self._stream.close()
        self._event.close()

    def rates(self, *, to_host: bool) -> CopyRates:
        """Measure one direction; without kernels, their rates stay empty."""
        has_kernels = not isinstance(self._kernels, NoKernels)
        sides = (self._host, self._cache) if to_host else (self._cache, self._host)
        start_s = self._timed(lambda: self._stream.copy(*sides, SMALL_BYTES))
        link_s = self._timed(lambda: self._stream.copy(*sides, self._slot_bytes))
        calls_s = self._timed(lambda: self._call(*sides))
        return CopyRates(
            link_bytes_s=self._slot_bytes / link_s,
            start_s=start_s,
            call_s=calls_s / NUM_CALLS,
            staged_start_s=self._staged_start_s(*sides, to_host=to_host)
            if has_kernels
            else 0.0,
            batched=tuple(
                self._batched(size, *sides)
                for size in BATCHED_BYTES
                if size <= self._slot_bytes
            ),
            kernels=tuple(
                self._kernel(size, start_s, to_host=to_host)
                for size in ROW_BYTES
                if has_kernels and size <= self._slot_bytes
            ),
        )

    def _timed(self, enqueue: Callable[[], None]) -> float:
        """Return the median time from a call to the end of its work, after one run."""
        taken = []
        for _ in range(REPEATS + 1):
            begun = perf_counter()
            enqueue()
            self._wait()
            taken.append(perf_counter() - begun)
        return median(taken[1:])

    def _wait(self) -> None:
        self._stream.record(self._event)
        self._event.wait()

    def _call(self, destination: int, source: int) -> None:
        for _ in range(NUM_CALLS):
            self._stream.copy(destination, source, SMALL_BYTES)

    def _batched(self, size: int, destination: int, source: int) -> PieceRate:
        count = min(self._slot_bytes // size, MAX_PIECES)
        at = np.arange(count, dtype=np.int64) * size
        scattered: I64 = self._noise.permutation(at)
        sizes = np.full(count, size, np.int64)
        taken = self._timed(
            lambda: self._stream.copy_many(
                at + destination, scattered + source, sizes, batched=True
            )
        )
        return PieceRate(size, count * size / taken)

    def _kernel(self, size: int, start_s: float, *, to_host: bool) -> PieceRate:
        """Time a kernel, less `start_s`: what any work takes to start and be seen."""
        count = min(self._slot_bytes // size, self._buffer.sizes.table_bytes // 8)
        task = self._row_copy(size, count, to_host=to_host)
        taken = self._timed(lambda: self._kernels.launch(self._stream, task))
        return PieceRate(size, count * size / max(taken - start_s, taken / 10))

    def _staged_start_s(self, destination: int, source: int, *, to_host: bool) -> float:
        """Time a table, a kernel and a copy, all small, one after the other."""
        task = self._row_copy(SMALL_BYTES, 1, to_host=to_host)
        table = self._buffer.write((np.zeros(SMALL_BYTES, np.uint8),))

        def staged() -> None:
            self._kernels.launch(self._stream, table)
            self._kernels.launch(self._stream, task)
            self._stream.copy(destination, source, SMALL_BYTES)

        return self._timed(staged)

    def _row_copy(self, size: int, count: int, *, to_host: bool) -> RowCopy:
        """Return a copy of `count` scattered rows, with its tables uploaded."""
        planes = np.array([self._cache], np.int64)
        ranges = np.array([[0, count * size]], np.int64)
        blocks = self._noise.permutation(count).astype(np.int32)
        table = self._buffer.write((planes, ranges, blocks))
        self._kernels.launch(self._stream, table)
        self._wait()
        rows = PartRows(1, count * size, count, 1, size, size, 0, 16)
        return RowCopy(rows, table.places, self._staging, 0, count * size, to_host)
