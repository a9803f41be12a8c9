"""A scenario: server, model, engines, workload, load, faults and limits of a run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from kvcore.config import ServerConfig
from kvcore.errors import SetupError
from kvcore.option_structs import Options, load, require
from kvctl.lab.config.arrival_config import ClosedLoop, Load, Seconds
from kvctl.lab.config.copy_settings import Copies
from kvctl.lab.config.model_geometry import Geometry, preset
from kvctl.lab.config.workload_config import Positive, Share, Workload

OURS = "kvctl"
CLONE = Path(__file__).resolve().parents[3]


class SystemSpec(msgspec.Struct, frozen=True):
    """A system under test: its name, and the Python that it is installed in."""

    name: str = OURS
    python: Annotated[
        str | None, Meta(description="Python in which another system is installed")
    ] = None
    version: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's own server."""
        return self.name == OURS


class ModelConfig(Options, frozen=True):
    """A preset of `kvctl.lab.config.model_geometry`, with overrides."""

    preset: str
    num_layers: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    dtype: str | None = None
    block_size: Positive | None = None
    window: Positive | None = None
    cache_shape: str | None = None

    def check(self) -> None:
        """Raise `SetupError` unless the preset exists."""
        preset(self.preset)

    def geometry(self) -> Geometry:
        """Return the preset with the overrides applied."""
        given = {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if name != "preset" and value is not None
        }
        return replace(preset(self.preset), **given)


class EngineModel(Options, frozen=True):
    """Compute time of an engine: steps of a continuous batch, in real time.

    Without it engines compute nothing and send the next request immediately.
    """

    prefill_tokens_per_s: Annotated[float, Meta(gt=0)] = 10_000.0
    decode_s: Annotated[
        float, Meta(ge=0, description="per decoding request and step, beside step_s")
    ] = 0.0002
    step_s: Annotated[float, Meta(gt=0, description="fixed time of a step")] = 0.01
    max_batch: Annotated[int, Meta(ge=1, description="running requests at most")] = 64
    max_batched_tokens: Annotated[
        int, Meta(ge=1, description="per step; longer prompts are prefilled in chunks")
    ] = 2048
    max_blocks: Annotated[
        Positive | None,
        Meta(description="of all running requests; default: cache_blocks"),
    ] = None
    abort_share: Annotated[
        Share,
        Meta(description="of requests aborted after lookup, in prefill or in decode"),
    ] = 0.0
    overlap_stores: Annotated[
        bool,
        Meta(description="a session's next request may begin before its store ends"),
    ] = True


class Fault(Options, frozen=True):
    """A fault that is injected into a process during the load."""

    at_s: Annotated[float, Meta(ge=0, description="after the start of the load")]
    target: Literal["server", "worker", "service"] = "server"
    action: Annotated[
        Literal["kill", "stop", "restart"],
        Meta(description="SIGKILL; SIGSTOP and later SIGCONT; SIGTERM"),
    ] = "kill"
    for_s: Annotated[
        float, Meta(ge=0, description="until the process is resumed or started again")
    ] = 1.0
    engine: Annotated[int, Meta(ge=0, description="of a worker")] = 0
    rank: Annotated[int, Meta(ge=0, description="of a worker")] = 0
    service: Annotated[str, Meta(description="name of a service")] = ""


class Service(Options, frozen=True):
    """A process that the server needs, such as the store of a tier."""

    name: str
    command: Annotated[
        tuple[str, ...], Meta(description="{folder}: a new folder, {port}: a free port")
    ]
    ready: Annotated[
        str, Meta(description="path that exists, or host:port that accepts, when ready")
    ] = ""


class Tenant(Options, frozen=True):
    """Further engines beside the scenario's own, with their own workload and load."""

    name: str
    workload: Workload
    model: ModelConfig | None = None
    load: Load | None = None
    engines: Annotated[int, Meta(ge=1, le=64)] = 1
    ranks: Annotated[int, Meta(ge=1, le=64)] | None = None
    cache_blocks: Positive | None = None


class Limits(Options, frozen=True):
    """Targets of a run; a missed one is exit code 1."""

    max_errors: Annotated[int, Meta(ge=0)] = 0
    min_hit_rate: Annotated[Share | None, Meta(description="of prompt tokens")] = None
    min_share_of_ideal: Annotated[
        Share | None, Meta(description="token hits, relative to an infinite cache")
    ] = None
    min_documents_share: Annotated[
        Share | None,
        Meta(description="chunks of documents found, relative to an infinite cache"),
    ] = None
    ttft_s: Annotated[
        Seconds | None, Meta(description="time to first token that counts as good")
    ] = None
    request_s: Annotated[
        Seconds | None, Meta(description="request latency that counts as good")
    ] = None
    min_goodput: Annotated[
        Share | None, Meta(description="share of requests within ttft_s and request_s")
    ] = None


