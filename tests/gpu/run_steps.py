"""`make gpu`: runs steps one after the other within time limits; saves one result.

    python -m tests.gpu.run_steps FOLDER [--trace FILE] [--set KEY=VALUE ...]

A step that fails or hangs does not stop the others. Its output goes to FOLDER/log.txt,
with the stacks of all of its processes if it was stopped. FOLDER/gpu.json has the GPU,
the figures of the benchmarks, how each step ended, and the targets with measured values
(`targets`). `--set` applies to all scenarios. This module does not import kvctl, which
may be what fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from tests.gpu.targets import Target, targets_of

ROOT = Path(__file__).parents[2]
BUDGET_S = 460
"""Time limit of all steps together."""
STACKS_S = 2.0
"""Time for the processes of a hung step to write their stacks."""
END_S = 20.0
"""Time for them to save partial results and end after SIGINT."""
NUM_LINES_SHOWN = 20
HEAD = "\n== "


@dataclass(frozen=True, slots=True)
class Step:
    """A command for this Python. Lines of JSON that it prints are its figures."""

    name: str
    limit_s: float
    arguments: tuple[str, ...]
    is_needed: bool = False
    """No other step runs if this one fails."""


@dataclass(slots=True)
class Ended:
    """The outcome of a step."""

    name: str
    seconds: float = 0.0
    exit_code: int | None = None
    """None: it was not started, because the time was used up."""
    hung: bool = False
    figures: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        if self.exit_code is None:
            return f"{self.name}: not started, the time is used up"
        how = "ok" if self.exit_code == 0 else f"exit code {self.exit_code}"
        hung = f"; hung, stopped after {self.seconds:.0f} s" if self.hung else ""
        return f"{self.name}: {how}, {self.seconds:.1f} s{hung}"


def steps(
    folder: Path, trace: str | None, settings: Sequence[str] = ()
) -> Iterator[Step]:
    """Yield the steps, the most important first."""

    def bench(name: str, limit_s: float, scenario: str, *more: str) -> Step:
        command = ("-m", "kvctl", "bench", "run", f"scenarios/{scenario}.toml")
        given = (part for one in settings for part in ("--set", one))
        return Step(name, limit_s, (*command, "--out", str(folder), *more, *given))

    tests = (
        *("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        *("-p", "pytest_timeout", "--timeout", "60", "--durations", "10"),
        # The steps below run the scenarios at full size.
        *("--ignore", "tests/gpu/test_scenarios.py", "tests/gpu"),
    )
    yield Step("facts", 60, ("-m", "tests.gpu.host_facts"), is_needed=True)
    yield Step("tests", 120, tests)
    for driver in ("server", "worker"):
        by = ("--set", f"driver={driver}")
        yield bench(f"store_retrieve_{driver}", 90, "h100_store_retrieve", *by, l1(10))
        yield bench(f"busy_{driver}", 50, "h100_busy", *by, l1(4))
    yield Step("first_byte", 30, ("-m", "tests.gpu.bench_first_byte"))
    if trace is not None:
        yield bench("trace", 100, "h100_llama8b_trace", "--trace", trace, l1(1 << 20))
    # Last: it loses least if the time runs out.
    yield Step("copies", 90, ("-m", "tests.gpu.bench_copies"))


def l1(wanted_gib: int) -> str:
    """Return the option for an L1 of the wanted size, or the largest that fits."""
    return f"--set=server.l1.size={min(wanted_gib, l1_gib())}GiB"


def l1_gib() -> int:
    """Return the largest L1 that free memory and /dev/shm allow, in GiB."""
    shm = os.statvfs("/dev/shm")
    memory = Path("/proc/meminfo").read_text().split()
    free = int(memory[memory.index("MemAvailable:") + 1]) * 1024
    return max(1, min(shm.f_bavail * shm.f_frsize * 9 // 10, free * 6 // 10) >> 30)


def run(step: Step, log: Path, stacks: Path, limit_s: float) -> Ended:
    """Run one step and save its output."""
    ended = Ended(step.name)
    begun = monotonic()
    with tempfile.TemporaryFile("w+") as output, log.open("a") as errors:
        errors.write(f"{HEAD}{step.name}: {' '.join(step.arguments)}\n")
        errors.flush()
        process = subprocess.Popen(
            (sys.executable, *step.arguments),
            stdout=output, stderr=errors, cwd=ROOT, start_new_session=True,
            env={**os.environ, "STACKS": str(stacks)},
        )  # fmt: skip
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            ended.hung = True
            stop(process)
        except BaseException:  # Ctrl-C or SIGTERM, which do not reach its session.
            stop(process)
            raise
        ended.exit_code = process.wait()
        ended.seconds = round(monotonic() - begun, 1)
        output.seek(0)
        for line in output:
            figure = figure_of(line)
            if figure is None:
                errors.write(line)
            else:
                ended.figures.append(figure)
        if ended.hung:
            errors.writelines(stack_lines(stacks))
    for left in stacks.iterdir():
        left.unlink()
    return ended


def figure_of(line: str) -> Any:
    """Return the value of a line of JSON; None for other lines."""
    with suppress(ValueError):
        if line.startswith("{"):
            return json.loads(line)
    return None


def stop(process: subprocess.Popen[bytes]) -> None:
    """Have all processes of a step write their stacks, then end them."""
    family = [process.pid, *descendants(process.pid)]
    for pid in family:
        if handles(pid, signal.SIGUSR1):
            send(pid, signal.SIGUSR1)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STACKS_S)
    send(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    for pid in [*family, *descendants(process.pid)]:
        send(pid, signal.SIGKILL)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def handles(pid: int, number: signal.Signals) -> bool:
    """Return whether a process handles a signal, which would end it otherwise."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def stack_lines(stacks: Path) -> Iterator[str]:
    """Yield the stacks that the processes wrote."""
    for path in sorted(stacks.iterdir()):
        command, _, threads = path.read_text().partition("\n")
        if threads:
            yield f"\n-- stacks of process {path.name}: {command}\n{threads}"


