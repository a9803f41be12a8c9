"""Exact rank tests for differences in duration, robust against outliers.

Paired runs: Wilcoxon's signed-rank test (Biometrics Bulletin 1, 1945). Unpaired runs:
the Mann-Whitney test (Annals of Mathematical Statistics 18, 1947). Estimates and
intervals are those of Hodges and Lehmann (1963), over all averages of two pairs, or
all pairs of one run of each side. Holm's procedure (Scandinavian Journal of
Statistics 6, 1979) bounds the false-alarm rate over all operations together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec
import numpy as np
import numpy.typing as npt

FALSE_ALARM_RATE = 0.05
"""Probability of any false alarm between equal sides, better and worse together."""
MARGIN = 0.05
"""A smaller relative difference, faster or slower, is called the same."""

Floats = npt.NDArray[np.float64]


class Verdict(StrEnum):
    """Result of testing one operation."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    CANNOT_TELL = "cannot tell"


class Effect(msgspec.Struct, frozen=True):
    """Ratio of the new duration to the base duration; 1.1 is 10 % slower."""

    ratio: float
    low: float | None
    high: float | None
    """Bounds of the interval; None with too few runs."""
    chance: float
    """Two-sided p value."""
    verdict: Verdict


class Contrast(msgspec.Struct, frozen=True):
    """Differences of logarithms, ascending, and their distribution for equal sides.

    `chances[k]` is the probability that k differences are above zero.
    """

    differences: Floats
    chances: Floats

    def chance(self) -> float:
        """Return the two-sided p value; a zero difference counts half."""
        signs = np.sign(self.differences)
        above = float(np.count_nonzero(signs > 0) + np.count_nonzero(signs == 0) / 2)
        extreme = int(min(above, self.differences.size - above))
        return min(1.0, 2 * float(self.chances[: extreme + 1].sum()))

    def interval(self, chance: float) -> tuple[float, float] | None:
        """Return the bounds of the interval with this error rate at most.

        None with too few runs for such an interval.
        """
        upto = np.cumsum(self.chances)
        cut = int(np.searchsorted(upto, chance / 2, side="right"))
        if cut == 0:
            return None
        return float(self.differences[cut - 1]), float(self.differences[-cut])


def paired(log_ratios: Sequence[float]) -> Contrast:
    """Return the contrast of pairs, given log(new) - log(base) of each, `[pairs]`."""
    each = np.asarray(log_ratios)
    rows, columns = np.triu_indices(each.size)
    chances = np.ones(1)
    for rank in range(1, each.size + 1):
        with_it = np.concatenate((np.zeros(rank), chances))
        chances = (np.pad(chances, (0, rank)) + with_it) / 2
    return Contrast(np.sort((each[rows] + each[columns]) / 2), chances)


def unpaired(base: Sequence[float], new: Sequence[float]) -> Contrast:
    """Return the contrast of unpaired runs, given the logarithm of each duration."""
    differences = np.asarray(new)[:, None] - np.asarray(base)
    chances = _mann_whitney(len(base), len(new))
    return Contrast(np.sort(differences.ravel()), chances)


def _mann_whitney(num_base: int, num_new: int) -> Floats:
    """Return the probability of each count, by recursion over the longest run."""
    shorter = [np.ones(1) for _ in range(num_base + 1)]
    for new in range(1, num_new + 1):
        row = [np.ones(1)]
        for base in range(1, num_base + 1):
            longest_new = np.concatenate((np.zeros(base), shorter[base])) * new
            longest_base = np.pad(row[-1], (0, new)) * base
            row.append((longest_new + longest_base) / (new + base))
        shorter = row
    return shorter[num_base]


def judge(contrasts: Mapping[str, Contrast]) -> dict[str, Effect]:
    """Test several operations together, by Holm's procedure."""
    chances = {name: contrast.chance() for name, contrast in contrasts.items()}
    effects: dict[str, Effect] = {}
    rejected = True
    for place, name in enumerate(sorted(chances, key=chances.__getitem__)):
        level = FALSE_ALARM_RATE / (len(chances) - place)
        rejected = rejected and chances[name] <= level
        effects[name] = _effect(contrasts[name], chances[name], level, rejected)
    return {name: effects[name] for name in contrasts}


def _effect(contrast: Contrast, chance: float, level: float, differs: bool) -> Effect:
    ratio = float(np.exp(np.median(contrast.differences)))
    bounds = contrast.interval(level)
    if bounds is None:
        return Effect(ratio, None, None, chance, Verdict.CANNOT_TELL)
    low, high = np.exp(bounds).tolist()
    if low > 1 / (1 + MARGIN) and high < 1 + MARGIN:
        verdict = Verdict.SAME
    elif differs:
        verdict = Verdict.WORSE if ratio > 1 else Verdict.BETTER
    else:
        verdict = Verdict.CANNOT_TELL
    return Effect(ratio, low, high, chance, verdict)
