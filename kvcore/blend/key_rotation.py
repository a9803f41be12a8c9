"""Rotation of rotary keys to other positions, and exact conversions to and from double.

Keys of some blocks move by a distance: each pair of their elements is multiplied by
exp(i distance f). That factor is the same for every token, head and layer. This module
rotates keys in host memory in numpy, in double precision, rounded once to nearest.
Caches in GPU memory use `BlockRotation` and `rotation_factors`.

numpy has no bfloat16, and converts float16 one number at a time, without instructions
of the CPU. The converters here are passes over whole arrays; for infinities, NaN and
ties of float16 they call numpy.

tests/benchmarks/blend.py compares it with a plain copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvcore.copy.host_cache import HostCache
from kvcore.copy.paged_cache import PagedCache
from kvcore.errors import LayoutError
from kvcore.rope import Rope
from kvcore.shm import Bytes

Factors = npt.NDArray[np.complex128]
Doubles = npt.NDArray[np.float64]
Raw = np.ndarray[Any, np.dtype[Any]]

RAW_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # Its bits: numpy has no bfloat16.
}

STEP_PAIRS = 1 << 16
"""Pairs rotated at once: four arrays of doubles, 2 MiB. With fewer, the time in the
interpreter counts, and a second thread waits for the GIL."""

_LOW_BITS_BFLOAT16 = np.uint64((1 << 45) - 1)
"""Mantissa bits that a double has and bfloat16 lacks."""
_HALF_BFLOAT16 = np.uint64(1 << 44)

_SHIFT_FLOAT16 = np.uint32(13)
"""Mantissa bits that a float32 has and float16 lacks."""
_DOWN, _UP = np.float32(2.0**-112), np.float32(2.0**112)
"""Difference of the exponents' biases; correct for subnormals too."""
_SIGN_AND_FLOAT16 = np.uint32(0x8FFFE000)
_INFINITY = np.uint32(0x7C00 << 13)
_TIE = np.uint32(1 << 31)
_ROUND = np.uint32(1 << 12)
_SIGN = np.uint32(0x8000)
_TOO_LARGE = 65520 * _DOWN
"""The smallest number that float16 rounds to infinity."""


@dataclass(frozen=True, slots=True)
class BlockRotation:
    """Rotation of keys of blocks [first_block, end_block) by `distance` positions."""

    first_block: int
    end_block: int
    distance: int


@runtime_checkable
class KeyRotator(Protocol):
    """A paged cache that rotates its keys, such as one in GPU memory."""

    def rotate_keys(self, rope: Rope, rotations: Sequence[BlockRotation]) -> None:
        """Rotate keys in place, after all scatters so far.

        The caller has called `check_rope`. No block is in two rotations.
        """


def rotate_cached_keys(
    rope: Rope, rotations: Sequence[BlockRotation], caches: Sequence[PagedCache]
) -> None:
    """Rotate keys of every cache in place; caches in token order only.

    Raises:
        LayoutError: a cache whose keys cannot be rotated.
    """
    for cache in caches:
        if isinstance(cache, KeyRotator):
            cache.rotate_keys(rope, rotations)
        elif isinstance(cache, HostCache):
            for keys in cache.key_views():
                rotate_keys(keys, cache.layout.part.dtype, rope, rotations)
        else:
            raise LayoutError(f"rope: a {type(cache).__name__} cannot rotate keys")


def check_rope(rope: Rope, dtype: str, token_bytes: int) -> None:
    """Check that keys of `token_bytes` per token can be rotated.

    Raises:
        LayoutError: the rotation is invalid, or dtype or size do not fit it.
    """
    rope.check()
    if dtype not in RAW_DTYPES:
        raise LayoutError(f"rope: keys of {dtype} cannot be rotated")
    head_bytes = rope.head_dim * RAW_DTYPES[dtype].itemsize
    if token_bytes % head_bytes:
        raise LayoutError(
            f"rope: a token of {token_bytes} bytes has no heads of {head_bytes}"
        )


@lru_cache(maxsize=1024)
def rotation_factors(rope: Rope, distance: int) -> Factors:
    """Return the factor of each pair, `[rotary_dim / 2]`, read-only."""
    factors: Factors = np.exp(1j * distance * rope.frequencies())
    factors.setflags(write=False)
    return factors


