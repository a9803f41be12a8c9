"""`kvctl bench`: play engines against a server and measure."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcore.errors import SetupError
from kvctl import console
from kvctl.lab.compare import fail_rules as gate
from kvctl.lab.config.scenario import OURS, SystemSpec

if TYPE_CHECKING:
    from kvctl.lab.compare.comparison import Comparison
    from kvctl.lab.compare.paired_runs import Pair
    from kvctl.lab.config.scenario import Scenario

app = typer.Typer(add_completion=False, no_args_is_help=True)

EXIT_PROBLEM = 1


@app.callback()
def bench() -> None:
    """Play engines against a server, measure and compare."""


ScenarioFile = Annotated[Path, typer.Argument(help="a TOML file, see scenarios/")]
FailOn = Annotated[str, typer.Option("--fail-on", help=gate.HELP)]
Anyway = Annotated[bool, typer.Option("--anyway", help="compare unlike machines")]


@app.command()
def run(
    scenario: ScenarioFile,
    trace: Annotated[
        Path | None, typer.Option(help="trace file of a replaying workload")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="address of a running server; none: start one")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="any key of the scenario, as key=value"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the result")] = Path(
        "results/runs"
    ),
    seed: Annotated[int, typer.Option(min=0, help="of everything drawn")] = 0,
    versus: Annotated[
        Path | None, typer.Option(help="another scenario, played in pairs with this")
    ] = None,
    versus_set: Annotated[
        list[str] | None,
        typer.Option("--versus-set", help="likewise, this scenario with key=value"),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, max=100, help="runs, or pairs of them with --versus")
    ] = 1,
    system: Annotated[
        str, typer.Option(help="what is under the load: kvctl, lmcache, valkey")
    ] = OURS,
    system_python: Annotated[
        str | None, typer.Option(help="the Python that another system is installed in")
    ] = None,
    versus_system: Annotated[
        str | None, typer.Option(help="another system, played in pairs with the first")
    ] = None,
    versus_system_python: Annotated[
        str | None, typer.Option(help="its Python, where it differs")
    ] = None,
    fail_on: FailOn = gate.DEFAULT,
    turns: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Play a scenario; print what was measured and save it as JSON.

    Exit code 1 when bytes were wrong, errors happened, a limit was missed, or
    the other side of a comparison is a regression. Ctrl-C ends the load and
    keeps what was measured so far.
    """
    from kvctl.lab.vllm import vllm_scenario as served

    if out.exists() and not out.is_dir():
        raise SetupError(f"--out {out}: not a folder")
    rules = gate.FailRules(fail_on)
    settings = list(overrides or ())
    if served.is_served(scenario):
        if server or versus or versus_set or versus_system or system != OURS:
            raise SetupError(f"{scenario}: real engines are played alone, on our own")
        _serve(scenario, settings, trace, seed, out)
        return
    ours = FinishedRun(
        scenario, settings, trace, seed, server, SystemSpec(system, system_python)
    )
    if versus is None and versus_system is None and not versus_set:
        if not _play(ours, out, repeat, turns):
            raise typer.Exit(EXIT_PROBLEM)
        return
    theirs = FinishedRun(
        versus or scenario,
        settings,
        trace,
        seed,
        server,
        SystemSpec(versus_system or system, versus_system_python or system_python),
        versus_set or [],
    )
    folder = out / f"{scenario.stem}-versus-{time.strftime('%Y%m%dT%H%M%S')}"
    found = _contest(ours, theirs, repeat, folder)
    _judge(found, rules, folder)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="a trace that is replayed as prefixes")],
    policy: Annotated[
        str | None, typer.Option(help="eviction policies, comma-separated; all")
    ] = None,
    capacity: Annotated[
        str, typer.Option(help="blocks, or shares of the trace's unique ones")
    ] = "1%,5%,10%,20%,50%",
    as_json: Annotated[bool, typer.Option("--json", help="rows as JSON")] = False,
) -> None:
    """Count a trace's hits under the server's eviction policies, moving no bytes.

    The ideal never evicts; the optimum knows what is asked next.
    """
    import msgspec

    from kvctl.lab.workload import cache_simulation as lab

    policies = (policy or ",".join(lab.POLICIES)).split(",")
    requests = lab.load(trace)
    rows = list(lab.simulate(requests, policies, capacity.split(",")))
    if as_json:
        console.line(msgspec.json.format(msgspec.json.encode(rows)).decode())
    else:
        console.show(lab.table(requests, rows))


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="a result, or a folder of repetitions")],
    new: Annotated[Path, typer.Argument(help="likewise")],
    fail_on: FailOn = gate.DEFAULT,
    anyway: Anyway = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print Markdown")
    ] = False,
) -> None:
    """Judge results: counts exactly, timings by the spread of their repetitions.

    Exit code 0 also where the runs cannot tell; 1 for a regression.
    """
    from kvctl.lab.compare.comparison import compare as judged
    from kvctl.lab.compare.comparison import gather

    rules = gate.FailRules(fail_on)
    labels = (base.stem, new.stem)
    found = judged(gather(base), gather(new), labels, anyway=anyway)
    _judge(found, rules, None, markdown=markdown)


