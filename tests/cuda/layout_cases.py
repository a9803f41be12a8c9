"""Every layout and dtype of a cache, and the expected results of its copies.

Used with Triton's interpreter and on a GPU. Expected bytes come from plain indexing by
the tensors' axes (`Case.addresses`), not from any code that copies.
"""

from __future__ import annotations

import numpy as np

from kvcore.extents import Extent
from kvcore.layout import DTYPE_BYTES, CacheGroup, KVLayout, TensorView
from kvcore.protocol import NULL_BLOCK
from tests.copy.chunk_spans import ChunkSpan
from tests.copy.test_host_cache import Case, Move, part_addresses

DTYPES = tuple(DTYPE_BYTES)
LAYOUTS = {
    # name: (axes, their order in memory, tensors, handles, bytes between blocks)
    "K and V first": ("KNSHD", "KNSHD", 3, 3, 0),
    "block first": ("NKSHD", "NKSHD", 3, 3, 0),
    "permuted view": ("KNSHD", "NKSHD", 3, 3, 0),
    "K and V inside a token": ("NSKHD", "NSKHD", 3, 3, 0),
    "heads first": ("KNHSD", "KNHSD", 3, 3, 0),
    "heads first, block first": ("NKHSD", "NKHSD", 3, 3, 0),
    "views of one storage": ("KNSHD", "KNSHD", 3, 1, 0),
    "padded blocks": ("NKSHD", "NKSHD", 3, 1, 20),
    "blocks anywhere": ("NKSHD", "NKSHD", 3, 1, 9),
    "latent": ("NSD", "NSD", 3, 3, 0),
    "across layers": ("LKNSHD", "LKNSHD", 1, 1, 0),
    "across layers, block first": ("NLKSHD", "NLKSHD", 1, 1, 0),
    "blend buffer": ("KLNSD", "KLNSD", 1, 1, 0),
    "pages": ("NPP", "NPP", 3, 3, 0),
    "pages across layers": ("NLP", "NLP", 1, 1, 0),
}
POISON = 0xA5


def case(name: str, dtype: str, *, num_blocks: int = 24, width: int = 16) -> Case:
    """Return a cache of 3 layers and 2 heads, blocks of 4 and chunks of 16 tokens.

    A head has `width` elements, so that pieces have some tens of bytes.
    """
    axes, memory, num_tensors, num_handles, gap = LAYOUTS[name]
    block_size = 1 if name == "blend buffer" else 4
    sizes = {"K": 2, "L": 3, "N": num_blocks * 4 // block_size, "S": block_size}
    sizes |= {"H": 2, "D": width, "P": width}
    shape = tuple(sizes[axis] for axis in axes)
    strides = [0] * len(axes)
    extent = DTYPE_BYTES[dtype]
    for axis in reversed(memory if "P" not in axes else axes):
        place = len(axes) - 1 - axes[::-1].index(axis)
        while strides[place]:
            place -= 1
        strides[place] = extent + (gap if axis == "N" else 0)
        extent = strides[place] * shape[place]
    per_handle = num_tensors // num_handles
    tensors = tuple(
        TensorView(n // per_handle, n % per_handle * extent, shape, tuple(strides))
        for n in range(num_tensors)
    )
    kind = "pages" if "P" in axes else "tokens"
    group = CacheGroup(axes, dtype, block_size, tensors, kind)
    handles = [per_handle * extent] * num_handles
    return Case(group, handles, 16, KVLayout.derive(group, handles, 16))


def job(name: str, dtype: str, seed: int, width: int = 16) -> Move:
    """Return three chunks in random blocks, their parts in two extents each.

    One is copied whole, the others without their first or their last block.
    """
    one = case(name, dtype, width=width)
    layout, noise = one.layout, np.random.default_rng(seed)
    per_chunk = 16 // layout.block_size
    ids = noise.permutation(layout.num_blocks).astype(np.int32)
    rows = [ids[n * per_chunk : (n + 1) * per_chunk] for n in range(6)]
    size = layout.part.num_bytes
    cut = int(noise.integers(1, size))
    spans = [
        ChunkSpan(
            (Extent(n * size, cut), Extent((3 + n) * size + 7, size - cut)),
            rows[n],
            first,
            end,
        )
        for n, (first, end) in enumerate([(0, 16), (4, 16), (0, 12)])
    ]
    return Move(one, spans, rows[3:], 6 * size + 7, seed)


def gathered(move: Move) -> np.ndarray:
    """Return the expected arena after a gather into a poisoned one."""
    handles, arena = move.handles(), move.arena()
    for span in move.spans:
        there, units = part_addresses(move, span), move.case.units(span)
        for plane, (handle, here) in enumerate(
            move.case.addresses(span.blocks.tolist())
        ):
            arena[there[plane]] = handles[handle][here[units]]
    return arena


def with_nulls(move: Move) -> Move:
    """Return the move with the second block of every span null."""
    for span in move.spans:
        span.blocks[1] = NULL_BLOCK
    return move


def scattered(move: Move, arena: np.ndarray) -> list[np.ndarray]:
    """Return the expected handles after a scatter."""
    handles = move.handles()
    block_size = move.case.layout.block_size
    unit_tokens = move.case.layout.part.unit_tokens
    for span in move.spans:
        there, units = part_addresses(move, span), move.case.units(span)
        real = np.repeat(span.blocks != NULL_BLOCK, block_size // unit_tokens)[units]
        for plane, (handle, here) in enumerate(
            move.case.addresses(span.blocks.tolist())
        ):
            handles[handle][here[units][real]] = arena[there[plane][real]]
    return handles


def arena_of(move: Move) -> np.ndarray:
    """Return an arena of random bytes."""
    noise = np.random.default_rng(move.seed + 1)
    return noise.integers(0, 256, move.arena_bytes, dtype=np.uint8)


def places_apart(got: np.ndarray, expected: np.ndarray, dtype: str) -> np.ndarray:
    """Return the distance of each pair in units in the last place; signs are equal."""
    bits = f"i{DTYPE_BYTES[dtype]}"
    return np.abs(got.view(bits).astype(np.int64) - expected.view(bits))


def numbers(move: Move) -> list[np.ndarray]:
    """Return handles of normally distributed numbers of the case's dtype."""
    noise = np.random.default_rng(move.seed)
    dtype = move.case.group.dtype
    handles = []
    for size in move.case.handle_bytes:
        values = noise.normal(size=size // DTYPE_BYTES[dtype])
        if dtype == "bfloat16":
            bits = values.astype(np.float32).view(np.uint32) >> 16
            handles.append(bits.astype(np.uint16).view(np.uint8))
        else:
            handles.append(values.astype(dtype).view(np.uint8))
    return handles
