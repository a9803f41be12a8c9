"""Samples of how long operations took, and what is told of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from time import perf_counter

import msgspec
import numpy as np

QUANTILES = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99, "p999_s": 0.999}


class Latency(msgspec.Struct, frozen=True):
    """How long an operation took. A percentile is a duration that was measured."""

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    p999_s: float
    max_s: float


class Samples(msgspec.Struct):
    """Durations by operation, every one of them; they merge across processes."""

    durations: dict[str, bytes] = {}
    """Packed float64 seconds."""

    @classmethod
    def pack(cls, durations: dict[str, array[float]]) -> Samples:
        """Take what one process measured."""
        return cls({name: values.tobytes() for name, values in durations.items()})

    @classmethod
    def merge(cls, many: Iterable[Samples]) -> Samples:
        """Put the samples of several processes together."""
        merged: dict[str, bytes] = {}
        for samples in many:
            for name, packed in samples.durations.items():
                merged[name] = merged.get(name, b"") + packed
        return cls(merged)

    def summary(self) -> dict[str, Latency]:
        """Summarise each operation that was measured."""
        return {
            name: summarise(np.frombuffer(packed))
            for name, packed in sorted(self.durations.items())
            if packed
        }


def summarise(seconds: np.typing.NDArray[np.float64]) -> Latency:
    """Summarise at least one duration.

    A percentile is the smallest measured value that at least so many are not above
    (nearest rank), so it never lies between two modes.
    """
    points = np.quantile(seconds, list(QUANTILES.values()), method="inverted_cdf")
    named = dict(zip(QUANTILES, points.tolist(), strict=True))
    return Latency(
        count=seconds.size,
        mean_s=float(seconds.mean()),
        max_s=float(seconds.max()),
        **named,
    )


def time_calls(call: Callable[[], object], rounds: int) -> Latency:
    """Time a call again and again, one after another."""
    seconds = np.empty(rounds)
    for index in range(rounds):
        begun = perf_counter()
        call()
        seconds[index] = perf_counter() - begun
    return summarise(seconds)
