"""Keys as doubles and back, rounded once, to nearest.

numpy has no bfloat16, and converts float16 one by one, the least of them slowest: it
uses no instruction of the CPU's. Here passes over whole arrays do the same. What they
cannot, which is rare, is left to numpy.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Raw = np.ndarray[Any, np.dtype[Any]]
Words = npt.NDArray[np.uint32]

_BELOW_BFLOAT16 = np.uint64((1 << 45) - 1)
"""Bits that a double's mantissa has more."""
_HALF_BFLOAT16 = np.uint64(1 << 44)

_BELOW_FLOAT16 = np.uint32(13)
"""Bits that a float32's mantissa has more."""
_DOWN, _UP = np.float32(2.0**-112), np.float32(2.0**112)
"""Between a float32's exponent and float16's, of its least numbers too."""
_SIGN_AND_FLOAT16 = np.uint32(0x8FFFE000)
_INFINITY = np.uint32(0x7C00 << 13)
_MIDDLE = np.uint32(1 << 31)
_ROUND = np.uint32(1 << 12)
_SIGN = np.uint32(0x8000)
_TOO_LARGE = 65520 * _DOWN
"""The least that float16 rounds to infinity."""


class Conversion(Protocol):
    """Converts so many numbers at once as its room was made for."""

    def __init__(self, num_numbers: int) -> None: ...

    def widen(self, doubles: Doubles, raw: Raw) -> None:
        """Put numbers as doubles of the same shape, contiguous."""

    def narrow(self, raw: Raw, doubles: Doubles) -> None:
        """Round doubles to numbers. They are not needed any more."""


class Float32:
    """numpy's own conversions."""

    def __init__(self, num_numbers: int) -> None:
        del num_numbers

    def widen(self, doubles: Doubles, raw: Raw) -> None:
        """See `Conversion`."""
        np.copyto(doubles, raw)

    def narrow(self, raw: Raw, doubles: Doubles) -> None:
        """See `Conversion`."""
        np.copyto(raw, doubles, casting="same_kind")


class Bfloat16:
    """The upper half of a float32; raw numbers are its bits."""

    def __init__(self, num_numbers: int) -> None:
        self._words = np.empty(num_numbers, np.uint32)

    def widen(self, doubles: Doubles, raw: Raw) -> None:
        """See `Conversion`."""
        words = self._words[: raw.size].reshape(raw.shape)
        np.copyto(words, raw)
        words <<= np.uint32(16)
        np.copyto(doubles, words.view(np.float32))

    def narrow(self, raw: Raw, doubles: Doubles) -> None:
        """See `Conversion`. In integers: float32 between would round twice."""
        bits = doubles.view(np.uint64)
        words = self._words[: raw.size].reshape(raw.shape)
        bits += _HALF_BFLOAT16
        bits &= ~_BELOW_BFLOAT16
        np.copyto(words.view(np.float32), doubles, casting="same_kind")
        words >>= np.uint32(16)
        np.copyto(raw, words, casting="unsafe")


class Float16:
    """Bit for bit what numpy converts to and from."""

    def __init__(self, num_numbers: int) -> None:
        self._words = np.empty((2, num_numbers), np.uint32)
        self._middle = np.empty(num_numbers, np.bool_)

    def widen(self, doubles: Doubles, raw: Raw) -> None:
        """See `Conversion`."""
        words, others = self._words[:, : raw.size].reshape(2, *raw.shape)
        np.copyto(words.view(np.int32), raw.view(np.int16))
        words <<= _BELOW_FLOAT16
        words &= _SIGN_AND_FLOAT16
        np.bitwise_and(words, _INFINITY, out=others)
        if others.max() == _INFINITY:
            np.copyto(doubles, raw)
            return
        floats = words.view(np.float32)
        floats *= _UP
        np.copyto(doubles, floats)

    def narrow(self, raw: Raw, doubles: Doubles) -> None:
        """See `Conversion`.

        By way of float32. That is rounding twice, which differs from once only where
        the first gives what lies in the middle of two: those are rounded by numpy.
        """
        words, others = self._words[:, : raw.size].reshape(2, *raw.shape)
        floats = words.view(np.float32)
        np.copyto(floats, doubles, casting="same_kind")
        floats *= _DOWN
        if not (floats.min() > -_TOO_LARGE and floats.max() < _TOO_LARGE):
            np.copyto(raw, doubles, casting="same_kind")
            return
        middle = self._middle[: raw.size].reshape(raw.shape)
        np.left_shift(words, 32 - _BELOW_FLOAT16, out=others)
        np.equal(others, _MIDDLE, out=middle)
        np.right_shift(words, np.uint32(16), out=others)
        others &= _SIGN
        words += _ROUND
        words >>= _BELOW_FLOAT16
        others |= words
        np.copyto(raw.view(np.uint16), others, casting="unsafe")
        if middle.any():
            np.copyto(raw, doubles, casting="same_kind", where=middle)


CONVERSIONS: dict[str, type[Float32 | Bfloat16 | Float16]] = {
    "float32": Float32,
    "float16": Float16,
    "bfloat16": Bfloat16,
}
