"""`kvctl bench`: play engines against a server and measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvcore.errors import SetupError
from kvctl import console

app = typer.Typer(add_completion=False, no_args_is_help=True)

EXIT_PROBLEM = 1


@app.callback()
def bench() -> None:
    """Play engines against a server, measure and compare."""


@app.command()
def run(
    scenario: Annotated[Path, typer.Argument(help="a TOML file, see scenarios/")],
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
) -> None:
    """Play a scenario; print what was measured and save it as JSON.

    Exit code 1 when bytes were wrong, errors happened or a limit was missed. Ctrl-C
    ends the load and keeps what was measured so far.
    """
    from kvctl.lab import driver, report
    from kvctl.lab.progress import Shown
    from kvctl.lab.scenario import read

    if out.exists() and not out.is_dir():
        raise SetupError(f"--out {out}: not a folder")
    settings = list(overrides or ())
    if trace is not None:
        settings.append(f"workload.trace={json.dumps(str(trace))}")
    played = read(scenario, settings)
    with console.progress(scenario.stem) as shown:
        result = driver.run(scenario.stem, played, seed, server, Shown(shown))
    path = result.save(out)
    console.show(*report.parts(result))
    console.line(f"saved {path}")
    if result.problems:
        raise typer.Exit(EXIT_PROBLEM)
