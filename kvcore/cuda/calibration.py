"""Copy rates of a device, measured once, and the copy method that they make fastest.

- staged: kernels pack and unpack, and the link carries large copies. The link's own
  speed whatever the size of the pieces, but it costs kernel launches, a second pass
  through device memory, and a few SMs during the copy;
- batched: one call gives all pieces to the copy engines. Nothing is copied twice, but
  each piece has a cost, so small ones are slow;
- single: one call per piece, for few pieces that are large.

Pieces are counted after neighbours were merged: contiguous blocks make fewer and larger
pieces.

Measuring takes some tens of milliseconds of copies, and up to 2 s for the first
compilation of the kernels, which Triton caches on disk. Processes of one installation
measure one at a time: workers that start together would share the link's bandwidth
while they measure it, and each would compile the same kernels.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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
    """Return the method that is expected to end first.

    `num_pieces` counts merged pieces; `row_bytes` is a kernel's contiguous row, in
    words of `word` bytes (rates are for 16).
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
"""In one timed batch."""
SMALL_BYTES = 4096
NUM_CALLS = 64
REPEATS = 3
TURN_S, TURN_PAUSE_S = 10.0, 0.01


def measure(device: Device, kernels: Kernels, staging: StagingPool) -> DeviceRates:
    """Time every copy method in both directions, on memory allocated for it."""
    begun = perf_counter()
    slot_bytes = staging.sizes.slot_bytes
    with _turn(), staging.buffer() as buffer, _host(device, slot_bytes) as host:
        bench = _Bench(device, kernels, buffer, host)
        with closing(bench):
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
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _host(device: Device, num_bytes: int) -> Iterator[int]:
    address = device.allocate_host(num_bytes)
    try:
        yield address
    finally:
        device.free_host(address)


class _Bench:
    """Copies with one slot in the role of the cache, the other as staging."""

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
                self._kernel(size, start_s, gather=to_host)
                for size in ROW_BYTES
                if has_kernels and size <= self._slot_bytes
            ),
        )

    def _timed(self, enqueue: Callable[[], None]) -> float:
        """Return the median time until a stream's work is seen done, once warm."""
        taken = []
        for _ in range(REPEATS + 1):
            begun = perf_counter()
            enqueue()
            self._stream.record(self._event)
            self._event.wait()
            taken.append(perf_counter() - begun)
        return median(taken[1:])

    def _call(self, destination: int, source: int) -> None:
        for _ in range(NUM_CALLS):
            self._stream.copy(destination, source, SMALL_BYTES)

    def _batched(self, size: int, destination: int, source: int) -> PieceRate:
        count = min(self._slot_bytes // size, MAX_PIECES)
        at = np.arange(count, dtype=np.int64) * size
        scattered: I64 = self._noise.permutation(at)
        sizes = np.full(count, size, np.int64)
        taken = self._timed(
            lambda: self._stream.copy_many(at + destination, scattered + source, sizes)
        )
        return PieceRate(size, count * size / taken)

    def _kernel(self, size: int, start_s: float, *, gather: bool) -> PieceRate:
        """Time a kernel alone, without what any work takes to start and be seen."""
        count = min(self._slot_bytes // size, self._buffer.sizes.table_bytes // 8)
        move = self._move(size, count)
        run = self._kernels.gather if gather else self._kernels.scatter
        taken = self._timed(lambda: run(self._stream, move))
        return PieceRate(size, count * size / max(taken - start_s, taken / 10))

    def _staged_start_s(self, destination: int, source: int, *, to_host: bool) -> float:
        """Time a table, a kernel and a copy, all small, one after the other."""
        move = self._move(SMALL_BYTES, 1)
        table = self._buffer.write((np.zeros(SMALL_BYTES, np.uint8),))
        run = self._kernels.gather if to_host else self._kernels.scatter

        def staged() -> None:
            self._kernels.upload(self._stream, table)
            run(self._stream, move)
            self._stream.copy(destination, source, SMALL_BYTES)

        return self._timed(staged)

    def _move(self, size: int, count: int) -> RowCopy:
        """Return a kernel's work on `count` scattered rows, its table uploaded."""
        planes = np.array([self._cache], np.int64)
        ranges = np.array([[0, count * size]], np.int64)
        blocks = self._noise.permutation(count).astype(np.int32)
        table = self._buffer.write((planes, ranges, blocks))
        self._kernels.upload(self._stream, table)
        self._stream.record(self._event)
        self._event.wait()
        rows = PartRows(1, count * size, count, 1, size, size, 0, 16)
        at_planes, at_ranges, at_blocks = table.places
        return RowCopy(
            rows, at_planes, at_ranges, at_blocks, self._staging, 0, count * size
        )
