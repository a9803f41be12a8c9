"""The choice of a copy method from rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.cuda.calibration import CopyMethod, choose_method, speed
from kvcore.status import PieceRate
from tests.cuda.cuda_fixture import published

MIB = 1 << 20
CHUNK = 32 * MIB
RATES = published().to_host


@pytest.mark.parametrize(
    ("num_bytes", "piece", "expected"),
    [
        (8 * CHUNK, 4096, CopyMethod.STAGED),
        (8 * CHUNK, 24576, CopyMethod.STAGED),
        (CHUNK, 8192, CopyMethod.STAGED),
        (8 * CHUNK, 2 * MIB, CopyMethod.SINGLE),
        (8 * CHUNK, 32 * MIB, CopyMethod.SINGLE),
        (2 * MIB, 1 * MIB, CopyMethod.SINGLE),
        (65536, 4096, CopyMethod.BATCHED),
    ],
)
def test_published_rates_choose_the_published_methods(
    num_bytes: int, piece: int, expected: CopyMethod
) -> None:
    """Many small pieces are staged, large ones copied singly, few bytes batched."""
    assert choose_method(
        RATES, num_bytes, num_bytes // piece, row_bytes=piece, word=16
    ) is (expected)


def test_pieces_between_are_batched() -> None:
    """Where the copy engines reach the link's speed, kernels are not worth SMs."""
    way = choose_method(
        RATES, 8 * CHUNK, 8 * CHUNK // 262144, row_bytes=262144, word=16
    )
    assert way in (CopyMethod.BATCHED, CopyMethod.SINGLE)


def test_merged_neighbours_need_no_kernels() -> None:
    """The same rows need no staging when they form contiguous runs."""
    scattered = choose_method(RATES, 8 * CHUNK, 65536, row_bytes=4096, word=16)
    in_a_row = choose_method(RATES, 8 * CHUNK, 512, row_bytes=4096, word=16)
    assert (scattered, in_a_row) == (CopyMethod.STAGED, CopyMethod.SINGLE)


def test_no_staging_where_it_is_impossible() -> None:
    """Without kernels, or with too small a table, the second-best method is used."""
    way = choose_method(
        RATES, 8 * CHUNK, 65536, row_bytes=4096, word=16, can_stage=False
    )
    assert way is CopyMethod.BATCHED


def test_rows_of_single_bytes_are_slow_to_pack() -> None:
    """A kernel that copies single bytes is slower than the copy engines."""
    assert (
        choose_method(RATES, CHUNK, 2048, row_bytes=16384, word=16) is CopyMethod.STAGED
    )
    assert (
        choose_method(RATES, CHUNK, 2048, row_bytes=16384, word=1)
        is not CopyMethod.STAGED
    )


@given(st.integers(1, 1 << 30))
def test_speed_is_within_the_measured_rates(piece: int) -> None:
    """Beyond the smallest and the largest size the rate is constant."""
    rates = (PieceRate(4096, 4e9), PieceRate(65536, 40e9))
    assert 4e9 * 0.999 <= speed(rates, piece) <= 40e9 * 1.001
    assert speed(rates, 16384) == pytest.approx((4e9 * 40e9) ** 0.5)
