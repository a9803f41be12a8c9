"""Rotary position embedding: a model's parameters and its frequencies.

A pair (a, b) of a head's elements at position p is the complex number a + ib times
exp(i p f), f being the pair's frequency (Su et al., RoFormer, 2021). So a rotation
turns a key of one position into that of another.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvcore.errors import LayoutError

Frequencies = npt.NDArray[np.float64]


class LinearScaling(msgspec.Struct, frozen=True, tag="linear"):
    """Positions divided by a factor (Chen et al., Position Interpolation, 2023)."""

    factor: float


class Llama3Scaling(msgspec.Struct, frozen=True, tag="llama3"):
    """Llama 3.1's scaling: divides low frequencies, keeps high ones, a ramp between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


class YarnScaling(msgspec.Struct, frozen=True, tag="yarn"):
    """YaRN's ramp over rotations in the original context (Peng et al., 2023).

    Its attention factor is not needed: it scales a key's length, which a rotation
    preserves.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


class Rope(msgspec.Struct, frozen=True):
    """Rotation of a model's keys; its frequencies must not depend on prompt length."""

    theta: Annotated[float, Meta(description="base of the frequencies")]
    head_dim: Annotated[int, Meta(ge=1, description="elements of a head in the buffer")]
    rotary_dim: Annotated[int, Meta(ge=2, description="elements of a head that rotate")]
    first_dim: Annotated[
        int, Meta(ge=0, description="the first that rotates; MLA: after the latent")
    ] = 0
    interleaved: Annotated[
        bool, Meta(description="pairs are neighbours (GPT-J), not halves (NeoX)")
    ] = False
    scaling: RopeScaling | None = None

    def check(self) -> None:
        """Check that the parameters describe a rotation.

        Raises:
            LayoutError: the rotated elements are not pairs of a head's, or a number is
                not positive and finite.
        """
        if self.rotary_dim % 2 or self.first_dim + self.rotary_dim > self.head_dim:
            raise LayoutError(
                f"rope: elements {self.first_dim} to {self.first_dim + self.rotary_dim}"
                f" are not pairs of a head of {self.head_dim}"
            )
        scaling = msgspec.structs.astuple(self.scaling) if self.scaling else ()
        if not all(0 < value < math.inf for value in (self.theta, *scaling)):
            raise LayoutError("rope: theta and scaling's numbers must be positive")

    def frequencies(self) -> Frequencies:
        """Return the radians per position of each pair, `float64[rotary_dim / 2]`."""
        powers = np.arange(0, self.rotary_dim, 2) / self.rotary_dim
        with np.errstate(all="ignore"):
            plain = np.float64(self.theta) ** -powers
            match self.scaling:
                case None:
                    return plain
                case LinearScaling(factor):
                    return plain / np.float64(factor)
                case Llama3Scaling():
                    return _llama3(plain, self.scaling)
                case YarnScaling():
                    return _yarn(plain, self.scaling, self.theta)


def _llama3(plain: Frequencies, scaling: Llama3Scaling) -> Frequencies:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * plain / (2 * math.pi)
    kept = np.clip((turns - low) / np.float64(high - low), 0, 1)
    return _mixed(plain, scaling.factor, kept)


def _yarn(plain: Frequencies, scaling: YarnScaling, theta: float) -> Frequencies:
    dim = 2 * plain.size

    def pair(rotations: float) -> float:
        """Return the index of the pair that completes `rotations` in that context."""
        wave = scaling.original_max_position / (np.float64(rotations) * 2 * math.pi)
        return float(dim * np.log(wave) / (2 * np.log(theta)))

    first = max(np.floor(pair(scaling.beta_fast)), 0)
    last = min(np.ceil(pair(scaling.beta_slow)), dim - 1)
    ramp = (np.arange(plain.size) - first) / max(last - first, 1e-3)
    return _mixed(plain, scaling.factor, 1 - np.clip(ramp, 0, 1))


def _mixed(plain: Frequencies, factor: float, kept: Frequencies) -> Frequencies:
    mixed: Frequencies = plain * kept + plain / np.float64(factor) * (1 - kept)
    return mixed