@app.command()
def regress(
    base: Annotated[str, typer.Option(help="the commit to compare with")] = "HEAD",
    scenario: ScenarioFile = Path("scenarios/regress.toml"),
    repeat: Annotated[int, typer.Option(min=1, max=100, help="pairs of runs")] = 20,
    out: Annotated[Path, typer.Option(help="folder for what is found")] = Path(
        "results/runs/regress"
    ),
    fail_on: FailOn = gate.DEFAULT,
) -> None:
    """Compare the working tree with a commit: both installed, played in turn.

    Timings are held against the commit, counts also against
    results/baselines. Exit code 1 for a regression.
    """
    from kvctl.lab.regression import Plan, markdown

    folder = out / time.strftime("%Y%m%dT%H%M%S")
    plan = Plan(Path.cwd(), base, scenario, repeat, folder, gate.FailRules(fail_on))
    with console.progress("regress") as progress:
        found = plan.run(progress.update)
    console.line(markdown(found))
    console.line(f"saved {folder}")
    if found.failed:
        raise typer.Exit(EXIT_PROBLEM)


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="results, folders of repetitions, or one of `run --versus`; the first "
            "is what the others are compared with"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file to write")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print Markdown")
    ] = False,
) -> None:
    """Write one page that works offline, or Markdown; else show tables."""
    from kvctl.lab.page import report_files as reports

    read = reports.collect(results)
    if out is not None:
        reports.write(read, out)
        console.line(f"wrote {out}")
    if markdown:
        console.line(reports.markdown(read))
    elif out is None:
        console.show(*reports.parts(read))


