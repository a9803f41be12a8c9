"""The command line: imports, help, and messages for wrong usage."""

from __future__ import annotations

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from inspect import cleandoc
from io import StringIO
from pathlib import Path

import pytest
from typer import Typer

from kvcore import __version__
from kvctl import cli
from kvctl.commands import bench, inspect

QUIET = ("serve", "--port", "0", "--log-level", "warning")
QUICK = str(Path(__file__).parents[2] / "scenarios" / "quickstart.toml")
HEAVY = ("zmq", "numpy", "torch", "prometheus_client", "kvcore.protocol")


def kvctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a new process."""
    command = [sys.executable, "-m", "kvctl", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False
    )


def run_in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves the start of a Python."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = cli.run(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_help_imports_nothing_heavy() -> None:
    """`kvctl --help` imports no subcommand and none of their libraries."""
    script = (
        "import sys\n"
        "from kvctl.cli import main\n"
        "sys.argv = ['kvctl', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 0\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("serve", "bench", "inspect"):
        assert name in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--help"),
        ("bench", "--help"),
        ("bench", "run", "--help"),
        ("inspect", "--help"),
        ("inspect", "server", "--help"),
    ],
)
def test_every_command_has_help(arguments: tuple[str, ...]) -> None:
    """Help names the full command and exits with 0."""
    done = run_in_process(*arguments)
    assert done.returncode == 0, done.stderr
    assert " ".join(("kvctl", *arguments[:-1])) in done.stdout


@pytest.mark.parametrize("app", [bench.app, inspect.app])
def test_help_fits_80_columns(app: Typer) -> None:
    """Each line of a command's docstring fits into 78 columns."""
    for command in app.registered_commands:
        lines = cleandoc(command.callback.__doc__ or "").splitlines()
        assert max(map(len, lines)) <= 78, command.callback


def test_version_is_that_of_the_library() -> None:
    """`--version` prints `kvcore.__version__`."""
    assert run_in_process("--version").stdout == f"kvctl {__version__}\n"


def test_flags_take_their_help_from_the_options() -> None:
    """A flag's help is the description of its option."""
    shown = " ".join(run_in_process("serve", "--help").stdout.replace("│", " ").split())
    assert "memory for chunks in /dev/shm, allocated at start (default 1GiB)" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prot",), "No such option: --prot"),
        (("srve",), "No such command 'srve'. Did you mean 'serve'?"),
        (("serve", "--prt", "1"), "kvctl serve: No such option: --prt"),
        (("serve", "--port", "x"), "kvctl serve: Invalid value for '--port'"),
        (("serve", "--port", "70000"), "kvctl serve: Invalid value for '--port'"),
        (("serve", "extra"), "kvctl serve: Got unexpected extra argument"),
        (("serve", "--set", "l1.sise=1"), "did you mean l1.size?"),
        (("serve", "--set", "l1"), "--set l1: must read key=value"),
        (("serve", "--l1-size", "1XiB"), "--l1-size 1XiB: l1.size: '1XiB'"),
        (("serve", "--log-level", "loud"), "--log-level loud: log_level: Invalid enum"),
        (("serve", "--config", "/nowhere.toml"), "/nowhere.toml: No such file"),
        (("serve", "--address", "ipc:///run/x", "--port", "1"), "has no port"),
        ((*QUIET, "--set", "l1.eviction=zzz"), "'zzz': known policies"),
        ((*QUIET, "--set", "l1.size=4TiB"), "/dev/shm"),
        (("bench", "run", "/nowhere.toml"), "/nowhere.toml: No such file"),
        (("inspect", "layout"), "give either --preset or --server"),
        (("inspect", "layout", "--preset", "llama-3.1-8"), "llama-3.1-8b"),
        (("inspect", "result", "/nowhere.json"), "/nowhere.json: No such file"),
        (("inspect", "server", "--server", "tcp://127.0.0.1:1"), "no server answers"),
        (("inspect", "trace", "x", "--format", "y"), "--format y: known are auto, bai"),
        (("inspect", "scenario", QUICK, "--trace", "x"), "--trace x: unknown key"),
        (
            ("bench", "run", QUICK, "--fail-on", "z"),
            "--fail-on z: comma-separated rules for a regr",
        ),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str
) -> None:
    """No usage page and no traceback: one line that names what to change."""
    # A server's logging would outlive its command in this process.
    run = kvctl if arguments[: len(QUIET)] == QUIET else run_in_process
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("kvctl")
    assert message in done.stderr


def test_error_in_a_file_has_its_line(tmp_path: Path) -> None:
    """The message names file, line, key and the nearest known key."""
    path = tmp_path / "server.toml"
    path.write_text("[l1]\nsiez = '1GiB'\n")
    done = run_in_process("serve", "--config", str(path))
    assert done.returncode == 2
    assert f"{path}:2: unknown key l1.siez; did you mean l1.size?" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--version",), ("inspect", "config"), ("inspect", "--help")]
)
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    """A full disk is reported without a traceback."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvctl", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "kvctl: No space left on device\n"
