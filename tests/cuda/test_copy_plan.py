"""Byte ranges of a copy plan, and its division into loads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcore.cuda.copy_plan import ByteRanges, CopyPlan, PartRows, both
from kvcore.cuda.cuda_cache import FIRST_BYTES, GROWTH, cuts, loads
from tests.copy.chunk_spans import stack_spans
from tests.copy.test_host_cache import Move, moves
from tests.cuda.layout_cases import LAYOUTS, job

MIB = 1 << 20
LINE = 60


@st.composite
def byte_ranges(draw: st.DrawFn) -> ByteRanges:
    """Ranges of a line of 60 bytes, at any addresses."""
    edges = sorted(draw(st.sets(st.integers(0, LINE), min_size=2, max_size=12)))
    pairs = list(pairwise(edges))[:: draw(st.integers(1, 2))]
    at = [draw(st.integers(0, 3)) * 100 + start for start, _ in pairs]
    starts, ends = zip(*pairs, strict=True)
    return ByteRanges(*(np.array(one, np.int64) for one in (starts, ends, at)))


def places(one: ByteRanges) -> dict[int, int]:
    """Return the address of every byte of the line."""
    each = zip(one.starts.tolist(), one.ends.tolist(), one.at.tolist(), strict=True)
    return {start + n: at + n for start, end, at in each for n in range(end - start)}


@given(byte_ranges())
def test_joined_ranges_have_the_same_bytes(one: ByteRanges) -> None:
    """No address changes, and ranges adjacent on both sides are merged."""
    joined = one.joined()
    assert places(joined) == places(one)
    again = joined.joined()
    assert len(again) == len(joined) <= len(one)


@given(byte_ranges(), st.integers(0, LINE), st.integers(0, LINE))
def test_a_cut_has_the_bytes_within_it(one: ByteRanges, begin: int, end: int) -> None:
    """Ranges are clipped at the cut's ends."""
    begin, end = sorted((begin, end))
    expected = {x: at for x, at in places(one).items() if begin <= x < end}
    assert places(one.cut(begin, end)) == expected


@given(byte_ranges(), byte_ranges())
def test_pieces_are_the_common_bytes(a: ByteRanges, b: ByteRanges) -> None:
    """A byte of both sides is in exactly one piece, any other in none."""
    here, there = places(a), places(b)
    pieces = both(a, b)
    got = [
        (start + n, other + n)
        for start, other, size in zip(
            pieces.here.tolist(), pieces.there.tolist(), pieces.sizes.tolist(),
            strict=True,
        )
        for n in range(size)
    ]  # fmt: skip
    assert sorted(got) == sorted((here[x], there[x]) for x in here.keys() & there)


@given(
    total=st.integers(1, 200).map(lambda n: n * MIB),
    step=st.sampled_from([1, 16, 4096, 3 * MIB, 20 * MIB]),
    slot=st.sampled_from([4 * MIB, 16 * MIB]),
)
def test_cuts_grow_until_slots_are_full(total: int, step: int, slot: int) -> None:
    """Cuts are multiples of the step; no load exceeds a slot that a step fits."""
    made = cuts(total, step, slot)
    assert (made[0], made[-1]) == (0, total)
    sizes = [end - begin for begin, end in pairwise(made)]
    assert min(sizes) > 0
    assert max(sizes) <= max(slot, step)
    assert all(place % step == 0 for place in made[:-1])
    for before, size in pairwise(sizes[:-1]):
        assert before <= size <= GROWTH * max(before, step) + step
    assert sizes[0] <= max(FIRST_BYTES, step)


def plan_of(move: Move) -> CopyPlan:
    """Return a plan for made-up addresses."""
    layout = move.case.layout
    planes = layout.plane_offsets + 4096
    rows = PartRows.of(layout, planes)
    spans = stack_spans(move.spans)
    spans.check(layout, nulls=True)
    return CopyPlan.of(layout, rows, planes, spans, 1 << 40)


@given(moves(), st.integers(1, 300), st.booleans())
def test_loads_have_every_byte_once(move: Move, slot: int, backwards: bool) -> None:
    """All loads together have the plan's arena ranges, and each fits a slot."""
    plan = plan_of(move)
    assume(plan.num_bytes)
    slot = max(slot // plan.rows.word, 1) * plan.rows.word
    made = loads(plan, slot, backwards=backwards)
    assert all(load.end - load.begin <= slot for load in made)
    assert all(load.begin % plan.rows.word == 0 for load in made)
    expected = places(plan.extents)
    parts = [places(load.extents) for load in made]
    assert sum(map(len, parts)) == len(expected)
    assert {x: at for part in parts for x, at in part.items()} == expected


def test_small_loads_are_where_the_link_is_idle() -> None:
    """A gather begins with small loads, a scatter ends with them."""
    move = job("block first", "bfloat16", seed=1)
    plan = plan_of(move)
    sizes = [
        [load.end - load.begin for load in loads(plan, 1 << 20, backwards=backwards)]
        for backwards in (False, True)
    ]
    assert sizes[0] == sizes[1][::-1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_adjacent_blocks_are_one_piece(name: str) -> None:
    """Consecutive blocks are one piece per plane if contiguous in the cache."""
    move = job(name, "bfloat16", seed=1)
    whole = move.spans[0]
    whole.blocks[:] = np.arange(len(whole.blocks)) + 2
    plan = plan_of(Move(move.case, [whole], [], move.arena_bytes, 0))
    rows = plan.rows
    is_contiguous = rows.block_stride == rows.row_bytes
    pieces = 1 if is_contiguous else rows.num_blocks * rows.block_rows
    assert plan.num_pieces == pieces * rows.num_planes
    assert plan.num_bytes == move.case.layout.part.num_bytes
    assert plan.pieces.sizes.sum() == plan.num_bytes


def test_the_word_is_the_widest_that_divides_everything() -> None:
    """16 bytes if all addresses and strides are multiples of 16; else 4, else 1."""
    words = {name: plan_of(job(name, "uint8", 1)).rows.word for name in LAYOUTS}
    assert words["block first"] == 16
    assert words["padded blocks"] == 4
    assert words["blocks anywhere"] == 1
