"""Conversions of keys to and from double precision, compared with numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.blend.key_rotation import Bfloat16Converter, Float16Converter

ALL = np.arange(1 << 16, dtype=np.uint16)
FINITE = ALL[ALL & 0x7C00 != 0x7C00].view(np.float16).astype(np.float64)


def narrowed(doubles: np.ndarray) -> np.ndarray:
    """Round to float16; return the bits."""
    raw = np.empty(doubles.shape, np.float16)
    with np.errstate(all="ignore"):
        Float16Converter(doubles.size).narrow(raw, doubles.copy())
    return raw.view(np.uint16)


def by_numpy(doubles: np.ndarray) -> np.ndarray:
    """Return the bits of numpy's own float16."""
    with np.errstate(all="ignore"):
        return doubles.astype(np.float16).view(np.uint16)


def apart(doubles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether float16 has all the numbers; others are left to numpy."""
    has = np.abs(doubles) < 65520
    return doubles[has], doubles[~has]


@pytest.mark.parametrize(
    "bits", [ALL, ALL[ALL & 0x7C00 != 0x7C00]], ids=["all", "finite"]
)
def test_every_float16_widens_as_by_numpy(bits: np.ndarray) -> None:
    """All 65,536 values, with infinities and NaN and without."""
    doubles = np.empty(bits.shape)
    Float16Converter(bits.size).widen(doubles, bits.view(np.float16))
    expected = bits.view(np.float16).astype(np.float64)
    assert np.array_equal(doubles.view(np.uint64), expected.view(np.uint64))


def test_every_float16_narrows_to_itself() -> None:
    """Includes the smallest numbers and zeros of both signs."""
    assert np.array_equal(narrowed(FINITE), by_numpy(FINITE))
    whole = ALL.view(np.float16).astype(np.float64)
    assert np.array_equal(narrowed(whole), by_numpy(whole))


@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_ties_round_to_even_and_what_is_beside_them_to_nearest(ulps: int) -> None:
    """The midpoint of any two neighbours, and the doubles and float32s next to it."""
    ordered = np.unique(FINITE)
    middle = (ordered[:-1] + ordered[1:]) / 2
    near = middle.copy()
    floats = middle.astype(np.float32)
    for _ in range(abs(ulps)):
        near = np.nextafter(near, ulps * np.inf)
        floats = np.nextafter(floats, np.float32(ulps * np.inf))
    for doubles in (near, floats.astype(np.float64)):
        assert np.array_equal(narrowed(doubles), by_numpy(doubles))


def test_many_numbers_narrow_as_by_numpy() -> None:
    """Doubles and float32s of any bits, and those around float16's range."""
    rng = np.random.default_rng(1)
    wide = rng.integers(0, 1 << 64, 1 << 20, np.uint64).view(np.float64)
    single = rng.integers(0, 1 << 32, 1 << 20, np.uint64).astype(np.uint32)
    floats = single.view(np.float32)
    around = rng.normal(size=1 << 20) * 2.0 ** rng.integers(-30, 17, 1 << 20)
    numbers = np.concatenate((wide, floats[~np.isnan(floats)], around))
    for doubles in apart(numbers):
        assert np.array_equal(narrowed(doubles), by_numpy(doubles))


@pytest.mark.parametrize("edge", [65504.0, 65519.999, 65520.0, 65536.0, np.inf, np.nan])
def test_what_is_too_large_is_infinite_and_alone(edge: float) -> None:
    """Numbers of either sign at the limit of the range, beside numbers within it."""
    doubles = np.array([edge, 1.0, -edge, 2.0**-24, -0.0])
    assert np.array_equal(narrowed(doubles), by_numpy(doubles))


def test_bfloat16_comes_back() -> None:
    """Every value except NaN is unchanged by widening and narrowing."""
    floats = (ALL.astype(np.uint32) << 16).view(np.float32)
    bits = ALL[~np.isnan(floats)]
    doubles, back = np.empty(bits.shape), np.empty_like(bits)
    conversion = Bfloat16Converter(bits.size)
    conversion.widen(doubles, bits)
    conversion.narrow(back, doubles)
    assert np.array_equal(back, bits)
