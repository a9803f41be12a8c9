"""Key rotation, compared with trigonometry in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvcore.blend import key_rotation as rotation
from kvcore.blend.key_rotation import BlockRotation, check_rope, rotate_keys
from kvcore.errors import LayoutError
from kvcore.rope import LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling

LAYERS, TOKENS, HEADS = 2, 7, 3
BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
"""Significant bits of a mantissa."""

ROPES = {
    "plain": Rope(theta=1e4, head_dim=8, rotary_dim=8),
    "interleaved": Rope(theta=5e5, head_dim=8, rotary_dim=8, interleaved=True),
    "partial": Rope(theta=1e4, head_dim=16, rotary_dim=6),
    "latent": Rope(theta=1e4, head_dim=24, rotary_dim=8, first_dim=16),
    "scaled": Rope(1e6, 8, 8, scaling=LinearScaling(4.0)),
}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a dtype; return bytes, `[L, T, 1, unit bytes]`."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32) >> 16
        raw = bits.astype(np.uint16)
    else:
        raw = values.astype(dtype)
    flat = raw.reshape(LAYERS, TOKENS, 1, -1)
    return np.ascontiguousarray(flat).view(np.uint8)


def decode(keys: np.ndarray, dtype: str) -> np.ndarray:
    """Decode bytes to double precision, `[L, T, heads, D]`."""
    if dtype == "bfloat16":
        bits = keys.view(np.uint16).astype(np.uint32) << 16
        values = bits.view(np.float32)
    else:
        values = keys.view(dtype)
    return values.reshape(LAYERS, TOKENS, HEADS, -1).astype(np.float64)


def turned(values: np.ndarray, rope: Rope, distance: int) -> np.ndarray:
    """Rotate each pair separately."""
    result = values.copy()
    half = rope.rotary_dim // 2
    for pair, frequency in enumerate(rope.frequencies()):
        a = rope.first_dim + (2 * pair if rope.interleaved else pair)
        b = a + (1 if rope.interleaved else half)
        c, s = math.cos(distance * frequency), math.sin(distance * frequency)
        result[..., a] = values[..., a] * c - values[..., b] * s
        result[..., b] = values[..., a] * s + values[..., b] * c
    return result


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("distance", [1, -300, 100_000])
def test_keys_turn_to_within_half_a_unit_of_their_dtype(
    dtype: str, name: str, distance: int
) -> None:
    """The result is the double-precision rotation, rounded to nearest."""
    rope = ROPES[name]
    rng = np.random.default_rng(distance % 97)
    keys = encode(rng.normal(size=(LAYERS, TOKENS, HEADS, rope.head_dim)), dtype)
    before = decode(keys, dtype)
    exact = turned(before, rope, distance)
    rotate_keys(
        keys,
        dtype,
        rope,
        [BlockRotation(1, 3, distance), BlockRotation(5, 6, distance)],
    )
    after = decode(keys, dtype)
    where = [1, 2, 5]
    unit = 2.0 ** (np.frexp(exact[:, where])[1] - BITS[dtype])
    error = np.abs(after[:, where] - exact[:, where]) / unit
    assert error.max() <= 0.5 + 1e-6
    others = [0, 3, 4, 6]
    assert np.array_equal(after[:, others], before[:, others])
    rest = np.ones(rope.head_dim, np.bool_)
    rest[rope.first_dim : rope.first_dim + rope.rotary_dim] = False
    assert np.array_equal(after[..., rest], before[..., rest])


@pytest.mark.parametrize("dtype", BITS)
def test_nothing_is_rounded_twice(dtype: str) -> None:
    """Of a million numbers none is wrong by more than half a unit of its dtype."""
    rope = Rope(theta=1e4, head_dim=1 << 14, rotary_dim=1 << 14)
    rng = np.random.default_rng(9)
    shape = (LAYERS, TOKENS, HEADS, rope.head_dim)
    keys = encode(rng.normal(size=shape), dtype)
    a, b = np.split(decode(keys, dtype), 2, axis=-1)
    by = np.exp(77j * rope.frequencies())
    exact = np.concatenate((a * by.real - b * by.imag, a * by.imag + b * by.real), -1)
    rotate_keys(keys, dtype, rope, [BlockRotation(0, TOKENS, 77)])
    unit = 2.0 ** (np.frexp(exact)[1] - BITS[dtype])
    # Subnormal numbers of float16 have fewer bits.
    unit = np.maximum(unit, 2.0**-24) if dtype == "float16" else unit
    assert (np.abs(decode(keys, dtype) - exact) / unit).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", ROPES)
def test_pieces_come_to_the_same(
    dtype: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result does not depend on the step size."""
    rope = ROPES[name]
    values = np.random.default_rng(3).normal(
        size=(LAYERS, TOKENS, HEADS, rope.head_dim)
    )
    turned_at_once = encode(values, dtype)
    turns = [BlockRotation(0, 5, 9), BlockRotation(5, TOKENS, -2)]
    rotate_keys(turned_at_once, dtype, rope, turns)
    pairs = HEADS * rope.rotary_dim // 2
    for most in (1, 2 * pairs, 3 * pairs - 1):
        monkeypatch.setattr(rotation, "STEP_PAIRS", most)
        rotate_keys(in_pieces := encode(values, dtype), dtype, rope, turns)
        assert np.array_equal(in_pieces, turned_at_once)


