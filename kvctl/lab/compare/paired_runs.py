"""Two sides played in pairs on one machine, so that what happens to it hits both."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType

from msgspec.structs import replace

from kvcore.errors import SetupError
from kvctl.lab.compare.comparison import Comparison, compare
from kvctl.lab.interleaving import FIRST, SECOND
from kvctl.lab.results.result import Repetition, Result, read

BASE, NEW = "base", "new"
EXIT_WRONG_USE = 2
EXITS_INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)
END_S = 20.0
"""For a run that is not wanted any more to end what it has started."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each side."""

    base: Result
    new: Result


@dataclass(slots=True)
class PairedRuns:
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
            try:
                pair = self.play(number)
            except KeyboardInterrupt:
                break
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
class CommandRun:
    """A run of one side under way; it saves its result in an empty folder."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    """What it says on stderr."""

    def result(self) -> Result:
        """Wait for its end and read what it saved; one with problems has saved, too.

        Raises:
            SetupError: it could not begin; in its own words.
            KeyboardInterrupt: it was interrupted before its load began.
        """
        code = self.process.wait()
        if code in EXITS_INTERRUPTED:
            raise KeyboardInterrupt
        files = list(self.folder.glob("*.json"))
        if code == EXIT_WRONG_USE or len(files) != 1:
            words = self.log.read_text(errors="replace").strip().splitlines()
            said = words[-1] if words else f"exit code {code}"
            raise SetupError(said.removeprefix("kvctl: "))
        return read(files[0])

    def end(self) -> None:
        """End it, and with it what it has started."""
        self.process.terminate()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True, slots=True)
class Command:
    """How a run of one side is started: `kvctl bench run` of some installation."""

    python: str
    arguments: Sequence[str]
    """Scenario and flags, without --out."""
    cwd: Path | None = None

    def start(self, folder: Path, *more: str) -> CommandRun:
        """Start a run that saves its result in a folder."""
        command = [self.python, "-m", "kvctl", "bench", "run", *self.arguments, *more]
        log = folder.with_suffix(".log")
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*command, "--out", str(folder)],
                stdout=subprocess.DEVNULL,
                stderr=said,
                cwd=self.cwd,
                start_new_session=True,
            )
        return CommandRun(process, folder, log)


@dataclass(frozen=True, slots=True)
class InterleavedRuns:
    """Plays pairs of two commands.

    Where they can, both run at once and take turns; else one after the other. Which
    side begins changes from pair to pair, and so no side is always the one that finds
    the machine warm.
    """

    base: Command
    new: Command
    in_turns: bool

    def __call__(self, number: int) -> Pair:
        """Play a pair.

        Raises:
            SetupError: a run could not begin; in its own words.
            KeyboardInterrupt: a signal came before the load began.
        """
        order = (BASE, NEW) if number % 2 == 0 else (NEW, BASE)
        with tempfile.TemporaryDirectory(prefix="kvlab-") as folder, _passed_on() as on:
            play = self._at_once if self.in_turns else self._one_by_one
            found = play(order, Path(folder), on)
            return Pair(found[BASE], found[NEW])

    def _at_once(
        self, order: Sequence[str], folder: Path, on: list[CommandRun]
    ) -> dict[str, Result]:
        """Let them meet; one that cannot begin is not waited for by the other."""
        for side, place in zip(order, (FIRST, SECOND), strict=True):
            turns = f"{place}:{folder / 'turns'}"
            on.append(self._of(side).start(folder / side, "--turns", turns))
        return {run.folder.name: run.result() for run in _as_they_end(on)}

    def _one_by_one(
        self, order: Sequence[str], folder: Path, on: list[CommandRun]
    ) -> dict[str, Result]:
        found = {}
        for side in order:
            on.append(run := self._of(side).start(folder / side))
            found[side] = run.result()
        return found

    def _of(self, side: str) -> Command:
        return self.base if side == BASE else self.new


def _as_they_end(runs: Sequence[CommandRun]) -> Iterator[CommandRun]:
    with ExitStack() as stack:
        left: dict[int, CommandRun] = {}
        for run in runs:
            ended = os.pidfd_open(run.process.pid)
            stack.callback(os.close, ended)
            left[ended] = run
        while left:
            over = wait(list(left))
            for ended in [one for one in left if one in over]:
                yield left.pop(ended)


@contextmanager
def _passed_on() -> Iterator[list[CommandRun]]:
    """Pass signals on to the runs in a list; end what is left of them after all."""
    runs: list[CommandRun] = []

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        for run in runs:
            run.process.send_signal(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, receive) for number in signals}
    try:
        yield runs
    finally:
        for run in runs:
            run.end()
        for number, handler in before.items():
            signal.signal(number, handler)
