"""`kvctl serve`: run a cache server."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from kvcore.config import ServerConfig
from kvcore.errors import SetupError
from kvcore.option_structs import describe, flag_name, load
from kvcore.private_file import open_private
from kvctl import console

app = typer.Typer(add_completion=False)

_OPTIONS = {option.key: option for option in describe(ServerConfig)}


def _flag(key: str) -> Any:
    option = _OPTIONS[key]
    default = "" if option.default == "none" else f" (default {option.default})"
    return typer.Option(flag_name(key), help=option.description + default)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of options; flags override it")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="port of the tcp address; 0: any free port"
        ),
    ] = None,
    address: Annotated[str | None, _flag("address")] = None,
    l1_size: Annotated[str | None, _flag("l1.size")] = None,
    chunk_size: Annotated[int | None, _flag("chunk_size")] = None,
    engine: Annotated[str | None, _flag("engine")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of a tier below L1; repeat for several, in lookup order"
        ),
    ] = None,
    ready_file: Annotated[str | None, _flag("ready_file")] = None,
    metrics_port: Annotated[int | None, _flag("metrics_port")] = None,
    record: Annotated[str | None, _flag("record")] = None,
    log_level: Annotated[str | None, _flag("log_level")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="set any option: KEY=VALUE; `kvctl inspect config` lists them"
        ),
    ] = None,
) -> None:
    """Run a cache server until SIGINT or SIGTERM."""
    flags = {
        "address": address,
        "l1.size": l1_size,
        "chunk_size": chunk_size,
        "tiers": tier,
        "engine": engine,
        "device": device,
        "ready_file": ready_file,
        "metrics_port": metrics_port,
        "record": record,
        "log_level": log_level,
    }
    options = load(ServerConfig, config, overrides or (), flags)
    if port is not None:
        options = _with_port(options, port)
    _log_to_stderr(options.log_level)
    _run(options)


def _run(options: ServerConfig) -> None:
    from kvcore.server.application import run

    summary = (
        f"L1 {console.size(options.l1.size)}, chunks of {options.chunk_size} tokens"
    )
    ready = None if options.ready_file is None else Path(options.ready_file)

    def on_ready(bound: str) -> None:
        if ready is not None:
            write_ready_file(ready, bound)
        console.line(f"kvctl: ready at {bound} ({summary})")

    # A killed server leaves its file, and this one is not ready yet.
    _remove(ready)
    try:
        run(options, on_ready)
    finally:
        _remove(ready)


def write_ready_file(path: Path, bound: str) -> None:
    """Write the address atomically, for this user alone.

    Raises:
        SetupError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with os.fdopen(
            open_private(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w"
        ) as file:
            file.write(f"{bound}\n")
        part.replace(path)
    except OSError as error:
        _remove(part)
        raise SetupError(f"ready_file = {path}: {error.strerror}") from None


def _remove(path: Path | None) -> None:
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _with_port(options: ServerConfig, port: int) -> ServerConfig:
    host, _, _ = options.address.rpartition(":")
    if not options.address.startswith("tcp://"):
        raise SetupError(f"--port {port}: {options.address} has no port")
    return msgspec.structs.replace(options, address=f"{host}:{port}")


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
