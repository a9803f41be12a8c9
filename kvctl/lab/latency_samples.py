"""Samples of how long operations took, and what is told of them."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable
from time import monotonic, perf_counter
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvctl.lab.histogram import Histogram

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
    histogram: Annotated[
        str, Meta(description="nanoseconds: HdrHistogram V2, compressed, base64")
    ] = ""


class Window(msgspec.Struct, frozen=True):
    """What was measured since the window before it."""

    end_s: float
    """On the host's monotonic clock."""
    durations: dict[str, Histogram]
    counts: dict[str, int] = {}


class LatencySamples(msgspec.Struct):
    """What one process or several measured, in time; they merge across processes."""

    windows: list[Window] = []

    @classmethod
    def pack(cls, durations: dict[str, array[float]]) -> LatencySamples:
        """Take what one process measured, as one window."""
        return cls([Window(monotonic(), _histograms(durations))])

    @classmethod
    def merge(cls, many: Iterable[LatencySamples]) -> LatencySamples:
        """Put the samples of several processes together, in time."""
        windows = [window for samples in many for window in samples.windows]
        return cls(sorted(windows, key=lambda window: window.end_s))

    def histograms(self) -> dict[str, Histogram]:
        """Merge all windows, by operation."""
        by_name: dict[str, list[Histogram]] = {}
        for window in self.windows:
            for name, part in window.durations.items():
                by_name.setdefault(name, []).append(part)
        merged = {name: Histogram.merge(parts) for name, parts in by_name.items()}
        return {name: merged[name] for name in sorted(merged) if merged[name].values}

    def medians(self) -> dict[str, tuple[float | None, ...]]:
        """Return each operation's median in every window; None where it had none."""
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
        """Summarise each operation that was measured."""
        return {name: describe(one) for name, one in self.histograms().items()}


class LatencyRecorder:
    """Collects durations cheaply; `roll` makes a window of them now and then.

    Any thread may add; a window is made outside the lock that adding takes.
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
        """Begin a new window; `counts` are those since the start of all."""
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
        """Return all windows so far."""
        with self._lock:
            return LatencySamples(list(self._windows))


def _histograms(durations: dict[str, array[float]]) -> dict[str, Histogram]:
    return {
        name: Histogram.of(np.frombuffer(values))
        for name, values in durations.items()
        if values
    }


def describe(histogram: Histogram) -> Latency:
    """Summarise at least one duration."""
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
    """Summarise at least one duration; percentiles to three digits."""
    return describe(Histogram.of(seconds))


def time_calls(call: Callable[[], object], rounds: int) -> Latency:
    """Time a call again and again, one after another."""
    seconds = np.empty(rounds)
    for index in range(rounds):
        begun = perf_counter()
        call()
        seconds[index] = perf_counter() - begun
    return summarise(seconds)
