"""Two sides played in pairs on one machine, so that what happens to it hits both."""

from __future__ import annotations

import secrets
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from msgspec.structs import replace

from kvcore.errors import SetupError
from kvctl.lab.compare.comparison import Comparison, compare
from kvctl.lab.results.result import Repetition, Result, read
from kvctl.lab.turns import FIRST, SECOND

BASE, NEW = "base", "new"
EXIT_WRONG_USE = 2


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each side."""

    base: Result
    new: Result


@dataclass(slots=True)
class Contest:
    """Pairs of runs; each run is saved in its side's folder once its pair has ended."""

    labels: tuple[str, str]
    folder: Path
    play: Callable[[int], Pair]
    """Plays the pair of this number."""
    name: str = field(default_factory=lambda: secrets.token_hex(4))

    def run(self, num_pairs: int) -> Comparison:
        """Play and judge; an interrupted pair ends it and is left out.

        Raises:
            SetupError: interrupted before one pair was complete.
        """
        base: list[Result] = []
        new: list[Result] = []
        for number in range(num_pairs):
            pair = self.play(number)
            if pair.base.interrupted or pair.new.interrupted:
                break
            base.append(self._keep(pair.base, BASE, number))
            new.append(self._keep(pair.new, NEW, number))
        if not new:
            raise SetupError("interrupted before both sides had a run")
        return compare(base, new, self.labels)

    def _keep(self, result: Result, side: str, number: int) -> Result:
        result = replace(result, repetition=Repetition(self.name, side, number))
        result.save(self.folder / side)
        return result


@dataclass(frozen=True, slots=True)
class Command:
    """How a run of one side is started: `kvctl bench run` of some installation."""

    python: str
    arguments: Sequence[str]
    """Scenario and flags, without --out."""
    cwd: Path | None = None

    def start(self, folder: Path, *more: str) -> subprocess.Popen[str]:
        """Start a run that saves its result in an empty folder."""
        command = [self.python, "-m", "kvctl", "bench", "run", *self.arguments, *more]
        return subprocess.Popen(
            [*command, "--out", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.cwd,
            start_new_session=True,
        )


@dataclass(frozen=True, slots=True)
class Duel:
    """Plays pairs of two commands.

    Where the scenario lets them, both run at once and take turns; else one after the
    other. Which side begins changes from pair to pair, and so no side is always the
    one that finds the machine warm.
    """

    base: Command
    new: Command
    in_turns: bool

    def __call__(self, number: int) -> Pair:
        """Play a pair.

        Raises:
            SetupError: a run could not begin; in its own words.
        """
        order = (BASE, NEW) if number % 2 == 0 else (NEW, BASE)
        with tempfile.TemporaryDirectory(prefix="kvlab-") as folder, _passed_on() as on:
            play = self._at_once if self.in_turns else self._one_by_one
            found = play(order, Path(folder), on)
            return Pair(found[BASE], found[NEW])

    def _at_once(
        self, order: Sequence[str], folder: Path, on: list[subprocess.Popen[str]]
    ) -> dict[str, Result]:
        for side, place in zip(order, (FIRST, SECOND), strict=True):
            turns = f"{place}:{folder / 'turns'}"
            on.append(self._of(side).start(folder / side, "--turns", turns))
        said = [process.communicate()[1] for process in on]
        return {
            side: _result(process, words, folder / side)
            for side, process, words in zip(order, on, said, strict=True)
        }

    def _one_by_one(
        self, order: Sequence[str], folder: Path, on: list[subprocess.Popen[str]]
    ) -> dict[str, Result]:
        found = {}
        for side in order:
            on.append(process := self._of(side).start(folder / side))
            found[side] = _result(process, process.communicate()[1], folder / side)
        return found

    def _of(self, side: str) -> Command:
        return self.base if side == BASE else self.new


def _result(process: subprocess.Popen[str], words: str, folder: Path) -> Result:
    """Read what a run saved; a run with problems has saved them as well."""
    files = list(folder.glob("*.json"))
    if process.returncode == EXIT_WRONG_USE or len(files) != 1:
        said = words.strip().splitlines() or [f"exit code {process.returncode}"]
        raise SetupError(said[-1].removeprefix("kvctl: "))
    return read(files[0])


@contextmanager
def _passed_on() -> Iterator[list[subprocess.Popen[str]]]:
    """Pass signals on to the processes in a list; kill what is left at the end."""
    processes: list[subprocess.Popen[str]] = []

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        for process in processes:
            process.send_signal(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, receive) for number in signals}
    try:
        yield processes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            process.kill()
            process.wait()