def run_steps(todo: Iterable[Step], folder: Path, budget_s: float) -> list[Ended]:
    """Run steps one after the other, and save the results after each."""
    log = folder / "log.txt"
    give_up = monotonic() + budget_s
    done: list[Ended] = []
    with tempfile.TemporaryDirectory() as stacks:
        for step in todo:
            left = give_up - monotonic()
            ended = Ended(step.name)
            if left > 0:
                ended = run(step, log, Path(stacks), min(step.limit_s, left))
            done.append(ended)
            save(folder, done)
            show(str(ended))
            if ended.hung or ended.exit_code:
                section = log.read_text(errors="replace").rpartition(HEAD)[2]
                lines = section.splitlines()
                show(*(f"    {line}" for line in lines[-NUM_LINES_SHOWN:]))
                if step.is_needed:
                    break
    return done


def save(folder: Path, done: Sequence[Ended]) -> list[Target]:
    """Write gpu.json; return the targets."""
    figures = {one.name: one.figures for one in done}
    targets = targets_of(figures, results_in(folder))
    known = {
        "targets": [asdict(one) for one in targets],
        "steps": [asdict(one) for one in done],
    }
    (folder / "gpu.json").write_text(json.dumps(known, indent=1) + "\n")
    return targets


def results_in(folder: Path) -> list[Any]:
    """Return the results that scenarios saved."""
    paths = sorted(folder.glob("h100_*.json"))
    return [json.loads(path.read_text()) for path in paths]


def show(*lines: str) -> None:
    """Print lines and flush."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def main(given: argparse.Namespace) -> int:
    """Run all steps; return 1 if one failed or hung, whatever the targets."""
    folder: Path = given.folder
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in [folder / "log.txt", *folder.glob("h100_*.json")]:
        earlier.unlink(missing_ok=True)
    done = run_steps(steps(folder, given.trace, given.set), folder, BUDGET_S)
    show("", *map(str, save(folder, done)), "", *map(str, done))
    show("" if given.trace else "no TRACE given: the trace was not replayed")
    show(f"{folder}/gpu.json has the figures, {folder}/log.txt each step's output")
    return int(any(one.hung or one.exit_code != 0 for one in done))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trace")
    parser.add_argument("--set", action="append", default=[])
    sys.exit(main(parser.parse_args()))
