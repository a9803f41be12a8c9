"""Which way a copy takes, by rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.status import PieceRate
from kvcore.transport.cuda.ways import Way, choose, speed
from tests.transport.cuda.rig import published

MIB = 1 << 20
CHUNK = 32 * MIB
RATES = published().to_host


@pytest.mark.parametrize(
    ("num_bytes", "piece", "expected"),
    [
        (8 * CHUNK, 4096, Way.STAGED),
        (8 * CHUNK, 24576, Way.STAGED),
        (CHUNK, 8192, Way.STAGED),
        (8 * CHUNK, 2 * MIB, Way.SINGLE),
        (8 * CHUNK, 32 * MIB, Way.SINGLE),
        (2 * MIB, 1 * MIB, Way.SINGLE),
        (65536, 4096, Way.BATCHED),
    ],
)
def test_published_rates_choose_what_was_published(
    num_bytes: int, piece: int, expected: Way
) -> None:
    """Small pieces of much are staged, large ones copied, little is handed over."""
    assert choose(RATES, num_bytes, num_bytes // piece, row_bytes=piece, word=16) is (
        expected
    )


def test_pieces_between_are_batched() -> None:
    """Where the copy engines keep up with the link, kernels are not worth their SMs."""
    way = choose(RATES, 8 * CHUNK, 8 * CHUNK // 262144, row_bytes=262144, word=16)
    assert way in (Way.BATCHED, Way.SINGLE)


def test_merged_neighbours_need_no_kernels() -> None:
    """The same rows go straight when runs of them lie together."""
    scattered = choose(RATES, 8 * CHUNK, 65536, row_bytes=4096, word=16)
    in_a_row = choose(RATES, 8 * CHUNK, 512, row_bytes=4096, word=16)
    assert (scattered, in_a_row) == (Way.STAGED, Way.SINGLE)


def test_what_cannot_be_staged_is_not() -> None:
    """Without kernels, or a table that is large enough, the second best is taken."""
    way = choose(RATES, 8 * CHUNK, 65536, row_bytes=4096, word=16, can_stage=False)
    assert way is Way.BATCHED


def test_rows_of_single_bytes_are_slow_to_pack() -> None:
    """A kernel that moves a byte at a time loses against the copy engines."""
    assert choose(RATES, CHUNK, 2048, row_bytes=16384, word=16) is Way.STAGED
    assert choose(RATES, CHUNK, 2048, row_bytes=16384, word=1) is not Way.STAGED


@given(st.integers(1, 1 << 30))
def test_speed_lies_between_what_was_measured(piece: int) -> None:
    """Beyond the smallest and the largest size it stays as it was there."""
    rates = (PieceRate(4096, 4e9), PieceRate(65536, 40e9))
    assert 4e9 * 0.999 <= speed(rates, piece) <= 40e9 * 1.001
    assert speed(rates, 16384) == pytest.approx((4e9 * 40e9) ** 0.5)