@app.command()
def traces(
    names: Annotated[
        list[str] | None, typer.Argument(help="to fetch; the beginning of a name does")
    ] = None,
    folder: Annotated[Path, typer.Option(help="to fetch into")] = Path("traces"),
) -> None:
    """List public traces, or fetch those named and check them."""
    from kvctl.lab.traces import trace_catalogue as catalogue
    from kvctl.views import trace_tables as trace_view

    if not names:
        console.show(*trace_view.catalogue(catalogue.CATALOGUE))
        return
    for name in names:
        for trace in catalogue.find(name):
            path = catalogue.fetch(trace, folder)
            found = f"sha256 {catalogue.sha256_of(path)}"
            known = "as published" if trace.sha256 else "unknown before, so not checked"
            console.line(f"{path}: {trace.licence}, from {trace.source}")
            console.line(f"  {found}, {known}")


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What one side plays."""

    scenario: Path
    settings: list[str]
    trace: Path | None
    seed: int
    server: str | None
    system: SystemSpec
    versus: Sequence[str] = ()
    """What sets it apart: `--versus-set`."""

    def read(self) -> Scenario:
        """Read its scenario.

        Raises:
            SetupError: naming the flag that was wrong.
        """
        from kvctl.lab.config.scenario import read

        try:
            return read(self.scenario, [*self.settings, *self.versus], self.trace)
        except SetupError as error:
            said = error.message
            if said.startswith(tuple(f"--set {one}" for one in self.versus)):
                raise SetupError(f"--versus-set{said.removeprefix('--set')}") from None
            raise

    def arguments(self) -> list[str]:
        """Write it as the arguments of `bench run`."""
        settings = [*self.settings, *self.versus]
        flags = [flag for one in settings for flag in ("--set", one)]
        trace = ["--trace", str(self.trace)] if self.trace else []
        server = ["--server", self.server] if self.server else []
        system = ["--system", self.system.name]
        if self.system.python:
            system += ["--system-python", self.system.python]
        seed = ["--seed", str(self.seed)]
        return [str(self.scenario), *flags, *trace, *seed, *server, *system]


def _serve(
    scenario: Path, settings: list[str], trace: Path | None, seed: int, out: Path
) -> None:
    """Send a workload to real engines and show what they answered."""
    from kvctl.lab.results.result import check_folder
    from kvctl.lab.vllm import vllm_scenario as served

    name, read = scenario.stem, served.read(scenario, settings, trace)
    check_folder(out)
    with console.progress(name) as progress:
        result = served.run(name, read, seed, progress.update)
    path = result.save(out)
    console.show(*served.parts(result))
    console.line(f"saved {path}")
    if result.problems:
        raise typer.Exit(EXIT_PROBLEM)


def _play(one: FinishedRun, out: Path, repeat: int, turns: str | None) -> bool:
    """Play and show; say whether nothing was wrong."""
    from kvctl.lab import runner as driver
    from kvctl.lab.report import result_tables as report
    from kvctl.lab.results.result import check_folder
    from kvctl.lab.runner import ConsoleProgress

    name, scenario = one.scenario.stem, one.read()
    check_folder(out)
    fine = True
    for _ in range(repeat):
        with console.progress(name) as progress:
            result = driver.run(
                name,
                scenario,
                one.seed,
                one.server,
                ConsoleProgress(progress),
                turns,
                one.system,
            )
        path = result.save(out)
        console.show(*report.parts(result))
        console.line(f"saved {path}")
        fine = fine and not result.problems
        if result.interrupted:
            break
    return fine


def _contest(
    ours: FinishedRun, theirs: FinishedRun, repeat: int, folder: Path
) -> Comparison:
    from kvctl.lab.compare.paired_runs import Command, InterleavedRuns, PairedRuns
    from kvctl.lab.interleaving import can_interleave, fit_in_memory
    from kvctl.lab.results.result import check_folder

    sides = ours.read(), theirs.read()
    in_turns = all(map(can_interleave, sides)) and fit_in_memory(*sides)
    check_folder(folder)
    base, new = (Command(sys.executable, side.arguments()) for side in (ours, theirs))
    duel = InterleavedRuns(base, new, in_turns)
    with console.progress("comparing") as progress:

        def play(number: int) -> Pair:
            progress.update(number / repeat, f"pair {number + 1} of {repeat}")
            return duel(number)

        contest = PairedRuns(_labels(ours, theirs), folder, play)
        return contest.run(repeat)


def _labels(ours: FinishedRun, theirs: FinishedRun) -> tuple[str, str]:
    """Name the sides by what sets them apart."""
    if ours.system.name != theirs.system.name:
        return ours.system.name, theirs.system.name
    if ours.scenario != theirs.scenario:
        return ours.scenario.stem, theirs.scenario.stem
    return ours.scenario.stem, " ".join(theirs.versus)


def _judge(
    found: Comparison,
    rules: gate.FailRules,
    folder: Path | None,
    *,
    markdown: bool = False,
) -> None:
    """Show a comparison and where it is saved; exit 1 where it breaks a rule."""
    from kvctl.lab.compare import comparison_tables as shown

    if folder is not None:
        found.save(folder)
    if markdown:
        console.line(shown.markdown(found))
    else:
        console.show(*shown.parts(found))
    if folder is not None:
        console.line(f"saved {folder}")
    broken = rules.broken(found)
    for line in broken:
        console.line(f"regression: {line}")
    if broken:
        raise typer.Exit(EXIT_PROBLEM)
