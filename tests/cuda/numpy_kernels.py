"""The kernels in plain numpy on real addresses, and `Kernels` of the fake device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import product

import numpy as np

from kvcore.blend.key_rotation import RAW_DTYPES
from kvcore.cuda.kernel_launches import KernelTask, KeyRotation, RowCopy
from kvcore.cuda.staging import KernelTable
from tests.cuda.fake_gpu import FakeStream, Touch, array_at


def table(address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return a table at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return array_at(address, size).view(dtype).reshape(shape)


def rows_of(copy: RowCopy) -> Iterator[tuple[int, int, int]]:
    """Yield cache address, staging address and size of every row that is copied."""
    rows = copy.rows
    at_planes, at_ranges, at_blocks = copy.tables
    planes = table(at_planes, (rows.num_planes,), np.int64).tolist()
    for number in range(copy.first_plane, copy.end_plane):
        part, plane = divmod(number, rows.num_planes)
        first, end = table(at_ranges + 16 * part, (2,), np.int64).tolist()
        at = at_blocks + 4 * part * rows.num_blocks
        blocks = table(at, (rows.num_blocks,), np.int32).tolist()
        for row in range(rows.num_blocks * rows.block_rows):
            block = blocks[row // rows.block_rows]
            if block < 0:
                continue
            begins, x = row * rows.row_bytes, number * rows.plane_bytes
            low = max(begins, first, copy.begin - x)
            high = min(begins + rows.row_bytes, end, copy.end - x)
            if low < high:
                cached = planes[plane] + block * rows.block_stride
                cached += row % rows.block_rows * rows.row_stride
                yield (
                    cached + low - begins,
                    copy.staging + x + low - copy.begin,
                    high - low,
                )


def copy_rows(copy: RowCopy) -> None:
    """Copy rows from the cache to staging, or from staging to the cache."""
    for cached, staged, size in rows_of(copy):
        source, destination = (cached, staged) if copy.is_gather else (staged, cached)
        array_at(destination, size)[:] = array_at(source, size)


def rotate_keys(task: KeyRotation) -> None:
    """Rotate keys one slot and head at a time."""
    rope = task.rope
    first, half = rope.first_dim, rope.rotary_dim // 2
    factors = table(task.factors, (half, 2), np.float64).view(np.complex128)[:, 0]
    raw = RAW_DTYPES[task.layout.part.dtype]
    for key in keys_of(task):
        head = array_at(key, rope.head_dim * raw.itemsize).view(raw)
        rotary = head[first : first + 2 * half]
        parts = rotary.reshape((half, 2) if rope.interleaved else (2, half))
        pairs = widened(parts.T if rope.interleaved else parts)
        rotated = (pairs[0] + 1j * pairs[1]) * factors
        made = narrowed(np.array([rotated.real, rotated.imag]), raw)
        parts[:] = made.T if rope.interleaved else made


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


def keys_of(task: KeyRotation) -> Iterator[int]:
    """Yield the addresses of the heads that are rotated."""
    layout = task.layout
    head_bytes = task.rope.head_dim * RAW_DTYPES[layout.part.dtype].itemsize
    blocks = range(task.rotation.first_block, task.rotation.end_block)
    for plane in table(task.planes, (layout.part.num_layers,), np.int64).tolist():
        for block, slot in product(blocks, range(layout.block_size)):
            for head in range(task.num_heads):
                yield (
                    plane
                    + block * layout.block_stride
                    + slot * layout.slot_stride
                    + head * head_bytes
                )


class PlainKernels:
    """`Kernels` of the fake device, which decides when each task runs."""

    def launch(self, stream: FakeStream, task: KernelTask) -> None:
        """Queue a task with the memory that it reads and writes."""
        match task:
            case KernelTable():
                self._upload(stream, task)
            case RowCopy():
                stream.call(lambda: copy_rows(task), memory_of(task))
            case KeyRotation():
                tables = [
                    Touch(task.planes, 8 * task.layout.part.num_layers),
                    Touch(task.factors, 8 * task.rope.rotary_dim),
                ]
                stream.call(lambda: rotate_keys(task), tables)

    def _upload(self, stream: FakeStream, table: KernelTable) -> None:
        size = table.num_bytes
        stream.call(
            lambda: ctypes.memmove(table.on_device, table.on_host, size),
            [Touch(table.on_device, size), Touch(table.on_host, size)],
        )


def memory_of(copy: RowCopy) -> list[Touch]:
    """Return a copy's tables and its part of staging."""
    rows = copy.rows
    planes, ranges, blocks = copy.tables
    spans = -(-copy.end // rows.part_bytes)
    return [
        Touch(planes, 8 * rows.num_planes),
        Touch(ranges, 16 * spans),
        Touch(blocks, 4 * spans * rows.num_blocks),
        Touch(copy.staging, copy.end - copy.begin),
    ]
