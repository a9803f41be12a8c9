"""`kvctl inspect`: show a server, layouts, the protocol, options, files."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from kvcore.client import KVClient
from kvcore.config import ServerConfig
from kvcore.errors import SetupError
from kvcore.option_structs import describe
from kvcore.protocol import StatusReply, Why
from kvcore.status import InstanceStatus
from kvctl import console
from kvctl.lab.config import model_geometry as geometry
from kvctl.views import protocol_tables as protocol_view
from kvctl.views import status_tables as status_view
from kvctl.views.layout_tables import LayoutTables

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Show a server, a layout, a scenario, a trace, a result, the protocol.",
)

TIMEOUT_S = 1.2
REFRESH_S = 1.0
UNBOUNDED = 1 << 62
"""Size of a handle that only the server knows."""

DEFAULTS = ServerConfig()
ServerOption = Annotated[str, typer.Option("--server", help="address of the server")]


@app.command()
def server(
    address: ServerOption = DEFAULTS.address,
    watch: Annotated[
        bool, typer.Option("--watch", help="refresh every second")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show a server's registrations, memory, sessions, leases and counters."""
    if as_json:
        _print_json(_status(address))
        return
    if not watch:
        console.show(*status_view.build_tables(_status(address)))
        return
    shown = status_view.build_tables(_status(address))
    with suppress(KeyboardInterrupt), console.live(*shown) as update:
        while not threading.Event().wait(REFRESH_S):
            update(*status_view.build_tables(_status(address)))


@app.command()
def why(
    about: Annotated[
        str,
        typer.Argument(help="request id, ENGINE/REQUEST, or prefix of a chunk hash"),
    ],
    address: ServerOption = DEFAULTS.address,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Explain why a lookup missed: never stored, evicted, tier failed, ..."""
    with KVClient(address, timeout_s=TIMEOUT_S) as client:
        reply = client.call(Why(about))
    if as_json:
        _print_json(reply)
    else:
        rows = tuple((finding.code, finding.message) for finding in reply.findings)
        console.show(console.Table(f"why {about}", ("code", "explanation"), rows))


@app.command()
def layout(
    preset: Annotated[
        str | None, typer.Option(help="model geometry, such as llama-3.1-8b")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--server", help="server with a registered cache")
    ] = None,
    instance: Annotated[
        str | None, typer.Option(help="instance of that server (default: the first)")
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(min=1, help="tokens per chunk (default: as the server)"),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="tokens per block, with --preset")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="ranks, with --preset (default 1)")
    ] = None,
) -> None:
    """Show the axes of a cache, parts and bytes per chunk, and runs per copy."""
    if (preset is None) == (address is None):
        raise SetupError("inspect layout: give either --preset or --server")
    if preset is not None and instance is not None:
        raise SetupError(f"--instance {instance}: needs --server")
    if address is not None and (block_size is not None or world_size is not None):
        raise SetupError("--block-size, --world-size: need --preset")
    if address is not None:
        status = _status(address)
        one = _instance(status, instance)
        page = LayoutTables(
            name=f"{one.model}, {one.instance_id}",
            groups=one.group_descriptions,
            handle_bytes=_unbounded(one),
            world_size=one.world_size,
            chunk_size=chunk_size or status.chunk_size,
        )
    else:
        page = _preset_page(str(preset), block_size, world_size or 1, chunk_size)
    console.show(*page.build_tables())


@app.command()
def protocol(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the page docs/protocol.md")
    ] = False,
) -> None:
    """Show all requests with fields and replies, and the error codes."""
    if markdown:
        console.line(protocol_view.render_markdown().rstrip("\n"))
    else:
        console.show(*protocol_view.build_tables())


@app.command()
def result(
    file: Annotated[
        Path | None, typer.Argument(help="result file of `kvctl bench run`")
    ] = None,
    as_schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON Schema of results")
    ] = False,
) -> None:
    """Show a saved result."""
    from kvctl.lab.report.result_tables import build_tables
    from kvctl.lab.results.result import read, schema

    if as_schema == (file is not None):
        raise SetupError("inspect result: give either FILE or --schema")
    if file is None:
        _print_json(schema(), order="sorted")
    else:
        console.show(*build_tables(read(file)))


@app.command()
def trace(
    file: Annotated[
        Path, typer.Argument(help="trace file, or folder of session files")
    ],
    format_name: Annotated[
        str, typer.Option("--format", help="format (default: detect)")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show requests, duration, lengths, reuse and the ideal hit rate of a trace."""
    from kvctl.lab.config.workload_config import Trace
    from kvctl.lab.traces import ragpulse_trace as ragpulse
    from kvctl.lab.traces import trace_reader as reader
    from kvctl.lab.traces.trace_profile import profile
    from kvctl.views import trace_tables as trace_view

    settings = {"kind": "trace", "trace": str(file), "format": format_name}
    try:
        config = msgspec.convert(settings, Trace)
    except msgspec.ValidationError:
        known = ", ".join(("auto", *reader.SIGNS))
        raise SetupError(f"--format {format_name}: known are {known}") from None
    name = reader.detect(file) if config.format == "auto" else config.format
    rows = ragpulse.read(file) if name == "ragpulse" else reader.read(config)
    found = profile(rows)
    if as_json:
        console.line(msgspec.json.encode(found).decode())
    else:
        console.show(*trace_view.build_tables(file.name, name, found))


@app.command()
def scenario(
    file: Annotated[
        Path | None,
        typer.Argument(help="a TOML file, or the name of a bundled scenario"),
    ] = None,
    trace_file: Annotated[
        Path | None,
        typer.Option("--trace", help="trace file, for a workload that replays one"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="set a key: KEY=VALUE")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of all random numbers")] = 0,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON Schema of scenarios")
    ] = False,
) -> None:
    """Check a scenario, and show its engines, workload, load and limits."""
    from kvctl.lab.config.scenario import find_scenario, read
    from kvctl.lab.vllm import vllm_scenario as served
    from kvctl.views import scenario_tables as scenario_view

    if schema:
        _print_json(scenario_view.schema())
        return
    if file is None:
        raise SetupError("inspect scenario: give a FILE or a name, or --schema")
    file = find_scenario(str(file))
    settings = list(overrides or ())
    if served.is_served(file):
        real = served.read(file, settings, trace_file)
        console.show(*scenario_view.build_vllm_tables(file.stem, real, seed))
        return
    simulated = read(file, settings, trace_file)
    console.show(*scenario_view.build_tables(file.stem, simulated, seed))


