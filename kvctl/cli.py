"""The `kvctl` command. A subcommand's module is imported when it is called."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from kvcore import __version__
from kvcore.errors import KVError
from kvctl import console

EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130
"""What typer makes of Ctrl-C."""
EXIT_NO_ROOM = 1
"""Nothing was wrong but with where the output goes."""

COMMANDS: dict[str, Callable[[typer.Typer], Any]] = {
    "serve": get_command,
    "bench": get_group,
    "inspect": get_group,
}
"""Subcommand, and how its module's `app` becomes a command: alone, or as a group."""


class _Lazy(TyperGroup):
    """Lists the subcommands from what is said here; imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            module = import_module(f"kvctl.commands.{name}")
            command = COMMANDS[name](module.app)
        return name, command, rest


app = typer.Typer(
    cls=_Lazy,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.line(f"kvctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Serve the KV blocks that LLM engines compute, and measure it."""


@app.command()
def serve() -> None:
    """Start a cache server."""


@app.command()
def bench() -> None:
    """Play engines against a server, measure and compare."""


@app.command()
def inspect() -> None:
    """Look inside a server, a layout, a scenario, a trace, a result."""


def main() -> None:
    """Run the command line. Wrong use is one line on stderr and exit code 2."""
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(prog_name="kvctl", standalone_mode=False)
    except typer.TyperException as wrong:
        message = wrong.format_message()
        if message:
            context = getattr(wrong, "ctx", None)
            console.error(f"{context.command_path if context else 'kvctl'}: {message}")
        return EXIT_WRONG_USE
    except KVError as failed:
        console.error(f"kvctl: {failed.message}")
        return EXIT_WRONG_USE
    except OSError as failed:
        if failed.errno != errno.ENOSPC:
            raise
        console.error(f"kvctl: {failed.strerror}")
        return EXIT_NO_ROOM
    if code == EXIT_INTERRUPTED:
        console.error("kvctl: interrupted")
    return code if isinstance(code, int) else 0
