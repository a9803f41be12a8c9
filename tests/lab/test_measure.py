"""Percentiles are durations that were measured."""

from __future__ import annotations

from array import array

import numpy as np

from kvctl.lab.measure import Samples, summarise


def test_percentiles_of_planted_data() -> None:
    """Of 1..1000 ms in any order, p50 is 500 ms, p99.9 is 999 ms, the max 1 s."""
    seconds = np.random.default_rng(0).permutation(np.arange(1, 1001) / 1000)
    found = summarise(seconds)
    assert (found.p50_s, found.p90_s, found.p99_s) == (0.5, 0.9, 0.99)
    assert (found.p999_s, found.max_s, found.count) == (0.999, 1.0, 1000)
    assert abs(found.mean_s - 0.5005) < 1e-12


def test_a_percentile_is_never_between_two_modes() -> None:
    """Nine fast calls and one slow one: p90 is fast, p99 is slow, nothing between."""
    found = summarise(np.array([0.001] * 9 + [1.0]))
    assert (found.p50_s, found.p90_s, found.p99_s) == (0.001, 0.001, 1.0)


def test_one_sample_is_every_percentile() -> None:
    """With one call all figures are that call's."""
    found = summarise(np.array([0.25]))
    assert {found.p50_s, found.p999_s, found.max_s, found.mean_s} == {0.25}


def test_samples_of_processes_merge() -> None:
    """Merged samples summarise as if one process had measured them all."""
    ours = Samples.pack({"lookup": array("d", [1.0, 2.0]), "store": array("d")})
    theirs = Samples.pack({"lookup": array("d", [3.0])})
    merged = Samples.merge([ours, theirs]).summary()
    assert list(merged) == ["lookup"]
    assert (merged["lookup"].count, merged["lookup"].max_s) == (3, 3.0)
