"""`kvctl bench`: simulate engines against a server, measure and compare."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcore.errors import SetupError
from kvctl import console
from kvctl.lab.compare import fail_rules
from kvctl.lab.config.scenario import OURS, SystemSpec

if TYPE_CHECKING:
    from kvctl.lab.compare.comparison import Comparison
    from kvctl.lab.compare.paired_runs import Pair
    from kvctl.lab.config.scenario import Scenario

app = typer.Typer(add_completion=False, no_args_is_help=True)

EXIT_PROBLEM = 1


@app.callback()
def bench() -> None:
    """Simulate engines against a server, measure and compare."""


ScenarioFile = Annotated[
    Path, typer.Argument(help="a TOML file, or the name of a bundled scenario")
]
FailOn = Annotated[str, typer.Option("--fail-on", help=fail_rules.HELP)]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="compare results of different machines")
]


@app.command()
def run(
    scenario: ScenarioFile,
    trace: Annotated[
        Path | None, typer.Option(help="trace file, for a workload that replays one")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="address of a running server (default: start one)"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="set a key of the scenario: KEY=VALUE"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the result")] = Path(
        "results/runs"
    ),
    seed: Annotated[int, typer.Option(min=0, help="seed of all random numbers")] = 0,
    versus: Annotated[
        Path | None, typer.Option(help="compare with another scenario, in paired runs")
    ] = None,
    versus_set: Annotated[
        list[str] | None,
        typer.Option(
            "--versus-set", help="compare with this scenario with KEY=VALUE set"
        ),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, max=100, help="number of runs, or of pairs")
    ] = 1,
    system: Annotated[
        str, typer.Option(help="system under load: kvctl, lmcache, valkey")
    ] = OURS,
    system_python: Annotated[
        str | None, typer.Option(help="Python in which that system is installed")
    ] = None,
    versus_system: Annotated[
        str | None, typer.Option(help="compare with another system, in paired runs")
    ] = None,
    versus_system_python: Annotated[
        str | None, typer.Option(help="Python of the other system")
    ] = None,
    fail_on: FailOn = fail_rules.DEFAULT,
    turns: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run a scenario, print the results and save them as JSON.

    Exit code 1 for wrong bytes, errors, a missed limit, or a regression of
    the other side. Ctrl-C stops the load and keeps the results so far.
    """
    from kvctl.lab.config.scenario import find_scenario
    from kvctl.lab.vllm import vllm_scenario as served

    scenario = find_scenario(str(scenario))
    versus = find_scenario(str(versus)) if versus else None
    if out.exists() and not out.is_dir():
        raise SetupError(f"--out {out}: not a folder")
    rules = fail_rules.FailRules(fail_on)
    settings = list(overrides or ())
    if served.is_served(scenario):
        if server or versus or versus_set or versus_system or system != OURS:
            raise SetupError(
                f"{scenario}: a scenario with real engines takes no --server, "
                "--system or --versus"
            )
        _serve(scenario, settings, trace, seed, out)
        return
    base = RunOptions(
        scenario, settings, trace, seed, server, SystemSpec(system, system_python)
    )
    if versus is None and versus_system is None and not versus_set:
        if not _run(base, out, repeat, turns):
            raise typer.Exit(EXIT_PROBLEM)
        return
    other = SystemSpec(versus_system or system, versus_system_python or system_python)
    new = replace(
        base, scenario=versus or scenario, system=other, versus=versus_set or ()
    )
    folder = out / f"{scenario.stem}-versus-{time.strftime('%Y%m%dT%H%M%S')}"
    found = _run_pairs(base, new, repeat, folder)
    _finish(found, rules, folder)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="trace file")],
    policy: Annotated[
        str | None,
        typer.Option(help="eviction policies, comma-separated (default: all)"),
    ] = None,
    capacity: Annotated[
        str, typer.Option(help="blocks, or shares of the trace's unique blocks")
    ] = "1%,5%,10%,20%,50%",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Count a trace's hits under the server's eviction policies, copying no data.

    Upper bounds: an infinite cache, and Belady's optimal eviction.
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
    base: Annotated[Path, typer.Argument(help="result file, or folder of repetitions")],
    new: Annotated[Path, typer.Argument(help="result file or folder to compare")],
    fail_on: FailOn = fail_rules.DEFAULT,
    anyway: Anyway = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print Markdown")
    ] = False,
) -> None:
    """Compare results: counts exactly, timings by the spread of repetitions.

    Exit code 1 for a regression; 0 if not, or if the runs cannot tell.
    """
    from kvctl.lab.compare.comparison import compare as compare_results
    from kvctl.lab.compare.comparison import read_results

    rules = fail_rules.FailRules(fail_on)
    labels = (base.stem, new.stem)
    sides = read_results(base), read_results(new)
    found = compare_results(*sides, labels, allow_unlike=anyway)
    _finish(found, rules, None, markdown=markdown)


