"""Paired runs of two sides on one machine, interleaved where possible."""

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
from kvctl.lab.results.result import Repetition, Result, read
from kvctl.lab.run_turns import FIRST, SECOND

BASE, NEW = "base", "new"
EXIT_WRONG_USE = 2
EXITS_INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)
END_S = 20.0
"""Time for a cancelled run to stop its own processes."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each side."""

    base: Result
    new: Result


@dataclass(slots=True)
class PairedRuns:
    """A number of pairs; the runs of a complete pair are saved in a folder per side."""

    labels: tuple[str, str]
    folder: Path
    run_pair: Callable[[int], Pair]
    """Runs the pair of this number, from 0."""
    name: str = field(default_factory=lambda: secrets.token_hex(4))

    def run(self, num_pairs: int) -> Comparison:
        """Run all pairs and compare them; stop at an interrupted pair and omit it.

        Raises:
            SetupError: interrupted before one pair was complete.
        """
        base: list[Result] = []
        new: list[Result] = []
        for number in range(num_pairs):
            try:
                pair = self.run_pair(number)
            except KeyboardInterrupt:
                break
            if pair.base.interrupted or pair.new.interrupted:
                break
            base.append(self._save(pair.base, BASE, number))
            new.append(self._save(pair.new, NEW, number))
        if not new:
            raise SetupError("interrupted before both sides had a run")
        return compare(base, new, self.labels)

    def _save(self, result: Result, side: str, number: int) -> Result:
        result = replace(result, repetition=Repetition(self.name, side, number))
        result.save(self.folder / side)
        return result


@dataclass(frozen=True, slots=True)
class CommandRun:
    """A running process of one side, which saves its result in an empty folder."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    """Receives stderr."""

    def result(self) -> Result:
        """Wait for the process and read its result, including one with problems.

        Raises:
            SetupError: the run could not start; with the last line of its stderr.
            KeyboardInterrupt: it was interrupted before its load began.
        """
        code = self.process.wait()
        if code in EXITS_INTERRUPTED:
            raise KeyboardInterrupt
        files = list(self.folder.glob("*.json"))
        if code == EXIT_WRONG_USE or len(files) != 1:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {code}"
            raise SetupError(reason.removeprefix("kvctl: "))
        return read(files[0])

    def stop(self) -> None:
        """Stop the process and the processes it started."""
        self.process.terminate()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True, slots=True)
class Command:
    """The `kvctl bench run` command of one side and installation."""

    python: str
    arguments: Sequence[str]
    """Scenario and flags without --out."""
    cwd: Path | None = None

    def start(self, folder: Path, *more: str) -> CommandRun:
        """Start a run that saves its result in a folder."""
        command = [self.python, "-m", "kvctl", "bench", "run", *self.arguments, *more]
        log = folder.with_suffix(".log")
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, "--out", str(folder)],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=self.cwd,
                start_new_session=True,
            )
        return CommandRun(process, folder, log)


@dataclass(frozen=True, slots=True)
class InterleavedRuns:
    """Runs pairs of two commands: concurrently, in turns, or one after the other.

    The first side alternates from pair to pair, so that neither always finds caches
    warm.
    """

    base: Command
    new: Command
    in_turns: bool

    def __call__(self, number: int) -> Pair:
        """Run a pair.

        Raises:
            SetupError: a run could not start; with the last line of its stderr.
            KeyboardInterrupt: a signal was received before the load began.
        """
        order = (BASE, NEW) if number % 2 == 0 else (NEW, BASE)
        commands = {BASE: self.base, NEW: self.new}
        with (
            tempfile.TemporaryDirectory(prefix="kvlab-") as name,
            _forwarded_signals() as runs,
        ):
            folder, found = Path(name), {}
            for side, place in zip(order, (FIRST, SECOND), strict=True):
                turns = ("--turns", f"{place}:{folder / 'turns'}")
                flags = turns if self.in_turns else ()
                runs.append(commands[side].start(folder / side, *flags))
                if not self.in_turns:
                    found[side] = runs[-1].result()
            if self.in_turns:  # If one cannot start, the other must not wait for it.
                found = {run.folder.name: run.result() for run in _by_end(runs)}
            return Pair(found[BASE], found[NEW])


def _by_end(runs: Sequence[CommandRun]) -> Iterator[CommandRun]:
    """Yield runs in the order in which they end."""
    with ExitStack() as stack:
        left: dict[int, CommandRun] = {}
        for run in runs:
            ended = os.pidfd_open(run.process.pid)
            stack.callback(os.close, ended)
            left[ended] = run
        while left:
            ready = wait(list(left))
            for ended in [one for one in left if one in ready]:
                yield left.pop(ended)


@contextmanager
def _forwarded_signals() -> Iterator[list[CommandRun]]:
    """Yield a list of runs; forward signals to them and stop them at the end."""
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
            run.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
