"""Is one side slower than the other, or is it noise? Ranks decide, so outliers do not.

Runs in pairs: Wilcoxon's signed-rank test (Biometrics Bulletin 1, 1945). Runs apart:
the test of Mann and Whitney (Annals of Mathematical Statistics 18, 1947). Both exact;
estimate and interval are those of Hodges and Lehmann (1963), over all averages of two
pairs, or all pairs of one run each. Several questions asked at once share the chance
of a false alarm by Holm's procedure (Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec
import numpy as np
import numpy.typing as npt

CHANCE = 0.05
"""Of any false alarm in one comparison of equal sides, better and worse together."""
MARGIN = 0.05
"""Less than this, either way, is called the same."""

Floats = npt.NDArray[np.float64]


class Verdict(StrEnum):
    """What is said of one operation."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    CANNOT_TELL = "cannot tell"


class Effect(msgspec.Struct, frozen=True):
    """How many times as long the new side takes; 1.1 is 10 % slower."""

    ratio: float
    low: float | None
    high: float | None
    """The bounds; none where there are too few runs for any."""
    chance: float
    """Of a difference like this between equal sides, two-sided."""
    verdict: Verdict


class Contrast(msgspec.Struct, frozen=True):
    """Differences of logarithms, ascending, and how many are expected above zero.

    `chances[k]` is the probability that k of them are, for equal sides.
    """

    differences: Floats
    chances: Floats

    def chance(self) -> float:
        """Return the two-sided p value; a difference of none counts half."""
        signs = np.sign(self.differences)
        above = float(np.count_nonzero(signs > 0) + np.count_nonzero(signs == 0) / 2)
        extreme = int(min(above, self.differences.size - above))
        return min(1.0, 2 * float(self.chances[: extreme + 1].sum()))

    def interval(self, chance: float) -> tuple[float, float] | None:
        """Return the bounds that equal sides would leave with this chance at most.

        None where there are too few runs to give any.
        """
        upto = np.cumsum(self.chances)
        cut = int(np.searchsorted(upto, chance / 2, side="right"))
        if cut == 0:
            return None
        return float(self.differences[cut - 1]), float(self.differences[-cut])


def paired(gaps: Sequence[float]) -> Contrast:
    """Contrast pairs by each one's difference of logarithms, new less base."""
    each = np.asarray(gaps)
    rows, columns = np.triu_indices(each.size)
    chances = np.ones(1)
    for rank in range(1, each.size + 1):
        with_it = np.concatenate((np.zeros(rank), chances))
        chances = (np.pad(chances, (0, rank)) + with_it) / 2
    return Contrast(np.sort((each[rows] + each[columns]) / 2), chances)


def unpaired(base: Sequence[float], new: Sequence[float]) -> Contrast:
    """Contrast logarithms of durations that were measured apart."""
    differences = np.asarray(new)[:, None] - np.asarray(base)
    chances = _mann_whitney(len(base), len(new))
    return Contrast(np.sort(differences.ravel()), chances)


def _mann_whitney(num_base: int, num_new: int) -> Floats:
    """Return how likely each count of pairs is, by who has the longest run of all."""
    shorter = [np.ones(1) for _ in range(num_base + 1)]
    for new in range(1, num_new + 1):
        row = [np.ones(1)]
        for base in range(1, num_base + 1):
            of_new = np.concatenate((np.zeros(base), shorter[base])) * new
            of_base = np.pad(row[-1], (0, new)) * base
            row.append((of_new + of_base) / (new + base))
        shorter = row
    return shorter[num_base]


def judge(contrasts: Mapping[str, Contrast]) -> dict[str, Effect]:
    """Judge several operations at once."""
    chances = {name: contrast.chance() for name, contrast in contrasts.items()}
    effects: dict[str, Effect] = {}
    rejected = True
    for place, name in enumerate(sorted(chances, key=chances.__getitem__)):
        level = CHANCE / (len(chances) - place)
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