def test_keys_that_stay_keep_their_bits() -> None:
    """A distance of 0 changes no byte, not even a NaN's."""
    keys = np.full((LAYERS, TOKENS, 1, HEADS * 16), 0xFF, np.uint8)
    rotate_keys(keys, "bfloat16", ROPES["plain"], [BlockRotation(0, TOKENS, 0)])
    assert (keys == 0xFF).all()


def test_an_overflow_of_one_key_harms_no_other() -> None:
    """Infinities and NaNs affect only their pair; other keys stay exact."""
    keys = np.zeros((LAYERS, TOKENS, 1, HEADS * 16), np.uint8)
    numbers = keys.view(np.uint16)
    numbers[..., 0] = 0x7F80  # infinity
    numbers[..., 1] = 0x3F80  # one
    rotate_keys(keys, "bfloat16", ROPES["plain"], [BlockRotation(0, TOKENS, 5)])
    values = decode(keys, "bfloat16")
    assert not np.isfinite(values[..., 0, 0]).any()
    assert np.isfinite(values[..., 0, 1:4]).all()


def reference(rope: Rope, pair: int) -> float:
    """Return a pair's frequency by the formulas of the papers."""
    plain = rope.theta ** (-2 * pair / rope.rotary_dim)
    match rope.scaling:
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling(factor, low, high, original):
            wavelength = 2 * math.pi / plain
            if wavelength < original / high:
                return plain
            if wavelength > original / low:
                return plain / factor
            smooth = (original / wavelength - low) / (high - low)
            return (1 - smooth) * plain / factor + smooth * plain
        case YarnScaling(factor, original, fast, slow):

            def pair_of(rotations: float) -> float:
                wave = original / (rotations * 2 * math.pi)
                return rope.rotary_dim * math.log(wave) / (2 * math.log(rope.theta))

            first = max(math.floor(pair_of(fast)), 0)
            last = min(math.ceil(pair_of(slow)), rope.rotary_dim - 1)
            ramp = min(max((pair - first) / (last - first), 0), 1)
            return plain / factor * ramp + plain * (1 - ramp)
    return plain


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(2.0),
        Llama3Scaling(),
        Llama3Scaling(32.0, 1.0, 4.0, 8192),
        YarnScaling(4.0, 32768),
        YarnScaling(40.0, 4096),
    ],
)
def test_frequencies_are_those_of_the_papers(scaling: RopeScaling | None) -> None:
    """The frequencies of each scaling, pair by pair."""
    rope = Rope(theta=500_000.0, head_dim=128, rotary_dim=128, scaling=scaling)
    expected = [reference(rope, pair) for pair in range(64)]
    assert np.allclose(rope.frequencies(), expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("rope", "dtype", "unit_bytes"),
    [
        (Rope(1e4, head_dim=8, rotary_dim=7), "float32", 32),
        (Rope(1e4, head_dim=8, rotary_dim=10), "float32", 32),
        (Rope(1e4, head_dim=8, rotary_dim=4, first_dim=6), "float32", 32),
        (Rope(0.0, head_dim=8, rotary_dim=8), "float32", 32),
        (Rope(-1.0, head_dim=8, rotary_dim=8), "float32", 32),
        (Rope(1e4, 8, 8, scaling=LinearScaling(0.0)), "float32", 32),
        (Rope(1e4, 8, 8, scaling=YarnScaling(2.0, 0)), "float32", 32),
        (Rope(1e4, 8, 8, scaling=Llama3Scaling(factor=float("nan"))), "float16", 16),
        (Rope(1e4, head_dim=8, rotary_dim=8), "float8_e4m3", 8),
        (Rope(1e4, head_dim=8, rotary_dim=8), "float32", 40),
    ],
)
def test_what_is_no_rotation_is_refused(
    rope: Rope, dtype: str, unit_bytes: int
) -> None:
    """Odd dimensions, dimensions outside the head, invalid frequencies."""
    with pytest.raises(LayoutError, match="rope: "):
        check_rope(rope, dtype, unit_bytes)
