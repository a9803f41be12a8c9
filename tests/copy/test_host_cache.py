"""Host copies against plain logical indexing, byte for byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from kvcore.copy import host_cache as host
from kvcore.copy.block_arrays import ChunkSpans
from kvcore.copy.host_cache import HostCache
from kvcore.errors import BadRequest
from kvcore.extents import Extent, buffers_of, checksum_of
from kvcore.layout import DTYPE_BYTES, CacheGroup, KVLayout, TensorView
from kvcore.protocol import NULL_BLOCK
from tests.copy.chunk_spans import ChunkSpan, stack_spans

POISON = 0xA5
NO_SPANS = ChunkSpans([], np.empty((0, 2), np.int32), np.empty((0, 2), np.int64))
"""No spans, of a cache with two blocks per chunk."""
GEOMETRIES = {
    # name: (axes, their order in memory, axes that may be padded)
    "kv-outermost": ("KNSHD", "KNSHD", "KNS"),
    "block-outermost": ("NKSHD", "NKSHD", "KNS"),
    "permuted view": ("KNSHD", "NKSHD", "KNS"),
    "kv inside a token": ("NSKHD", "NSKHD", "NSK"),
    "head-major": ("KNHSD", "KNHSD", "KN"),
    "head-major, permuted view": ("NKSHD", "NKHSD", "KN"),
    "latent": ("NSD", "NSD", "NS"),
    "across layers": ("LKNSHD", "LKNSHD", "LKNS"),
    "across layers, block-outermost": ("NLKSHD", "NLKSHD", "NLKS"),
    "blend buffer": ("KLNSD", "KLNSD", "KL"),
    "pages": ("NPPP", "NPPP", "N"),
    "pages, layers outermost": ("LNPP", "LNPP", "LN"),
    "pages, blocks outermost": ("NLPP", "NLPP", "LN"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A described cache and the sizes of its handles."""

    group: CacheGroup
    handle_bytes: list[int]
    chunk_size: int
    layout: KVLayout

    def addresses(self, blocks: list[int]) -> list[tuple[int, np.ndarray]]:
        """Return handle and byte addresses, `[units, unit bytes]`, of each plane."""
        axes, item = self.group.axes, DTYPE_BYTES[self.group.dtype]
        tensors = []
        for tensor in self.group.tensors:
            every = np.arange(self.handle_bytes[tensor.handle])[tensor.offset :]
            strides = [8 * stride for stride in (*tensor.strides, 1)]
            view = as_strided(every, (*tensor.shape, item), strides)
            inside = [i for i, a in enumerate(axes) if a in "SHDP"]
            if self.layout.part.order == "token":
                inside.remove(axes.index("S"))
            inside.sort(key=lambda i: -tensor.strides[i])
            order = [axes.index(a) for a in "KLN" if a in axes]
            if self.layout.part.order == "token":
                order.append(axes.index("S"))
            view = view.transpose([*order, *inside, len(axes)])
            for position, axis in enumerate("KL"):
                if axis not in axes:
                    view = np.expand_dims(view, position)
            tensors.append((tensor.handle, view))
        return [
            (handle, view[kv, layer][blocks].reshape(-1, self.layout.part.unit_bytes))
            for kv in range(self.layout.part.num_kv)
            for handle, view in tensors
            for layer in range(view.shape[1])
        ]

    def units(self, span: ChunkSpan) -> slice:
        """Return a span's token range in units."""
        unit = self.layout.part.unit_tokens
        return slice(span.first_token // unit, span.end_token // unit)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any cache: its shape, padding, dtype and offset in its handles."""
    axes, memory, padded = GEOMETRIES[draw(st.sampled_from(sorted(GEOMETRIES)))]
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float8_e4m3", "uint8"]))
    block_size = 1 if "L" in axes and "H" not in axes else draw(st.integers(1, 4))
    sizes = {"N": draw(st.integers(12, 20)), "K": 2, "S": block_size}
    sizes |= {"L": draw(st.integers(1, 3)), "H": draw(st.integers(1, 3))}
    shape = [sizes.get(axis) or draw(st.integers(1, 9)) for axis in axes]
    by_memory = sorted(range(len(axes)), key=lambda i: (memory.index(axes[i]), i))
    strides = [0] * len(axes)
    extent = DTYPE_BYTES[dtype]
    for i in reversed(by_memory):
        strides[i] = extent
        if axes[i] in padded and draw(st.booleans()):
            strides[i] += draw(st.integers(1, 40))
        extent = strides[i] * shape[i]
    num_tensors = 1 if "L" in axes else draw(st.integers(1, 4))
    handle_bytes: list[int] = []
    tensors = []
    for _ in range(num_tensors):
        if not handle_bytes or draw(st.booleans()):
            handle_bytes.append(draw(st.integers(0, 70)))
        tensors.append(
            TensorView(
                len(handle_bytes) - 1, handle_bytes[-1], tuple(shape), tuple(strides)
            )
        )
        handle_bytes[-1] += extent + draw(st.sampled_from([0, 0, 0, 1, 64]))
    group = CacheGroup(
        axes, dtype, block_size, tuple(tensors), "pages" if "P" in axes else "tokens"
    )
    chunk_size = block_size * draw(st.integers(1, 4))
    layout = KVLayout.derive(group, handle_bytes, chunk_size)
    return Case(group, handle_bytes, chunk_size, layout)


@dataclass(frozen=True, slots=True)
class Move:
    """A case, up to three chunks' spans in it, and as many other blocks."""

    case: Case
    spans: list[ChunkSpan]
    other_blocks: list[np.ndarray]
    arena_bytes: int
    seed: int

    def handles(self) -> list[np.ndarray]:
        """Return new random memory, the same on every call."""
        noise = np.random.default_rng(self.seed)
        return [
            noise.integers(0, 256, size, dtype=np.uint8)
            for size in self.case.handle_bytes
        ]

    def arena(self) -> np.ndarray:
        """Return a poisoned arena."""
        return np.full(self.arena_bytes, POISON, np.uint8)


@st.composite
def moves(draw: st.DrawFn, *, whole: bool = False) -> Move:
    """Spans with blocks in any order, any token range, and parts in any extents."""
    case = draw(cases())
    layout, part = case.layout, case.layout.part
    per_chunk = case.chunk_size // layout.block_size
    ids = list(range(layout.num_blocks))
    if draw(st.booleans()):
        ids = draw(st.permutations(ids))
    num_spans = min(3, layout.num_blocks // (2 * per_chunk))
    rows = [
        np.array(ids[i * per_chunk : (i + 1) * per_chunk], np.int32)
        for i in range(2 * num_spans)
    ]
    pieces = []
    for owner in range(num_spans):
        cuts = draw(st.sets(st.integers(0, part.num_bytes), max_size=4))
        edges = sorted({0, part.num_bytes, *cuts})
        pieces += [(owner, i, b - a) for i, (a, b) in enumerate(pairwise(edges))]
    placed: dict[int, list[tuple[int, Extent]]] = {i: [] for i in range(num_spans)}
    end = 0
    for owner, i, length in draw(st.permutations(pieces)):
        end += draw(st.integers(0, 9))
        placed[owner].append((i, Extent(end, length)))
        end += length
    spans = []
    for owner in range(num_spans):
        units = case.chunk_size // part.unit_tokens
        first = 0 if whole else draw(st.integers(0, units) | st.just(0))
        last = units if whole else draw(st.integers(first, units) | st.just(units))
        extents = tuple(e for _, e in sorted(placed[owner], key=lambda item: item[0]))
        first, last = first * part.unit_tokens, last * part.unit_tokens
        spans.append(ChunkSpan(extents, rows[owner], first, last))
    seed = draw(st.integers(0, 1000))
    return Move(case, spans, rows[num_spans:], end + draw(st.integers(0, 9)), seed)


def part_addresses(move: Move, span: ChunkSpan) -> np.ndarray:
    """Return arena addresses of a span's units, `[planes, units, unit bytes]`."""
    part = move.case.layout.part
    flat = np.concatenate(
        [np.arange(e.offset, e.offset + e.length) for e in span.extents]
    )
    shaped = flat.reshape(part.num_planes, -1, part.unit_bytes)
    return shaped[:, move.case.units(span)]


@given(moves())
def test_gather_is_logical_indexing(move: Move) -> None:
    """A gather writes the indexed bytes only, and does not change the cache."""
    handles, arena, expected = move.handles(), move.arena(), move.arena()
    for span in move.spans:
        there = part_addresses(move, span)
        planes = move.case.addresses(span.blocks.tolist())
        for plane, (handle, here) in enumerate(planes):
            expected[there[plane]] = handles[handle][here[move.case.units(span)]]
    HostCache(move.case.layout, handles).gather(stack_spans(move.spans), arena)
    assert np.array_equal(arena, expected)
    assert all(map(np.array_equal, handles, move.handles()))


@given(moves(), st.data())
def test_scatter_is_logical_assignment(move: Move, data: st.DataObject) -> None:
    """A scatter writes the indexed bytes only, and skips null blocks."""
    for span in move.spans:
        dropped = data.draw(st.sets(st.integers(0, len(span.blocks) - 1)) | st.just(()))
        span.blocks[list(dropped)] = NULL_BLOCK
    noise = np.random.default_rng(move.seed + 1)
    arena = noise.integers(0, 256, move.arena_bytes, dtype=np.uint8)
    handles, expected, before = move.handles(), move.handles(), arena.copy()
    for span in move.spans:
        there = part_addresses(move, span)
        units = move.case.units(span)
        real = np.repeat(
            span.blocks != NULL_BLOCK,
            move.case.layout.block_size // move.case.layout.part.unit_tokens,
        )[units]
        planes = move.case.addresses(span.blocks.tolist())
        for plane, (handle, here) in enumerate(planes):
            expected[handle][here[units][real]] = arena[there[plane][real]]
    HostCache(move.case.layout, handles).scatter(stack_spans(move.spans), arena)
    assert all(map(np.array_equal, handles, expected))
    assert np.array_equal(arena, before)


@given(moves(whole=True))
def test_gather_then_scatter_elsewhere_is_identity(move: Move) -> None:
    """Blocks gathered and scattered into others have the same bytes."""
    handles, arena = move.handles(), move.arena()
    cache = HostCache(move.case.layout, handles)
    cache.gather(stack_spans(move.spans), arena)
    targets = [
        ChunkSpan(span.extents, blocks, span.first_token, span.end_token)
        for span, blocks in zip(move.spans, move.other_blocks, strict=True)
    ]
    cache.scatter(stack_spans(targets), arena)
    for span, blocks in zip(move.spans, move.other_blocks, strict=True):
        old = move.case.addresses(span.blocks.tolist())
        new = move.case.addresses(blocks.tolist())
        for (handle, source), (_, target) in zip(old, new, strict=True):
            assert np.array_equal(handles[handle][source], handles[handle][target])


@contextmanager
def in_small_steps(num_bytes: int) -> Iterator[None]:
    """Make all copies shared, in steps and rows of a few bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "CHECKSUM_STEP", num_bytes)
        patch.setattr(host, "_MIN_ROW", 1)
        patch.setattr(host, "_SHARED_RUN", 0)
        for copy in ("_GATHER", "_SCATTER"):
            patch.setattr(host, copy, replace(getattr(host, copy), shared_bytes=0))
        yield


@given(moves(whole=True), st.integers(1, 4000))
def test_shared_copies_are_plain_ones_with_checksums(move: Move, step: int) -> None:
    """Threads, steps and split rows change no byte or checksum."""
    handles, arena, plain = move.handles(), move.arena(), move.arena()
    HostCache(move.case.layout, handles).gather(stack_spans(move.spans), plain)
    with in_small_steps(step):
        cache = HostCache(move.case.layout, handles, 3)
        checksums = cache.gather(stack_spans(move.spans), arena, checksums=True)
        for handle in handles:
            handle[:] = POISON
        cache.scatter(stack_spans(move.spans), arena)
        cache.close()
    assert np.array_equal(arena, plain)
    assert checksums == [
        checksum_of(buffers_of(arena.data, span.extents)) for span in move.spans
    ]
    there, again = move.arena(), HostCache(move.case.layout, handles)
    again.gather(stack_spans(move.spans), there)
    assert np.array_equal(there, plain)


def test_split_rows_are_the_same_rows() -> None:
    """A scatter of few rows, split to release the GIL, writes the right bytes."""
    layout = latent(8)
    arena = np.random.default_rng(1).integers(0, 256, layout.part.num_bytes, np.uint8)
    span = ChunkSpan((Extent(0, arena.size),), np.array([5, 2], np.int32), 0, 32)
    handle, back = np.full(2 * 8 * 16 * 1152, POISON, np.uint8), np.zeros_like(arena)
    with in_small_steps(1):
        HostCache(layout, [handle]).scatter(stack_spans([span]), arena)
    HostCache(layout, [handle]).gather(stack_spans([span]), back)
    assert np.array_equal(back, arena)
    others = [0, 1, 3, 4, 6, 7]
    assert (handle.reshape(2, 8, -1)[:, others] == POISON).all()


def test_checksums_are_computed_only_on_request() -> None:
    """Otherwise the list is empty."""
    layout = latent(8)
    arena = np.zeros(layout.part.num_bytes, np.uint8)
    span = ChunkSpan((Extent(0, arena.size),), np.array([0, 3], np.int32), 0, 32)
    cache = HostCache(layout, [np.ones(2 * 8 * 16 * 1152, np.uint8)])
    assert cache.gather(stack_spans([span]), arena) == []
    assert cache.gather(stack_spans([span]), arena, checksums=True) == [
        checksum_of([arena.data])
    ]


@settings(max_examples=30)
@given(st.permutations(range(16)), st.sampled_from([2, 3, 7]))
def test_layouts_with_other_block_sizes_share_parts(
    order: list[int], stride: int
) -> None:
    """A part gathered from one layout scatters into another with the same tokens."""
    wide = np.arange(2 * 16 * 3 * 8, dtype=np.uint8).reshape(2, 16, 24)
    narrow = np.zeros((16, 2, 6, stride * 4), np.uint8)
    kv_first = CacheGroup(
        "KNSD", "uint8", 4, (TensorView(0, 0, (2, 16, 4, 6), (384, 24, 6, 1)),)
    )
    s = narrow.strides
    block_first = CacheGroup(
        "NKSD",
        "uint8",
        2,
        (TensorView(0, 0, (16, 2, 2, 6), (s[0], s[1], 6 + stride, 1)),),
    )
    layouts = [
        KVLayout.derive(group, [size], 8)
        for group, size in ((kv_first, wide.size), (block_first, narrow.size))
    ]
    assert layouts[0].part.fingerprint == layouts[1].part.fingerprint
    arena = np.zeros(layouts[0].part.num_bytes, np.uint8)
    extents = (Extent(0, arena.size),)
    ids = np.array(order, np.int32)
    HostCache(layouts[0], [wide.reshape(-1)]).gather(
        stack_spans([ChunkSpan(extents, ids[:2], 0, 8)]), arena
    )
    HostCache(layouts[1], [narrow.reshape(-1)]).scatter(
        stack_spans([ChunkSpan(extents, ids[2:6], 0, 8)]), arena
    )
    tokens = as_strided(narrow, (16, 2, 2, 6), (s[0], s[1], 6 + stride, 1))
    got = tokens[ids[2:6]].transpose(1, 0, 2, 3).reshape(2, 8, 6)
    assert np.array_equal(got, wide.reshape(2, 16, 4, 6)[:, ids[:2]].reshape(2, 8, 6))


def latent(num_blocks: int, block_size: int = 16, chunk_size: int = 32) -> KVLayout:
    """Return a layout of two MLA layers of 1,152-byte tokens in one handle."""
    size = num_blocks * block_size * 1152
    shape, strides = (num_blocks, block_size, 576), (block_size * 1152, 1152, 2)
    tensors = tuple(TensorView(0, i * size, shape, strides) for i in range(2))
    group = CacheGroup("NSD", "bfloat16", block_size, tensors)
    return KVLayout.derive(group, [2 * size], chunk_size)


@pytest.mark.parametrize("way", ["gather", "scatter"])
@pytest.mark.parametrize(
    ("blocks", "first", "end", "message"),
    [
        ([1, 8], 0, 32, "block 8: the cache has blocks 0 to 7"),
        ([1, -2], 0, 32, "block -2"),
        ([1], 0, 32, "1 blocks for a chunk of 2"),
        ([1, 2], 0, 33, "token 33 of a chunk of 32"),
        ([1, 2], 8, 4, "no range"),
        ([1, 2], -1, 4, "no range"),
    ],
)
def test_bad_spans_copy_nothing(
    way: str, blocks: list[int], first: int, end: int, message: str
) -> None:
    """A wrong id or range in the last span is refused before any copy."""
    layout = latent(8)
    size = layout.part.num_bytes
    handles = [np.zeros(math.prod((2, 8, 16, 1152)), np.uint8)]
    arena = np.full(2 * size, POISON, np.uint8)
    ids = np.array([0, 3][: len(blocks)], np.int32)
    good = ChunkSpan((Extent(0, size),), ids, 0, 32)
    bad = ChunkSpan((Extent(size, size),), np.array(blocks, np.int32), first, end)
    with pytest.raises(BadRequest, match=message):
        getattr(HostCache(layout, handles), way)(stack_spans([good, bad]), arena)
    assert not handles[0].any()
    assert (arena == POISON).all()


def test_gathering_a_null_block_is_refused() -> None:
    """A null block has no content to store."""
    layout = latent(8)
    size = layout.part.num_bytes
    span = ChunkSpan((Extent(0, size),), np.array([2, NULL_BLOCK], np.int32), 0, 32)
    cache = HostCache(layout, [np.zeros(2 * 8 * 16 * 1152, np.uint8)])
    with pytest.raises(BadRequest, match="null block"):
        cache.gather(stack_spans([span]), np.zeros(size, np.uint8))


def test_block_zero_after_a_null_block_is_written() -> None:
    """Ids -1 and 0 are consecutive but not a run."""
    layout = latent(8)
    arena = np.full(layout.part.num_bytes, POISON, np.uint8)
    handle = np.zeros(2 * 8 * 16 * 1152, np.uint8)
    span = ChunkSpan(
        (Extent(0, arena.size),), np.array([NULL_BLOCK, 0], np.int32), 0, 32
    )
    HostCache(layout, [handle]).scatter(stack_spans([span]), arena)
    written = handle.reshape(2, 8, -1) == POISON
    assert written[:, 0].all()
    assert not written[:, 1:].any()


@pytest.mark.parametrize("way", ["gather", "scatter"])
def test_no_spans_are_no_work(way: str) -> None:
    """A request whose chunks are all present copies nothing."""
    handle = np.zeros(2 * 8 * 16 * 1152, np.uint8)
    getattr(HostCache(latent(8), [handle]), way)(NO_SPANS, np.zeros(8, np.uint8))
    assert not handle.any()


def test_handles_smaller_than_described_are_refused_at_construction() -> None:
    """The constructor makes no view past a handle's end."""
    with pytest.raises((TypeError, ValueError)):
        HostCache(latent(8), [np.zeros(1152, np.uint8)])
