"""The `kvctl` command; the module of a subcommand is imported when it is called."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
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
"""Exit code of typer for Ctrl-C."""
EXIT_DISK_FULL = 1

COMMANDS: dict[str, Callable[[typer.Typer], Any]] = {
    "serve": get_command,
    "bench": get_group,
    "inspect": get_group,
}
"""Subcommands, and how the `app` of each module becomes a command or group."""


class _LazyGroup(TyperGroup):
    """Group that imports the module of a subcommand when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            module = import_module(f"kvctl.commands.{name}")
            command = COMMANDS[name](module.app)
        return name, command, rest


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(requested: bool) -> None:
    if requested:
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
    """KV-cache server for LLM engines, and its benchmark laboratory."""


@app.command()
def serve() -> None:
    """Run a cache server."""


@app.command()
def bench() -> None:
    """Simulate engines against a server, measure and compare."""


@app.command()
def inspect() -> None:
    """Show a server, a layout, a scenario, a trace, a result, the protocol."""


def main() -> None:
    """Run the command line; wrong usage is one line on stderr and exit code 2."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default from `sys.argv`, and return its exit code."""
    try:
        code = app(arguments, prog_name="kvctl", standalone_mode=False)
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
        return EXIT_DISK_FULL
    if code == EXIT_INTERRUPTED:
        console.error("kvctl: interrupted")
    return code if isinstance(code, int) else 0