class Scenario(Options, frozen=True):
    """One experiment, as declared in `scenarios/*.toml`."""

    model: ModelConfig
    workload: Workload
    question: Annotated[str, Meta(description="question that a run answers")] = ""
    engines: Annotated[int, Meta(ge=1, le=64)] = 1
    ranks: Annotated[int, Meta(ge=1, le=64, description="workers per engine")] = 1
    cache_blocks: Annotated[
        int, Meta(ge=1, description="blocks per group of each rank's paged cache")
    ] = 1024
    driver: Annotated[
        Literal["server", "worker"],
        Meta(description="process that copies between cache and L1"),
    ] = "server"
    device: Annotated[
        Literal["cpu", "cuda"],
        Meta(description="memory of the caches; ranks are spread over a host's GPUs"),
    ] = "cpu"
    server: ServerConfig = ServerConfig()
    hosts: Annotated[
        int,
        Meta(
            ge=1,
            le=16,
            description="simulated hosts, each with a server, an L1 and a loopback "
            "address ({host} in its tiers); engines are assigned round-robin",
        ),
    ] = 1
    load: Load = ClosedLoop()
    engine: EngineModel | None = None
    limits: Limits = Limits()
    tenants: tuple[Tenant, ...] = ()
    services: tuple[Service, ...] = ()
    faults: tuple[Fault, ...] = ()
    storm: Annotated[
        int,
        Meta(ge=0, description="rounds of registration by all ranks, before the load"),
    ] = 0
    copies: Annotated[
        Copies | None, Meta(description="copies measured after the load")
    ] = None
    timeout_s: Annotated[float, Meta(gt=0, description="of an engine's calls")] = 30.0

    def check(self) -> None:
        """Raise `SetupError` for sizes that do not fit, or faults without a target."""
        for name, part in self.parts().items():
            geometry = part.model.geometry()
            geometry.groups(1, 0, part.ranks)
            require(
                self.server.chunk_size % geometry.block_size == 0,
                "server.chunk_size",
                self.server.chunk_size,
                f"a multiple of {name}.model.block_size, {geometry.block_size}",
            )
        parts = list(self.parts().values())
        num_engines = sum(part.engines for part in parts)
        need = f"at most the number of engines, {num_engines}"
        require(self.hosts <= num_engines, "hosts", self.hosts, need)
        single_host = self.hosts == 1 or not self.faults
        require(single_host, "hosts", self.hosts, "1 in a scenario with faults")
        if self.copies:
            most = max(self.copies.workers)
            num_ranks = sum(part.engines * part.ranks for part in parts)
            need = f"at most the scenario's number of ranks, {num_ranks}"
            require(most <= num_ranks, "copies.workers", most, need)
        for number, fault in enumerate(self.faults):
            self._check_fault(f"faults[{number}]", fault)

    def _check_fault(self, key: str, fault: Fault) -> None:
        if fault.target == "worker":
            parts = list(self.parts().values())
            ranks = [part.ranks for part in parts for _ in range(part.engines)]
            require(fault.engine < len(ranks), f"{key}.engine", fault.engine, "unknown")
            known = fault.rank < ranks[fault.engine]
            require(known, f"{key}.rank", fault.rank, "unknown")
        if fault.target == "service":
            known = fault.service in [service.name for service in self.services]
            require(known, f"{key}.service", fault.service, "no service of that name")

    @property
    def cache_bytes(self) -> int:
        """Bytes of the paged caches of one engine's ranks."""
        geometry = self.model.geometry()
        token_bytes = geometry.token_bytes(self.ranks)
        return token_bytes * geometry.block_size * self.cache_blocks * self.ranks

    def parts(self) -> dict[str, Scenario]:
        """Return a scenario per tenant, by name; the scenario's own is `main`."""
        own = replace(self, tenants=(), faults=()) if self.tenants else self
        return {"main": own} | {one.name: self._of_tenant(one) for one in self.tenants}

    def _of_tenant(self, tenant: Tenant) -> Scenario:
        return replace(
            self,
            tenants=(),
            faults=(),
            model=tenant.model or self.model,
            workload=tenant.workload,
            load=tenant.load or self.load,
            engines=tenant.engines,
            ranks=tenant.ranks or self.ranks,
            cache_blocks=tenant.cache_blocks or self.cache_blocks,
        )


def read(
    path: Path, overrides: Sequence[str] = (), trace: Path | None = None
) -> Scenario:
    """Read a scenario file; `trace` is the file of `--trace`.

    Raises:
        SetupError: naming the file or flag, the key, and the nearest known key.
    """
    key = "workload.trace"
    flags = {key: None if trace is None else str(trace)}
    return load(Scenario, path, overrides, flags, {key: "--trace"})


def bundled_folder() -> Path:
    """Return the folder of the bundled scenarios: the clone's, else the wheel's."""
    clone = CLONE / "scenarios"
    if clone.is_dir() and (CLONE / "pyproject.toml").exists():
        return clone
    return Path(str(files("kvctl"))) / "scenarios"


def find_scenario(name: str) -> Path:
    """Return the scenario file of a path, or of the name of a bundled scenario.

    Raises:
        SetupError: neither exists; the message lists the nearest names.
    """
    path = Path(name)
    if path.is_file() or path.suffix or path.name != name:
        return path
    folder = bundled_folder()
    known = sorted(file.stem for file in folder.glob("*.toml"))
    if name in known:
        return folder / f"{name}.toml"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise SetupError(
        f"{name}: no such file, and no bundled scenario of that name; "
        f"nearest: {', '.join(near)}"
    )


def publish(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON Schema with its dialect, and descriptions without indentation.

    Python 3.13 strips docstrings of their indentation and 3.11 does not: the published
    text is the same with either.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_clean(schema)}


def _clean(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {
            key: cleandoc(value)
            if key == "description" and isinstance(value, str)
            else _clean(value)
            for key, value in schema.items()
        }
    return [*map(_clean, schema)] if isinstance(schema, list | tuple) else schema
