"""`kvctl inspect`: look inside a server, a layout, the protocol, options, a result."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvcore.client import KVClient
from kvcore.config import ServerConfig
from kvcore.errors import SetupError
from kvcore.options import describe
from kvcore.protocol import StatusReply, Why
from kvcore.status import InstanceStatus
from kvctl import console
from kvctl.lab.config import model_geometry as geometry
from kvctl.views import protocol_tables as protocol_view
from kvctl.views import status_tables as status_view
from kvctl.views.layout_tables import LayoutPage

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Look inside a server, a layout, a scenario, a trace, a result.",
)

TIMEOUT_S = 1.2
REFRESH_S = 1.0
UNBOUNDED = 1 << 62
"""Bytes of a handle whose size is not known here; the server checked it."""

DEFAULTS = ServerConfig()
ServerOption = Annotated[str, typer.Option("--server", help="the server's address")]


@app.command()
def server(
    address: ServerOption = DEFAULTS.address,
    watch: Annotated[
        bool, typer.Option("--watch", help="show again every second")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Show a server's registrations, memory, sessions, leases and counters."""
    if as_json:
        encoded = msgspec.json.encode(_status(address))
        console.line(msgspec.json.format(encoded).decode())
        return
    if not watch:
        console.show(*status_view.parts(_status(address)))
        return
    shown = status_view.parts(_status(address))
    with suppress(KeyboardInterrupt), console.live(*shown) as update:
        while not threading.Event().wait(REFRESH_S):
            update(*status_view.parts(_status(address)))


