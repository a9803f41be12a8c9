"""Latency histograms: percentiles are measured durations, to three digits."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvctl.lab.latency import (
    Histogram,
    LatencyRecorder,
    LatencySamples,
    decode,
    summarise,
)

DIGITS = 1e-3
seconds = st.lists(st.floats(1e-9, 3600), min_size=1, max_size=50)


def test_percentiles_of_known_durations() -> None:
    """Of 1..1000 ms in any order, p50 is 500 ms, p99.9 is 999 ms, the max 1 s."""
    seconds = np.random.default_rng(0).permutation(np.arange(1, 1001) / 1000)
    found = summarise(seconds)
    points = (found.p50_s, found.p90_s, found.p99_s, found.p999_s)
    assert points == pytest.approx((0.5, 0.9, 0.99, 0.999), rel=DIGITS)
    assert (found.max_s, found.count) == (1.0, 1000)
    assert found.mean_s == pytest.approx(0.5005)


def test_a_percentile_is_never_between_two_modes() -> None:
    """Of nine fast calls and a slow one, p90 is fast and p99 is slow."""
    found = summarise(np.array([0.001] * 9 + [1.0]))
    points = (found.p50_s, found.p90_s, found.p99_s)
    assert points == pytest.approx((0.001, 0.001, 1.0), rel=DIGITS)


def test_one_sample_is_every_percentile() -> None:
    """All figures of a single call are its duration."""
    found = summarise(np.array([0.25]))
    points = (found.p50_s, found.p999_s, found.max_s, found.mean_s)
    assert points == pytest.approx([0.25] * 4, rel=DIGITS)


def test_samples_of_processes_merge() -> None:
    """Merged samples summarise as if one process had measured them all."""
    ours = LatencySamples.pack({"lookup": array("d", [1.0, 2.0]), "store": array("d")})
    theirs = LatencySamples.pack({"lookup": array("d", [3.0])})
    merged = LatencySamples.merge([ours, theirs]).summary()
    assert list(merged) == ["lookup"]
    assert (merged["lookup"].count, merged["lookup"].max_s) == (3, 3.0)


@given(seconds, seconds)
def test_histograms_add_up(ours: list[float], theirs: list[float]) -> None:
    """The sum of two histograms is that of all durations."""
    apart = Histogram.merge(
        [Histogram.of(np.array(ours)), Histogram.of(np.array(theirs))]
    )
    once = Histogram.of(np.array(ours + theirs))
    assert (apart.values, apart.counts) == (once.values, once.counts)
    assert apart.max_s == once.max_s
    assert apart.total_s == pytest.approx(once.total_s)


@given(seconds)
def test_a_histogram_reads_back_as_it_was_written(durations: list[float]) -> None:
    """The HDR format keeps every value and count."""
    histogram = Histogram.of(np.array(durations))
    read = decode(histogram.encode())
    assert (read.values, read.counts) == (histogram.values, histogram.counts)
    exact = np.sort(durations)
    assert np.repeat(read.values_ns, read.count_each) / 1e9 == pytest.approx(
        exact, rel=DIGITS, abs=1e-9
    )


def test_a_window_has_the_durations_since_the_last_one() -> None:
    """Durations and counts belong to the current window, which ends now."""
    now = 0.0
    recorder = LatencyRecorder(clock=lambda: now)
    recorder.add({"lookup": 0.1})
    now = 1.0
    recorder.roll({"requests": 1})
    recorder.add({"lookup": 0.2, "store": 0.3})
    now = 2.0
    recorder.roll({"requests": 4})
    first, second = recorder.samples().windows
    assert (first.end_s, second.end_s) == (1.0, 2.0)
    assert (first.counts, second.counts) == ({"requests": 1}, {"requests": 3})
    assert first.durations.keys() == {"lookup"}
    assert second.durations["lookup"].max_s == 0.2