def rotate_keys(
    keys: Bytes, dtype: str, rope: Rope, rotations: Sequence[BlockRotation]
) -> None:
    """Rotate keys in place; `keys` is `[planes, blocks, units, unit bytes]`."""
    raw: Raw = keys.view(RAW_DTYPES[dtype])
    heads = raw.reshape(*raw.shape[:-1], -1, rope.head_dim)
    rotary = heads[..., rope.first_dim : rope.first_dim + rope.rotary_dim]
    if rope.interleaved:
        real, imaginary = rotary[..., 0::2], rotary[..., 1::2]
    else:
        half = rope.rotary_dim // 2
        real, imaginary = rotary[..., :half], rotary[..., half:]
    step = max(1, STEP_PAIRS // (real[0, :1].size or 1))
    buffer = _RotationBuffer(real[0, :step].size, dtype)
    # Infinities and NaN are valid keys: no warnings.
    with np.errstate(all="ignore"):
        for rotation in rotations:
            if not rotation.distance:
                continue
            # Repeated for all heads of a token, which makes numpy's inner loops longer.
            factors = rotation_factors(rope, rotation.distance)
            tiled = np.tile(factors, heads.shape[-2])
            cos, sin = tiled.real.copy(), tiled.imag.copy()
            for first in range(rotation.first_block, rotation.end_block, step):
                blocks = slice(first, min(first + step, rotation.end_block))
                for plane in range(len(real)):
                    buffer.rotate(
                        real[plane, blocks], imaginary[plane, blocks], cos, sin
                    )


class _RotationBuffer:
    """Scratch memory for the pairs of one step, allocated once."""

    def __init__(self, num_pairs: int, dtype: str) -> None:
        self._doubles = np.empty((4, num_pairs))
        self._converter = CONVERTERS[dtype](num_pairs)

    def rotate(self, real: Raw, imaginary: Raw, cos: Doubles, sin: Doubles) -> None:
        """Multiply pairs, `[..., heads, rotary_dim / 2]`, in place."""
        a, b, c, d = self._doubles[:, : real.size].reshape(4, -1, cos.size)
        self._converter.widen(a.reshape(real.shape), real)
        self._converter.widen(b.reshape(real.shape), imaginary)
        np.multiply(a, cos, out=c)
        np.multiply(b, sin, out=d)
        c -= d
        a *= sin
        b *= cos
        a += b
        self._converter.narrow(real, c.reshape(real.shape))
        self._converter.narrow(imaginary, a.reshape(real.shape))


class Float32Converter:
    """Converts at most `max_numbers` numbers at a time; float32 as numpy does."""

    def __init__(self, max_numbers: int) -> None:
        del max_numbers

    def widen(self, doubles: Doubles, raw: Raw) -> None:
        """Write numbers as doubles of the same shape, contiguous."""
        np.copyto(doubles, raw)

    def narrow(self, raw: Raw, doubles: Doubles) -> None:
        """Round doubles to numbers. Overwrites the doubles."""
        np.copyto(raw, doubles, casting="same_kind")


class Bfloat16Converter(Float32Converter):
    """The upper half of a float32; raw numbers are its bits."""

    def __init__(self, max_numbers: int) -> None:
        self._words = np.empty(max_numbers, np.uint32)

    def widen(self, doubles: Doubles, raw: Raw) -> None:
        """See `Float32Converter`."""
        words = self._words[: raw.size].reshape(raw.shape)
        np.copyto(words, raw)
        words <<= np.uint32(16)
        np.copyto(doubles, words.view(np.float32))

    def narrow(self, raw: Raw, doubles: Doubles) -> None:
        """See `Float32Converter`. In integers: by way of float32 it rounds twice."""
        bits = doubles.view(np.uint64)
        words = self._words[: raw.size].reshape(raw.shape)
        bits += _HALF_BFLOAT16
        bits &= ~_LOW_BITS_BFLOAT16
        np.copyto(words.view(np.float32), doubles, casting="same_kind")
        words >>= np.uint32(16)
        np.copyto(raw, words, casting="unsafe")


class Float16Converter(Float32Converter):
    """Returns the same bits as numpy's conversions, faster."""

    def __init__(self, max_numbers: int) -> None:
        self._words = np.empty((2, max_numbers), np.uint32)
        self._ties = np.empty(max_numbers, np.bool_)

    def widen(self, doubles: Doubles, raw: Raw) -> None:
        """See `Float32Converter`."""
        words, scratch = self._words[:, : raw.size].reshape(2, *raw.shape)
        np.copyto(words.view(np.int32), raw.view(np.int16))
        words <<= _SHIFT_FLOAT16
        words &= _SIGN_AND_FLOAT16
        np.bitwise_and(words, _INFINITY, out=scratch)
        if scratch.max() == _INFINITY:
            np.copyto(doubles, raw)
            return
        floats = words.view(np.float32)
        floats *= _UP
        np.copyto(doubles, floats)

    def narrow(self, raw: Raw, doubles: Doubles) -> None:
        """See `Float32Converter`.

        By way of float32. Rounding twice differs from rounding once only if the first
        result is a tie between two float16; numpy rounds those numbers.
        """
        words, scratch = self._words[:, : raw.size].reshape(2, *raw.shape)
        floats = words.view(np.float32)
        np.copyto(floats, doubles, casting="same_kind")
        floats *= _DOWN
        if not (floats.min() > -_TOO_LARGE and floats.max() < _TOO_LARGE):
            np.copyto(raw, doubles, casting="same_kind")
            return
        ties = self._ties[: raw.size].reshape(raw.shape)
        np.left_shift(words, 32 - _SHIFT_FLOAT16, out=scratch)
        np.equal(scratch, _TIE, out=ties)
        np.right_shift(words, np.uint32(16), out=scratch)
        scratch &= _SIGN
        words += _ROUND
        words >>= _SHIFT_FLOAT16
        scratch |= words
        np.copyto(raw.view(np.uint16), scratch, casting="unsafe")
        if ties.any():
            np.copyto(raw, doubles, casting="same_kind", where=ties)


CONVERTERS: dict[str, type[Float32Converter]] = {
    "float32": Float32Converter,
    "float16": Float16Converter,
    "bfloat16": Bfloat16Converter,
}
