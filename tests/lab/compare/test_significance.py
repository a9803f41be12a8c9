"""Exact rank tests, their intervals and their verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pytest

from kvctl.lab.compare import significance as judging
from kvctl.lab.compare.significance import Contrast, Verdict, judge


def paired(base: Sequence[float], new: Sequence[float]) -> Contrast:
    """Return the contrast of paired durations."""
    return judging.paired((np.log(new) - np.log(base)).tolist())


def unpaired(base: Sequence[float], new: Sequence[float]) -> Contrast:
    """Return the contrast of unpaired durations."""
    return judging.unpaired(np.log(base).tolist(), np.log(new).tolist())


def test_signed_ranks_have_their_exact_distribution() -> None:
    """Equal to the count over all choices of signs of five ranks."""
    counts = np.zeros(16)
    for signs in product((0, 1), repeat=5):
        counts[sum(rank for rank, sign in enumerate(signs, 1) if sign)] += 1
    assert paired([1] * 5, [1] * 5).chances == pytest.approx(counts / 32)


def test_two_samples_have_their_exact_distribution() -> None:
    """Equal to the count over all orders of four runs and three."""
    counts = np.zeros(13)
    for new in combinations(range(7), 3):
        counts[sum(sum(b < n for b in range(7) if b not in new) for n in new)] += 1
    chances = unpaired([1] * 4, [1] * 3).chances
    assert chances == pytest.approx(counts / math.comb(7, 3))


def test_p_values_equal_the_published_tables() -> None:
    """Six pairs above zero: 2 in 64. Four runs above four: 2 in 70."""
    up = [1.0 + 0.1 * place for place in range(6)]
    assert paired([1.0] * 6, [1.1 * one for one in up]).chance() == 2 / 64
    apart = unpaired([1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3])
    assert apart.chance() == pytest.approx(2 / 70)


def test_pairs_remove_common_drift() -> None:
    """With drift, pairs detect a 10 % difference that unpaired runs do not."""
    drift = np.linspace(1, 3, 10)
    wobble = 1 + 0.01 * np.cos(np.arange(10))
    base, new = drift, drift * wobble * 1.1
    effect = judge({"x": paired(base.tolist(), new.tolist())})["x"]
    assert effect.verdict is Verdict.WORSE
    assert effect.low is not None
    assert effect.high is not None
    assert effect.low < 1.1 < effect.high
    apart = judge({"x": unpaired(base.tolist(), new.tolist())})["x"]
    assert apart.verdict is Verdict.CANNOT_TELL


def test_one_outlier_changes_no_verdict() -> None:
    """Nineteen equal pairs and one of a ratio of 100 have the verdict `same`."""
    base = [1.0 + 0.001 * place for place in range(20)]
    new = [*base[:-1], 100.0]
    effect = judge({"x": paired(base, new)})["x"]
    assert effect.verdict is Verdict.SAME
    assert effect.ratio == pytest.approx(1.0)


def test_too_few_runs_cannot_tell() -> None:
    """Three pairs never suffice: there are no bounds."""
    effect = judge({"x": paired([1.0, 1.0, 1.0], [2.0, 2.1, 2.2])})["x"]
    assert effect.verdict is Verdict.CANNOT_TELL
    assert (effect.low, effect.high) == (None, None)


def test_identical_runs_are_the_same() -> None:
    """Without a difference the p value is 1 and the interval a point."""
    effect = judge({"x": paired([1.0] * 10, [1.0] * 10)})["x"]
    assert (effect.verdict, effect.chance) == (Verdict.SAME, 1.0)
    assert (effect.low, effect.high) == (1.0, 1.0)


def test_operations_share_one_false_alarm_rate() -> None:
    """A difference significant alone is not among ten operations (Holm)."""
    base = [1.0] * 6
    some = [1.2, 1.3, 1.1, 1.25, 1.15, 1.18]
    assert judge({"x": paired(base, some)})["x"].verdict is Verdict.WORSE
    ten = {str(number): paired(base, some) for number in range(10)}
    verdicts = {effect.verdict for effect in judge(ten).values()}
    assert verdicts == {Verdict.CANNOT_TELL}
