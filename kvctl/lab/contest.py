"""Two sides played in turn on one machine, so that what happens to it hits both."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from kvcore.errors import SetupError
from kvctl.lab.compare import Comparison, compare
from kvctl.lab.result import Repetition, Result

BASE, NEW = "base", "new"
SIDES = (BASE, NEW)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One side: what it is called, and how one run of it is played."""

    label: str
    play: Callable[[], Result]


@dataclass(slots=True)
class Contest:
    """Runs of both sides; each is saved in its side's folder as soon as it ends."""

    base: Contestant
    new: Contestant
    folder: Path
    told: Callable[[int, str], None] | None = None
    """Told before each run its pair's number and its side's label."""
    name: str = field(default_factory=lambda: secrets.token_hex(4))
    results: dict[str, list[Result]] = field(default_factory=dict)

    def play(self, num_pairs: int) -> Comparison:
        """Play and judge; fewer pairs than asked for when a run was interrupted.

        Which side begins a pair changes from pair to pair, and so no side is always
        the one that finds the machine warm.

        Raises:
            SetupError: interrupted before one pair was complete.
        """
        self.results = {side: [] for side in SIDES}
        for number in range(num_pairs):
            if not self._play_pair(number):
                break
        base, new = self.results[BASE], self.results[NEW]
        if not new:
            raise SetupError("interrupted before both sides had a run")
        return compare(base, new, (self.base.label, self.new.label))

    def _play_pair(self, number: int) -> bool:
        """Play both sides; an interrupt leaves out the pair, and is False."""
        order = SIDES if number % 2 == 0 else SIDES[::-1]
        pair: dict[str, Result] = {}
        for side in order:
            result = self._play_one(side, number)
            if result.interrupted:
                return False
            pair[side] = result
        for side in SIDES:
            self.results[side].append(pair[side])
        return True

    def _play_one(self, side: str, number: int) -> Result:
        contestant = self.base if side == BASE else self.new
        if self.told:
            self.told(number, contestant.label)
        place = Repetition(self.name, side, number)
        result = replace(contestant.play(), repetition=place)
        result.save(self.folder / side)
        return result


def problems(results: Sequence[Result]) -> list[str]:
    """Say what was wrong with the runs themselves, each once."""
    return list(dict.fromkeys(line for one in results for line in one.problems))
