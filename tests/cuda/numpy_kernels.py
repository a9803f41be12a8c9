"""The kernels in plain numpy over real addresses, and as the fake device's work."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np

from kvcore.blend.key_rotation import RAW_DTYPES
from kvcore.cuda.kernel_launches import RotateLaunch, RowCopy
from kvcore.cuda.staging import FilledBuffer
from tests.cuda.fake_gpu import FakeStream, Touch, array_at


def table(address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return a table at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return array_at(address, size).view(dtype).reshape(shape)


def rows_of(move: RowCopy) -> Iterator[tuple[int, int, int]]:
    """List cache address, staging address and size of every row that is moved."""
    rows = move.rows
    planes = table(move.planes, (rows.num_planes,), np.int64).tolist()
    for number in range(move.first_plane, move.end_plane):
        part, plane = divmod(number, rows.num_planes)
        first, end = table(move.ranges + 16 * part, (2,), np.int64).tolist()
        at = move.blocks + 4 * part * rows.num_blocks
        blocks = table(at, (rows.num_blocks,), np.int32).tolist()
        for row in range(rows.num_blocks * rows.block_rows):
            block = blocks[row // rows.block_rows]
            if block < 0:
                continue
            begins, x = row * rows.row_bytes, number * rows.plane_bytes
            low = max(begins, first, move.begin - x)
            high = min(begins + rows.row_bytes, end, move.end - x)
            if low < high:
                cached = planes[plane] + block * rows.block_stride
                cached += row % rows.block_rows * rows.row_stride
                yield (
                    cached + low - begins,
                    move.staging + x + low - move.begin,
                    high - low,
                )


def gather(move: RowCopy) -> None:
    """Copy from caches to staging."""
    for cached, staged, size in rows_of(move):
        array_at(staged, size)[:] = array_at(cached, size)


def scatter(move: RowCopy) -> None:
    """Copy from staging to caches."""
    for cached, staged, size in rows_of(move):
        array_at(cached, size)[:] = array_at(staged, size)


def turn(turn: RotateLaunch) -> None:
    """Turn keys one slot and head at a time."""
    first, half = turn.rope.first_dim, turn.rope.rotary_dim // 2
    by = table(turn.factors, (half, 2), np.float64).view(np.complex128)[:, 0]
    raw = RAW_DTYPES[turn.dtype]
    for key in keys_of(turn):
        head = array_at(key, turn.rope.head_dim * raw.itemsize).view(raw)
        turned = head[first : first + 2 * half]
        ways = turned.reshape((half, 2) if turn.rope.interleaved else (2, half))
        pairs = widened(ways.T if turn.rope.interleaved else ways)
        pairs = (pairs[0] + 1j * pairs[1]) * by
        made = narrowed(np.array([pairs.real, pairs.imag]), raw)
        ways[:] = made.T if turn.rope.interleaved else made


def widened(raw: np.ndarray) -> np.ndarray:
    """Return what numbers mean, as doubles."""
    if raw.dtype == np.uint16:
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64)


def narrowed(doubles: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round by way of single precision, to nearest, ties to even."""
    singles = doubles.astype(np.float32)
    if dtype != np.uint16:
        return singles.astype(dtype)
    bits = singles.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def keys_of(turn: RotateLaunch) -> Iterator[int]:
    """List the addresses of the heads that turn."""
    head_bytes = turn.rope.head_dim * RAW_DTYPES[turn.dtype].itemsize
    for plane in table(turn.planes, (turn.num_planes,), np.int64).tolist():
        for block in range(turn.first_block, turn.end_block):
            for slot in range(turn.block_slots):
                for head in range(turn.num_heads):
                    yield (
                        plane
                        + block * turn.block_stride
                        + slot * turn.slot_stride
                        + head * head_bytes
                    )


class PlainKernels:
    """`Kernels` of the fake device: its work runs when the fake says so."""

    def upload(self, stream: FakeStream, written: FilledBuffer) -> None:  # noqa: D102
        size = written.num_bytes
        stream.call(
            lambda: ctypes.memmove(written.on_device, written.on_host, size),
            [Touch(written.on_device, size), Touch(written.on_host, size)],
        )

    def gather(self, stream: FakeStream, move: RowCopy) -> None:  # noqa: D102
        self._move(stream, gather, move)

    def scatter(self, stream: FakeStream, move: RowCopy) -> None:  # noqa: D102
        self._move(stream, scatter, move)

    def turn(self, stream: FakeStream, keys: RotateLaunch) -> None:  # noqa: D102
        tables = [
            Touch(keys.planes, 8 * keys.num_planes),
            Touch(keys.factors, 8 * keys.rope.rotary_dim),
        ]
        stream.call(lambda: turn(keys), tables)

    def _move(
        self, stream: FakeStream, work: Callable[[RowCopy], None], move: RowCopy
    ) -> None:
        rows = move.rows
        spans = -(-move.end // rows.part_bytes)
        touches = [
            Touch(move.planes, 8 * rows.num_planes),
            Touch(move.ranges, 16 * spans),
            Touch(move.blocks, 4 * spans * rows.num_blocks),
            Touch(move.staging, move.end - move.begin),
        ]
        stream.call(lambda: work(move), touches)
