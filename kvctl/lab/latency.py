"""Latency histograms, samples of calls over time, and their summaries.

A histogram keeps eleven bits of each duration, as an HDR histogram of three digits
does, and is saved in that format. Histograms of several processes add up.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from time import monotonic, perf_counter
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

DIGITS = 3
BITS = 11
"""Significant bits of a duration in nanoseconds: three digits."""
MAX_NS = 24 * 3600 * 10**9

Ints = npt.NDArray[np.int64]


class Histogram(msgspec.Struct, frozen=True):
    """Durations of one operation. Mean and maximum are exact."""

    values: bytes = b""
    """Packed int64 nanoseconds, ascending, distinct."""
    counts: bytes = b""
    """Packed int64, one per value."""
    total_s: float = 0.0
    max_s: float = 0.0

    @classmethod
    def of(cls, seconds: npt.NDArray[np.float64]) -> Histogram:
        """Return the histogram of durations `[n]` in seconds, in any order."""
        if not seconds.size:
            return cls()
        exact = np.clip(np.rint(seconds * 1e9), 1, MAX_NS).astype(np.int64)
        # One bit of the mantissa is before the binary point.
        shift = np.maximum(np.frexp(exact.astype(np.float64))[1] - BITS, 0)
        values, counts = np.unique((exact >> shift) << shift, return_counts=True)
        return cls(
            values.tobytes(),
            counts.astype(np.int64).tobytes(),
            float(seconds.sum()),
            float(seconds.max()),
        )

    @classmethod
    def merge(cls, many: Iterable[Histogram]) -> Histogram:
        """Return the sum of histograms of several processes or windows."""
        parts = [part for part in many if part.values]
        if len(parts) < 2:
            return parts[0] if parts else cls()
        values, place = np.unique(
            np.concatenate([part.values_ns for part in parts]), return_inverse=True
        )
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, place, np.concatenate([part.count_each for part in parts]))
        return cls(
            values.tobytes(),
            counts.tobytes(),
            sum(part.total_s for part in parts),
            max(part.max_s for part in parts),
        )

    @property
    def values_ns(self) -> Ints:
        """Durations that occurred, in nanoseconds, ascending."""
        return np.frombuffer(self.values, np.int64)

    @property
    def count_each(self) -> Ints:
        """Number of occurrences of each value."""
        return np.frombuffer(self.counts, np.int64)

    @property
    def count(self) -> int:
        """Number of durations."""
        return int(self.count_each.sum())

    def quantiles_s(self, shares: Sequence[float]) -> list[float]:
        """Return the nearest-rank quantile of each share; the histogram is not empty.

        A nearest rank is a measured duration: it never lies between two modes.
        """
        upto = np.cumsum(self.count_each)
        ranks = np.ceil(np.asarray(shares) * upto[-1])
        values = self.values_ns[np.searchsorted(upto, ranks)]
        return [min(value / 1e9, self.max_s) for value in values.tolist()]

    def encode(self) -> str:
        """Return the histogram in HdrHistogram's V2 format, compressed, in base64.

        Values are nanoseconds. Source: github.com/HdrHistogram/HdrHistogram.
        """
        from hdrh.histogram import HdrHistogram

        encoded = HdrHistogram(1, MAX_NS, DIGITS)
        for value, count in zip(
            self.values_ns.tolist(), self.count_each.tolist(), strict=True
        ):
            encoded.record_value(value, count)
        return bytes(encoded.encode()).decode()


def decode(text: str) -> Histogram:
    """Return the histogram of `Histogram.encode`, or of another HDR histogram.

    Mean and maximum are then as exact as the buckets.
    """
    from hdrh.histogram import HdrHistogram

    read = HdrHistogram.decode(text.encode())
    counts = np.ctypeslib.as_array(read.counts).astype(np.int64)
    (indices,) = counts.nonzero()
    values = np.array(
        [read.get_value_from_index(i) for i in indices.tolist()], np.int64
    )
    found = counts[indices]
    return Histogram(
        values.tobytes(),
        found.tobytes(),
        float((values * found).sum() / 1e9),
        read.get_max_value() / 1e9,
    )


QUANTILES = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99, "p999_s": 0.999}


class Latency(msgspec.Struct, frozen=True):
    """Summary of an operation's durations. Percentiles are measured durations."""

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    p999_s: float
    max_s: float
    histogram: Annotated[
        str, Meta(description="nanoseconds: HdrHistogram V2, compressed, base64")
    ] = ""