@app.command()
def config() -> None:
    """Show all options of `kvctl serve`: keys of its file and of --set."""
    columns = ("key", "type", "default", "meaning")
    rows = tuple(
        (option.key, option.type, option.default, option.description)
        for option in describe(ServerConfig)
    )
    console.show(console.Table("server options", columns, rows))


def _print_json(value: object, order: Literal["sorted"] | None = None) -> None:
    encoded = msgspec.json.encode(value, order=order)
    console.line(msgspec.json.format(encoded).decode())


def _status(address: str) -> StatusReply:
    with KVClient(address, timeout_s=TIMEOUT_S) as client:
        return client.status()


def _instance(status: StatusReply, name: str | None) -> InstanceStatus:
    for one in status.instances:
        if name in (None, one.instance_id):
            return one
    if not status.instances:
        raise SetupError(f"no instance is registered at {status.address}")
    known = ", ".join(one.instance_id for one in status.instances)
    raise SetupError(f"--instance {name}: registered are {known}")


def _unbounded(one: InstanceStatus) -> list[int]:
    tensors = (tensor for group in one.group_descriptions for tensor in group.tensors)
    return [UNBOUNDED] * (1 + max(tensor.handle for tensor in tensors))


def _preset_page(
    name: str, block_size: int | None, world_size: int, chunk_size: int | None
) -> LayoutTables:
    shape = geometry.preset(name)
    if block_size is not None:
        shape = msgspec.structs.replace(shape, block_size=block_size)
    chunk_size = chunk_size or DEFAULTS.chunk_size
    cache = shape.groups(chunk_size // shape.block_size or 1, 0, world_size)
    return LayoutTables(
        name=name,
        groups=cache.groups,
        handle_bytes=cache.handle_bytes,
        world_size=world_size,
        chunk_size=chunk_size,
    )
