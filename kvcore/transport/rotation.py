"""Keys turned from the positions they were computed at to those they are used at.

A plan of turns says what is to be done, whoever does it: keys of some blocks move by a
distance, so each pair of their elements is multiplied by exp(i distance f). That
number is the same for every token, head and layer of a turn. This module does it in
numpy, for keys in host memory; a device needs only the plan and `factors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcore.errors import LayoutError
from kvcore.rope import Rope
from kvcore.shm import Bytes

Factors = np.ndarray[Any, np.dtype[np.complex128]]
Raw = np.ndarray[Any, np.dtype[Any]]

RAW_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # numpy has none: its bits
}
PIECE_BYTES = 1 << 20
"""Of double precision at once: it stays in the cache."""

_CUT = np.uint64(45)
"""Bits that a double's mantissa has more than a bfloat16's."""
_HALF = np.uint64((1 << 44) - 1)


@dataclass(frozen=True, slots=True)
class Turn:
    """Keys of consecutive blocks that move by `distance` positions."""

    first_block: int
    end_block: int
    distance: int


def check_rope(rope: Rope, dtype: str, unit_bytes: int) -> None:
    """Refuse a rotation that a token's keys cannot have; `LayoutError` says why."""
    rope.check()
    if dtype not in RAW_DTYPES:
        raise LayoutError(f"rope: keys of {dtype} cannot be turned")
    head_bytes = rope.head_dim * RAW_DTYPES[dtype].itemsize
    if unit_bytes % head_bytes:
        raise LayoutError(
            f"rope: a token of {unit_bytes} bytes has no heads of {head_bytes}"
        )


def factors(rope: Rope, distance: int) -> Factors:
    """Return what each pair is multiplied by, `[rotary_dim / 2]`."""
    made: Factors = np.exp(1j * distance * rope.frequencies())
    return made


def turn_keys(keys: Bytes, dtype: str, rope: Rope, turns: Sequence[Turn]) -> None:
    """Turn keys in place; `keys` is `[planes, blocks, units, unit bytes]`.

    Computed in double precision and rounded once, to nearest, ties to even.
    """
    raw: Raw = keys.view(RAW_DTYPES[dtype])
    heads = raw.reshape(*raw.shape[:-1], -1, rope.head_dim)
    turned = heads[..., rope.first_dim : rope.first_dim + rope.rotary_dim]
    real, imaginary = _halves(turned, rope.interleaved)
    step = max(1, PIECE_BYTES // (16 * (real[0, :1].size or 1)))
    for turn in turns:
        if turn.distance:
            by = factors(rope, turn.distance)
            for first in range(turn.first_block, turn.end_block, step):
                piece = slice(first, min(first + step, turn.end_block))
                for plane in range(len(real)):
                    _multiply(real[plane, piece], imaginary[plane, piece], by)


def _halves(turned: Raw, interleaved: bool) -> tuple[Raw, Raw]:
    if interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    half = turned.shape[-1] // 2
    return turned[..., :half], turned[..., half:]


def _multiply(real: Raw, imaginary: Raw, by: Factors) -> None:
    pairs = np.empty(real.shape, np.complex128)
    pairs.real = _widen(real)
    pairs.imag = _widen(imaginary)
    pairs *= by
    real[...] = _narrow(pairs.real, real.dtype)
    imaginary[...] = _narrow(pairs.imag, real.dtype)


def _widen(raw: Raw) -> Raw:
    if raw.dtype != np.uint16:
        return raw
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(values: Raw, dtype: np.dtype[Any]) -> Raw:
    if dtype != np.uint16:
        return values.astype(dtype)
    bits = np.ascontiguousarray(values).view(np.uint64)
    bits = bits + _HALF + (bits >> _CUT & np.uint64(1))
    rounded = (bits >> _CUT << _CUT).view(np.float64)
    single = rounded.astype(np.float32).view(np.uint32)
    return (single >> np.uint32(16)).astype(np.uint16)