class Window(msgspec.Struct, frozen=True):
    """Durations and counts of one interval of time."""

    end_s: float
    """On the host's monotonic clock."""
    durations: dict[str, Histogram]
    counts: dict[str, int] = {}


class LatencySamples(msgspec.Struct):
    """Windows of one or several processes, in order of time."""

    windows: list[Window] = []

    @classmethod
    def pack(cls, durations: dict[str, array[float]]) -> LatencySamples:
        """Return the durations of one process as one window."""
        return cls([Window(monotonic(), _histograms(durations))])

    @classmethod
    def merge(cls, many: Iterable[LatencySamples]) -> LatencySamples:
        """Return the windows of several processes, in order of time."""
        windows = [window for samples in many for window in samples.windows]
        return cls(sorted(windows, key=lambda window: window.end_s))

    def histograms(self) -> dict[str, Histogram]:
        """Return the histogram of each operation over all windows."""
        by_name: dict[str, list[Histogram]] = {}
        for window in self.windows:
            for name, part in window.durations.items():
                by_name.setdefault(name, []).append(part)
        merged = {name: Histogram.merge(parts) for name, parts in by_name.items()}
        return {name: merged[name] for name in sorted(merged) if merged[name].values}

    def medians(self) -> dict[str, tuple[float | None, ...]]:
        """Return each operation's median per window; None without a sample."""
        windows = [one for one in self.windows if one.durations]
        names = dict.fromkeys(name for one in windows for name in one.durations)
        return {
            name: tuple(
                one.durations[name].quantiles_s([0.5])[0]
                if name in one.durations
                else None
                for one in windows
            )
            for name in names
        }

    def summary(self) -> dict[str, Latency]:
        """Return the summary of each measured operation."""
        return {name: describe(one) for name, one in self.histograms().items()}


class LatencyRecorder:
    """Collects durations; `roll` closes a window. Thread-safe.

    The histograms of a window are computed outside the lock.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._durations: dict[str, array[float]] = {}
        self._windows: list[Window] = []
        self._counted: dict[str, int] = {}

    def add(self, durations: dict[str, float]) -> None:
        """Record durations in seconds, by operation."""
        with self._lock:
            for name, seconds in durations.items():
                self._durations.setdefault(name, array("d")).append(seconds)

    def roll(self, counts: dict[str, int]) -> None:
        """Close the window; `counts` are totals since the start of the run."""
        with self._lock:
            durations, self._durations = self._durations, {}
            grown = {
                name: count - self._counted.get(name, 0)
                for name, count in counts.items()
            }
            self._counted = counts
        window = Window(self._clock(), _histograms(durations), grown)
        with self._lock:
            self._windows.append(window)

    def samples(self) -> LatencySamples:
        """Return all closed windows."""
        with self._lock:
            return LatencySamples(list(self._windows))


def _histograms(durations: dict[str, array[float]]) -> dict[str, Histogram]:
    return {
        name: Histogram.of(np.frombuffer(values))
        for name, values in durations.items()
        if values
    }


def describe(histogram: Histogram) -> Latency:
    """Return the summary of a histogram, which must not be empty."""
    points = histogram.quantiles_s(list(QUANTILES.values()))
    count = histogram.count
    return Latency(
        count=count,
        mean_s=histogram.total_s / count,
        max_s=histogram.max_s,
        histogram=histogram.encode(),
        **dict(zip(QUANTILES, points, strict=True)),
    )


def summarise(seconds: npt.NDArray[np.float64]) -> Latency:
    """Return the summary of at least one duration, in seconds."""
    return describe(Histogram.of(seconds))


def time_calls(call: Callable[[], object], rounds: int) -> Latency:
    """Return the durations of `rounds` consecutive calls."""
    seconds = np.empty(rounds)
    for index in range(rounds):
        begun = perf_counter()
        call()
        seconds[index] = perf_counter() - begun
    return summarise(seconds)
