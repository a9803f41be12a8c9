"""Keys turned from the positions they were computed at to those they are used at.

A plan of turns says what is to be done, whoever does it: keys of some blocks move by a
distance, so each pair of their elements is multiplied by exp(i distance f). That
number is the same for every token, head and layer of a turn. This module does it in
numpy, for keys in host memory; a device needs only the plan and `rotation_factors`.

tests/benchmarks/blend.py measures it beside a plain copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvcore.blend.float_conversions import CONVERSIONS, Doubles, Raw
from kvcore.copy.host_cache import HostCache
from kvcore.copy.paged_cache import PagedCache
from kvcore.errors import LayoutError
from kvcore.rope import Rope
from kvcore.shm import Bytes

Factors = npt.NDArray[np.complex128]

RAW_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # numpy has none: its bits
}

PIECE_PAIRS = 1 << 16
"""Turned at once: four arrays of doubles, 2 MiB. With fewer, Python takes its share; a
second thread then only waits for the GIL."""


@dataclass(frozen=True, slots=True)
class BlockRotation:
    """Keys of consecutive blocks that move by `distance` positions."""

    first_block: int
    end_block: int
    distance: int


@runtime_checkable
class KeyRotator(Protocol):
    """A paged cache that rotates its own keys, as one in GPU memory does."""

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


@lru_cache(maxsize=1024)
def rotation_factors(rope: Rope, distance: int) -> Factors:
    """Return what each pair is multiplied by, `[rotary_dim / 2]`, read only."""
    made: Factors = np.exp(1j * distance * rope.frequencies())
    made.setflags(write=False)
    return made


def rotate_keys(
    keys: Bytes, dtype: str, rope: Rope, turns: Sequence[BlockRotation]
) -> None:
    """Turn keys in place; `keys` is `[planes, blocks, units, unit bytes]`.

    Computed in double precision and rounded once, to nearest.
    """
    raw: Raw = keys.view(RAW_DTYPES[dtype])
    heads = raw.reshape(*raw.shape[:-1], -1, rope.head_dim)
    turned = heads[..., rope.first_dim : rope.first_dim + rope.rotary_dim]
    real, imaginary = _halves(turned, rope.interleaved)
    step = max(1, PIECE_PAIRS // (real[0, :1].size or 1))
    piece = _RotationBuffer(real[0, :step].size, dtype)
    # Infinities and what is no number stay what they are.
    with np.errstate(all="ignore"):
        for turn in turns:
            if turn.distance:
                # For all heads of a token: numpy's inner loops are longer.
                by = np.tile(rotation_factors(rope, turn.distance), heads.shape[-2])
                cos, sin = by.real.copy(), by.imag.copy()
                for blocks in _pieces(turn, step):
                    for plane in range(len(real)):
                        piece.turn(
                            real[plane, blocks], imaginary[plane, blocks], cos, sin
                        )


def _halves(turned: Raw, interleaved: bool) -> tuple[Raw, Raw]:
    if interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    half = turned.shape[-1] // 2
    return turned[..., :half], turned[..., half:]


def _pieces(turn: BlockRotation, step: int) -> Iterator[slice]:
    for first in range(turn.first_block, turn.end_block, step):
        yield slice(first, min(first + step, turn.end_block))


class _RotationBuffer:
    """Room for the pairs that are turned at once, made once for all of them."""

    def __init__(self, num_pairs: int, dtype: str) -> None:
        self._doubles = np.empty((4, num_pairs))
        self._conversion = CONVERSIONS[dtype](num_pairs)

    def turn(self, real: Raw, imaginary: Raw, cos: Doubles, sin: Doubles) -> None:
        """Multiply pairs, `[..., heads, rotary_dim / 2]`, in place."""
        a, b, c, d = self._doubles[:, : real.size].reshape(4, -1, cos.size)
        self._conversion.widen(a.reshape(real.shape), real)
        self._conversion.widen(b.reshape(real.shape), imaginary)
        np.multiply(a, cos, out=c)
        np.multiply(b, sin, out=d)
        c -= d
        a *= sin
        b *= cos
        a += b
        self._conversion.narrow(real, c.reshape(real.shape))
        self._conversion.narrow(imaginary, a.reshape(real.shape))