@app.command()
def why(
    about: Annotated[
        str,
        typer.Argument(help="a request's id, ENGINE/REQUEST, or digits of a chunk"),
    ],
    address: ServerOption = DEFAULTS.address,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Tell why a lookup missed: never stored, evicted, not all ranks, tier failed..."""
    with KVClient(address, timeout_s=TIMEOUT_S) as client:
        reply = client.call(Why(about))
    if as_json:
        console.line(msgspec.json.format(msgspec.json.encode(reply)).decode())
    else:
        rows = tuple((finding.code, finding.message) for finding in reply.findings)
        console.show(console.Table(f"why {about}", ("code", "what is known"), rows))


@app.command()
def layout(
    preset: Annotated[
        str | None, typer.Option(help="geometry of a model, such as llama-3.1-8b")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--server", help="a server with a live registration")
    ] = None,
    instance: Annotated[
        str | None, typer.Option(help="its instance; the first where left out")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="tokens a chunk (default the server's)")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="tokens a block, with --preset")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="ranks, with --preset (default 1)")
    ] = None,
) -> None:
    """Show a cache's axes, its chunk's parts and bytes, and the runs of a copy."""
    if (preset is None) == (address is None):
        raise SetupError("inspect layout: give either --preset or --server")
    if preset is not None and instance is not None:
        raise SetupError(f"--instance {instance}: one of a --server's")
    if address is not None and (block_size is not None or world_size is not None):
        raise SetupError("--block-size, --world-size: the server knows them")
    if address is not None:
        status = _status(address)
        one = _instance(status, instance)
        page = LayoutPage(
            name=f"{one.model}, {one.instance_id}",
            groups=one.group_descriptions,
            handle_bytes=_unbounded(one),
            world_size=one.world_size,
            chunk_size=chunk_size or status.chunk_size,
        )
    else:
        page = _preset_page(str(preset), block_size, world_size or 1, chunk_size)
    console.show(*page.parts())


@app.command()
def protocol(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="the page docs/protocol.md")
    ] = False,
) -> None:
    """Show every request, its fields and its reply, and the error codes."""
    if markdown:
        console.line(protocol_view.markdown().rstrip("\n"))
    else:
        console.show(*protocol_view.tables())


@app.command()
def result(
    file: Annotated[
        Path | None, typer.Argument(help="a JSON that `kvctl bench run` saved")
    ] = None,
    as_schema: Annotated[
        bool, typer.Option("--schema", help="the JSON Schema of all such files")
    ] = False,
) -> None:
    """Show a saved result again."""
    from kvctl.lab.report import result_tables as report
    from kvctl.lab.results.result import read, schema

    if as_schema == (file is not None):
        raise SetupError("inspect result: give either FILE or --schema")
    if file is None:
        encoded = msgspec.json.encode(schema(), order="sorted")
        console.line(msgspec.json.format(encoded).decode())
    else:
        console.show(*report.parts(read(file)))


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="a trace, or a folder of sessions")],
    format_name: Annotated[
        str, typer.Option("--format", help="where the file's beginning does not tell")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Show a trace's requests, span, lengths, reuse and ideal hit rate."""
    from kvctl.lab.config.workload_config import Trace
    from kvctl.lab.traces import ragpulse_trace as ragpulse
    from kvctl.lab.traces import trace_reader as reader
    from kvctl.lab.traces.trace_profile import profile, profile_contents
    from kvctl.views import trace_tables as trace_view

    settings = {"kind": "trace", "trace": str(file), "format": format_name}
    try:
        wanted = msgspec.convert(settings, Trace)
    except msgspec.ValidationError:
        known = ", ".join(("auto", *reader.SIGNS))
        raise SetupError(f"--format {format_name}: known are {known}") from None
    name = reader.detect(file) if wanted.format == "auto" else wanted.format
    if name == "ragpulse":
        found = profile_contents(ragpulse.read(file))
    else:
        found = profile(reader.read(wanted))
    if as_json:
        console.line(msgspec.json.encode(found).decode())
    else:
        console.show(*trace_view.parts(file.name, name, found))


@app.command()
def scenario(
    file: Annotated[
        Path | None, typer.Argument(help="a TOML file, see scenarios/")
    ] = None,
    trace_file: Annotated[
        Path | None, typer.Option("--trace", help="of a replaying workload")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="any key, as key=value")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of everything drawn")] = 0,
    schema: Annotated[
        bool, typer.Option("--schema", help="the JSON Schema for editors")
    ] = False,
) -> None:
    """Check a scenario and explain it: what it asks, of whom, how much that is."""
    from kvctl.lab.config.scenario import read
    from kvctl.lab.vllm import vllm_scenario as served
    from kvctl.views import scenario_tables as scenario_view

    if schema:
        encoded = msgspec.json.encode(scenario_view.schema())
        console.line(msgspec.json.format(encoded).decode())
        return
    if file is None:
        raise SetupError("inspect scenario: give a FILE, or --schema")
    settings = list(overrides or ())
    if served.is_served(file):
        real = served.read(file, settings, trace_file)
        console.show(*scenario_view.served_parts(file.stem, real, seed))
        return
    played = read(file, settings, trace_file)
    console.show(*scenario_view.parts(file.stem, played, seed))


@app.command()
def config() -> None:
    """Show the options of `kvctl serve`: file keys, also for --set."""
    columns = ("key", "type", "default", "meaning")
    rows = tuple(
        (option.key, option.type, option.default, option.description)
        for option in describe(ServerConfig)
    )
    console.show(console.Table("options of the server", columns, rows))


def _status(address: str) -> StatusReply:
    with KVClient(address, timeout_s=TIMEOUT_S) as client:
        return client.status()


def _instance(status: StatusReply, wanted: str | None) -> InstanceStatus:
    for one in status.instances:
        if wanted in (None, one.instance_id):
            return one
    if not status.instances:
        raise SetupError(f"no instance is registered at {status.address}")
    known = ", ".join(one.instance_id for one in status.instances)
    raise SetupError(f"--instance {wanted}: registered are {known}")


def _unbounded(one: InstanceStatus) -> list[int]:
    tensors = (tensor for group in one.group_descriptions for tensor in group.tensors)
    return [UNBOUNDED] * (1 + max(tensor.handle for tensor in tensors))


def _preset_page(
    name: str, block_size: int | None, world_size: int, chunk_size: int | None
) -> LayoutPage:
    shape = geometry.preset(name)
    if block_size is not None:
        shape = msgspec.structs.replace(shape, block_size=block_size)
    chunk_size = chunk_size or DEFAULTS.chunk_size
    cache = shape.groups(chunk_size // shape.block_size or 1, 0, world_size)
    return LayoutPage(
        name=name,
        groups=cache.groups,
        handle_bytes=cache.handle_bytes,
        world_size=world_size,
        chunk_size=chunk_size,
    )
