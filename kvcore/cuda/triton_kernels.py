"""Triton programs: copies of rows between a paged cache and staging, key rotation.

Every argument is an integer: an address, a size or a count. So a program needs no
tensors and no torch, is compiled without a GPU and launched by the driver alone, and
Triton's interpreter runs it on host addresses. `kernel_launches` documents the
arguments.

A thread reads 16 bytes at once where the addresses allow it, and four such words of one
piece before it writes the first: to compute a piece's address costs more than to copy
16 bytes of it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


def _copy_name(made):
    """Return the name of a row copy; profilers and the stub of the driver read it."""
    return "kvcore_gather" if made.constants["gather"] else "kvcore_scatter"


def _rotation_name(made):
    order = "pairs" if made.constants["interleaved"] else "halves"
    return f"kvcore_rotate_{order}_{made.constants['dtype']}"


def _upload(
    destination,
    source,
    num_words,
    words: tl.constexpr,
    programs: tl.constexpr,
):
    """Copy words of 8 bytes."""
    source = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
    destination = tl.multiple_of(destination.to(tl.pointer_type(tl.int64)), 16)
    for start in range(tl.program_id(0) * words, num_words, programs * words):
        at = start + tl.arange(0, words)
        value = tl.load(source + at, mask=at < num_words)
        tl.store(destination + at, value, mask=at < num_words)


def _copy_rows(
    planes,
    ranges,
    blocks,
    staging,
    skip,
    length,
    plane_bytes,
    block_stride,
    row_stride,
    row_bytes,
    first_plane,
    end_plane,
    num_planes,
    num_blocks,
    block_rows,
    gather: tl.constexpr,
    word: tl.constexpr,
    loads: tl.constexpr,
    pieces: tl.constexpr,
    words: tl.constexpr,
    programs: tl.constexpr,
):
    """Copy pieces of `loads * words` words each, `pieces` of them at a time."""
    item: tl.constexpr = word if word < 16 else 8
    items: tl.constexpr = word // item
    step: tl.constexpr = words * items
    piece_bytes: tl.constexpr = loads * words * word
    pointer: tl.constexpr = tl.pointer_type(
        tl.int64 if item == 8 else tl.int32 if item == 4 else tl.int8
    )
    row_pieces = ((row_bytes + piece_bytes - 1) // piece_bytes).to(tl.int32)
    num_rows = num_blocks * block_rows
    num_pieces = (end_plane - first_plane) * num_rows * row_pieces
    for start in range(tl.program_id(0) * pieces, num_pieces, programs * pieces):
        number = start + tl.arange(0, pieces)
        row = number // row_pieces % num_rows
        plane = number // row_pieces // num_rows
        part = (first_plane + plane) // num_planes
        block_at = (part * num_blocks + row // block_rows).to(tl.int64) * 4
        block = tl.load(
            (blocks + block_at).to(tl.pointer_type(tl.int32)),
            mask=number < num_pieces,
            other=-1,
        )
        live = block >= 0
        plane_at = ((first_plane + plane) % num_planes).to(tl.int64) * 8
        base = tl.load(
            (planes + plane_at).to(tl.pointer_type(tl.int64)), mask=live, other=0
        )
        range_at = (ranges + part.to(tl.int64) * 16).to(tl.pointer_type(tl.int64))
        first = tl.load(range_at, mask=live, other=0)
        end = tl.load(range_at + 1, mask=live, other=0)
        # Bounds of the bytes to copy, counted from the piece's first byte: they are in
        # the span's range and in this stretch of staging.
        begins = (number % row_pieces).to(tl.int64) * piece_bytes
        inside = row.to(tl.int64) * row_bytes + begins
        staged = plane.to(tl.int64) * plane_bytes - skip + inside
        low = tl.maximum(tl.maximum(first - inside, -staged), 0)
        high = tl.minimum(tl.minimum(end - inside, length - staged), row_bytes - begins)
        low = tl.multiple_of((low // item).to(tl.int32), items)[:, None]
        high = tl.where(live, high // item, 0).to(tl.int32)
        high = tl.multiple_of(high, items)[:, None]
        cached = (
            base
            + block.to(tl.int64) * block_stride
            + (row % block_rows).to(tl.int64) * row_stride
            + begins
        )
        here = tl.multiple_of(cached.to(pointer), word)[:, None]
        there = tl.multiple_of((staging + staged).to(pointer), word)[:, None]
        if not gather:
            here, there = there, here
        at = tl.arange(0, step)[None, :]
        keep = (at >= low) & (at < high)
        value = tl.load(here + at, mask=keep)
        if loads == 4:
            at1, at2, at3 = at + step, at + 2 * step, at + 3 * step
            keep1 = (at1 >= low) & (at1 < high)
            keep2 = (at2 >= low) & (at2 < high)
            keep3 = (at3 >= low) & (at3 < high)
            value1 = tl.load(here + at1, mask=keep1)
            value2 = tl.load(here + at2, mask=keep2)
            value3 = tl.load(here + at3, mask=keep3)
            tl.store(there + at1, value1, mask=keep1)
            tl.store(there + at2, value2, mask=keep2)
            tl.store(there + at3, value3, mask=keep3)
        tl.store(there + at, value, mask=keep)


def _rotate_keys(
    planes,
    factors,
    block_stride,
    slot_stride,
    first_block,
    end_block,
    num_planes,
    block_slots,
    num_heads,
    head_dim,
    first_dim,
    num_pairs,
    interleaved: tl.constexpr,
    dtype: tl.constexpr,
    heads: tl.constexpr,
    pairs: tl.constexpr,
    programs: tl.constexpr,
):
    """Multiply each pair of elements by its complex factor, in double precision."""
    element: tl.constexpr = (
        tl.float32 if dtype == "float32"
        else tl.bfloat16 if dtype == "bfloat16" else tl.float16
    )  # fmt: skip
    pair = tl.arange(0, pairs)
    known = pair < num_pairs
    by = (factors + pair.to(tl.int64) * 16).to(tl.pointer_type(tl.float64))
    cos = tl.load(by, mask=known, other=1.0)[None, :]
    sin = tl.load(by + 1, mask=known, other=0.0)[None, :]
    apart = 1 if interleaved else num_pairs
    real_at = first_dim + (2 * pair if interleaved else pair)[None, :]
    num_units = (end_block - first_block) * block_slots
    num_all = num_planes * num_units * num_heads
    for start in range(tl.program_id(0) * heads, num_all, programs * heads):
        number = start + tl.arange(0, heads)
        live = number < num_all
        head = number % num_heads
        unit = number // num_heads % num_units
        plane_at = (number // num_heads // num_units).to(tl.int64) * 8
        base = tl.load(
            (planes + plane_at).to(tl.pointer_type(tl.int64)), mask=live, other=0
        )
        key = (
            base
            + (first_block + unit // block_slots).to(tl.int64) * block_stride
            + (unit % block_slots).to(tl.int64) * slot_stride
            + (head * head_dim).to(tl.int64) * (element.primitive_bitwidth // 8)
        )
        real = key.to(tl.pointer_type(element))[:, None] + real_at
        keep = live[:, None] & known[None, :]
        a = tl.load(real, mask=keep, other=0.0).to(tl.float64)
        b = tl.load(real + apart, mask=keep, other=0.0).to(tl.float64)
        rotated_a, rotated_b = a * cos - b * sin, a * sin + b * cos
        tl.store(real, rotated_a.to(tl.float32).to(element), mask=keep)
        tl.store(real + apart, rotated_b.to(tl.float32).to(element), mask=keep)


KERNELS = {
    "upload": triton.jit(_upload, repr=lambda _: "kvcore_upload"),
    "copy_rows": triton.jit(_copy_rows, repr=_copy_name),
    "rotate_keys": triton.jit(_rotate_keys, repr=_rotation_name),
}
"""The programs by the names in `kvcore.cuda.kernel_launches`."""