@app.command()
def regress(
    base: Annotated[str, typer.Option(help="commit to compare with")] = "HEAD",
    scenario: ScenarioFile = Path("scenarios/regress.toml"),
    repeat: Annotated[int, typer.Option(min=1, max=100, help="number of pairs")] = 20,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path(
        "results/runs/regress"
    ),
    fail_on: FailOn = fail_rules.DEFAULT,
) -> None:
    """Compare the working tree with a commit, both installed, in paired runs.

    Timings are compared with the commit, counts also with results/baselines.
    Exit code 1 for a regression.
    """
    from kvctl.lab.config.scenario import find_scenario
    from kvctl.lab.regression import RegressionCheck, markdown

    scenario = find_scenario(str(scenario))
    folder = out / time.strftime("%Y%m%dT%H%M%S")
    plan = RegressionCheck(
        Path.cwd(), base, scenario, repeat, folder, fail_rules.FailRules(fail_on)
    )
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
            help="result files, folders of repetitions, or a folder of `run "
            "--versus`; the first is compared with each other"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="file to write: .html, .md or .svg"),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print Markdown")
    ] = False,
) -> None:
    """Show results, or write them as a page that works offline, Markdown or SVG."""
    from kvctl.lab.page.html_page import save_page
    from kvctl.lab.report.result_collection import ResultCollection

    collection = ResultCollection.read(results)
    if out is not None:
        match out.suffix:
            case ".html":
                save_page(collection, out)
            case ".md":
                console.write_text(out, collection.render_markdown() + "\n")
            case ".svg":
                title = f"kvctl bench report {results[0].name}"
                console.save_svg(out, title, *collection.build_tables())
            case _:
                raise SetupError(f"--out {out}: must end in .html, .md or .svg")
        console.line(f"wrote {out}")
    if markdown:
        console.line(collection.render_markdown())
    elif out is None:
        console.show(*collection.build_tables())


@app.command()
def traces(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="names of traces to download, or their prefixes"),
    ] = None,
    folder: Annotated[Path, typer.Option(help="folder for the downloads")] = Path(
        "traces"
    ),
) -> None:
    """List public traces, or download those named and check their sha256."""
    from kvctl.lab.traces import trace_catalogue as catalogue
    from kvctl.views import trace_tables as trace_view

    if not names:
        console.show(*trace_view.list_catalogue(catalogue.CATALOGUE))
        return
    for name in names:
        for trace in catalogue.find(name):
            path = catalogue.fetch(trace, folder)
            found = f"sha256 {catalogue.sha256_of(path)}"
            known = "as published" if trace.sha256 else "not checked: none is published"
            console.line(f"{path}: {trace.licence}, from {trace.source}")
            console.line(f"  {found}, {known}")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of `bench run` for one side."""

    scenario: Path
    settings: list[str]
    trace: Path | None
    seed: int
    server: str | None
    system: SystemSpec
    versus: Sequence[str] = ()
    """Settings of `--versus-set`."""

    def read(self) -> Scenario:
        """Return the scenario.

        Raises:
            SetupError: the file or a setting is wrong; it names the flag.
        """
        from kvctl.lab.config.scenario import read

        try:
            return read(self.scenario, [*self.settings, *self.versus], self.trace)
        except SetupError as error:
            text = error.message
            if text.startswith(tuple(f"--set {one}" for one in self.versus)):
                raise SetupError(f"--versus-set{text.removeprefix('--set')}") from None
            raise

    def arguments(self) -> list[str]:
        """Return the arguments of `bench run`."""
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
    """Run a scenario with real engines and show its result."""
    from kvctl.lab.results.result import check_folder
    from kvctl.lab.vllm import vllm_scenario as served

    name, read = scenario.stem, served.read(scenario, settings, trace)
    check_folder(out)
    with console.progress(name) as progress:
        result = served.run(name, read, seed, progress.update)
    path = result.save(out)
    console.show(*served.build_tables(result))
    console.line(f"saved {path}")
    if result.problems:
        raise typer.Exit(EXIT_PROBLEM)


def _run(one: RunOptions, out: Path, repeat: int, turns: str | None) -> bool:
    """Run and show; return whether no run had a problem."""
    from kvctl.lab import runner as driver
    from kvctl.lab.report import result_tables
    from kvctl.lab.results.result import check_folder

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
                progress.update,
                turns,
                one.system,
            )
        path = result.save(out)
        console.show(*result_tables.build_tables(result))
        console.line(f"saved {path}")
        fine = fine and not result.problems
        if result.interrupted:
            break
    return fine


def _run_pairs(
    base: RunOptions, new: RunOptions, repeat: int, folder: Path
) -> Comparison:
    from kvctl.lab.compare.paired_runs import Command, InterleavedRuns, PairedRuns
    from kvctl.lab.results.result import check_folder
    from kvctl.lab.run_turns import can_interleave, fit_in_memory

    sides = base.read(), new.read()
    in_turns = all(map(can_interleave, sides)) and fit_in_memory(*sides)
    check_folder(folder)
    interleaved = InterleavedRuns(
        Command(sys.executable, base.arguments()),
        Command(sys.executable, new.arguments()),
        in_turns,
    )
    with console.progress("comparing") as progress:

        def run_pair(number: int) -> Pair:
            progress.update(number / repeat, f"pair {number + 1} of {repeat}")
            return interleaved(number)

        return PairedRuns(_labels(base, new), folder, run_pair).run(repeat)


def _labels(base: RunOptions, new: RunOptions) -> tuple[str, str]:
    """Return names of the sides: their systems, scenarios or settings."""
    if base.system.name != new.system.name:
        return base.system.name, new.system.name
    if base.scenario != new.scenario:
        return base.scenario.stem, new.scenario.stem
    return base.scenario.stem, " ".join(new.versus)


def _finish(
    found: Comparison,
    rules: fail_rules.FailRules,
    folder: Path | None,
    *,
    markdown: bool = False,
) -> None:
    """Save and show a comparison; exit with 1 for a regression."""
    from kvctl.lab.report import comparison_report

    if folder is not None:
        found.save(folder)
    if markdown:
        console.line(comparison_report.render_markdown(found))
    else:
        console.show(*comparison_report.build_tables(found))
    if folder is not None:
        console.line(f"saved {folder}")
    regressions = rules.find_regressions(found)
    for line in regressions:
        console.line(f"regression: {line}")
    if regressions:
        raise typer.Exit(EXIT_PROBLEM)
