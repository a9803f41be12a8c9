"""A scenario: the server, the model, the engines, what they are asked, and limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from kvcore.config import ServerConfig
from kvcore.options import Options, load, require
from kvctl.lab.model_geometry import Geometry, preset
from kvctl.lab.workload.copy_settings import Copies
from kvctl.lab.workload.load_config import (
    Bursts,
    ClosedLoop,
    Constant,
    Load,
    Poisson,
    Seconds,
    Sweep,
    TraceTimes,
)
from kvctl.lab.workload.workload_config import (
    Agents,
    Chat,
    Giant,
    Positive,
    Rag,
    Reuse,
    Share,
    SharedPrefix,
    Thrash,
    Trace,
    Uniform,
    Workload,
)

__all__ = [
    "Agents",
    "Bursts",
    "Chat",
    "ClosedLoop",
    "Constant",
    "EngineModel",
    "Fault",
    "Giant",
    "Limits",
    "Load",
    "ModelConfig",
    "Poisson",
    "Rag",
    "Reuse",
    "Scenario",
    "Service",
    "SharedPrefix",
    "Sweep",
    "Tenant",
    "Thrash",
    "Trace",
    "TraceTimes",
    "Uniform",
    "Workload",
    "read",
]


class ModelConfig(Options, frozen=True):
    """A preset of `kvctl.lab.model_geometry`, and what differs from it."""

    preset: str
    num_layers: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    dtype: str | None = None
    block_size: Positive | None = None
    window: Positive | None = None
    cache_shape: str | None = None

    def check(self) -> None:
        """The preset exists."""
        preset(self.preset)

    def geometry(self) -> Geometry:
        """Return the preset with what was overridden."""
        given = {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if name != "preset" and value is not None
        }
        return replace(preset(self.preset), **given)


class EngineModel(Options, frozen=True):
    """How long an engine computes: steps of a continuous batch, in real time.

    Without it engines compute nothing and ask as fast as they are answered.
    """

    prefill_tokens_per_s: Annotated[float, Meta(gt=0)] = 10_000.0
    decode_s: Annotated[
        float, Meta(ge=0, description="of one request in a step, beside step_s")
    ] = 0.0002
    step_s: Annotated[float, Meta(gt=0, description="of a step, whatever it does")] = (
        0.01
    )
    max_batch: Annotated[int, Meta(ge=1, description="requests that run at once")] = 64
    max_batched_tokens: Annotated[
        int, Meta(ge=1, description="of a step; longer prompts go in chunks")
    ] = 2048
    max_blocks: Annotated[
        Positive | None,
        Meta(description="of running requests; cache_blocks where left out"),
    ] = None
    abort_share: Annotated[
        Share, Meta(description="of requests given up: looked up, loading or decoding")
    ] = 0.0
    overlap_stores: Annotated[
        bool, Meta(description="a session's next turn may begin before its store ends")
    ] = True


class Fault(Options, frozen=True):
    """Something that happens to a process in the middle of a run."""

    at_s: Annotated[float, Meta(ge=0, description="after the start of the load")]
    target: Literal["server", "worker", "service"] = "server"
    action: Annotated[
        Literal["kill", "stop", "restart"],
        Meta(description="SIGKILL; SIGSTOP, then SIGCONT; SIGTERM. All come back"),
    ] = "kill"
    for_s: Annotated[float, Meta(ge=0, description="away for so long")] = 1.0
    engine: Annotated[int, Meta(ge=0, description="of a worker")] = 0
    rank: Annotated[int, Meta(ge=0, description="of a worker")] = 0
    service: Annotated[str, Meta(description="name of a service")] = ""


class Service(Options, frozen=True):
    """A process that the server needs, such as the store beneath a tier."""

    name: str
    command: Annotated[
        tuple[str, ...], Meta(description="{folder} is a fresh one, {port} a free one")
    ]
    ready: Annotated[
        str, Meta(description="path in {folder}, or host:port, that says it is ready")
    ] = ""


class Tenant(Options, frozen=True):
    """More engines beside the scenario's own, with a model and a load of theirs."""

    name: str
    workload: Workload
    model: ModelConfig | None = None
    load: Load | None = None
    engines: Annotated[int, Meta(ge=1, le=64)] = 1
    ranks: Annotated[int, Meta(ge=1, le=64)] | None = None
    cache_blocks: Positive | None = None


class Limits(Options, frozen=True):
    """What a run must reach; missing one is exit code 1."""

    max_errors: Annotated[int, Meta(ge=0)] = 0
    min_hit_rate: Annotated[Share | None, Meta(description="of prompt tokens")] = None
    min_share_of_ideal: Annotated[
        Share | None, Meta(description="token hits, against an endless cache")
    ] = None
    min_documents_share: Annotated[
        Share | None,
        Meta(description="documents' chunks found, against an endless cache"),
    ] = None
    ttft_s: Annotated[
        Seconds | None, Meta(description="of a request that counts as good")
    ] = None
    request_s: Annotated[
        Seconds | None, Meta(description="likewise, from due to done")
    ] = None
    min_goodput: Annotated[
        Share | None, Meta(description="requests within ttft_s and request_s")
    ] = None


class Scenario(Options, frozen=True):
    """One experiment, as `scenarios/*.toml` declares it."""

    model: ModelConfig
    workload: Workload
    question: Annotated[str, Meta(description="what a run of it answers")] = ""
    engines: Annotated[int, Meta(ge=1, le=64)] = 1
    ranks: Annotated[int, Meta(ge=1, le=64, description="workers an engine")] = 1
    cache_blocks: Annotated[
        int, Meta(ge=1, description="blocks of each rank's paged cache, a group")
    ] = 1024
    driver: Annotated[
        Literal["server", "worker"], Meta(description="who copies between cache and L1")
    ] = "server"
    device: Annotated[
        Literal["cpu", "cuda"],
        Meta(description="where caches lie; ranks take a host's GPUs in turn"),
    ] = "cpu"
    server: ServerConfig = ServerConfig()
    hosts: Annotated[
        int,
        Meta(
            ge=1,
            le=16,
            description="simulated: a server each, with an L1 and a loopback address "
            "of its own ({host} in its tiers); the engines go round them",
        ),
    ] = 1
    load: Load = ClosedLoop()
    engine: EngineModel | None = None
    limits: Limits = Limits()
    tenants: tuple[Tenant, ...] = ()
    services: tuple[Service, ...] = ()
    faults: tuple[Fault, ...] = ()
    storm: Annotated[
        int, Meta(ge=0, description="registrations of all ranks at once, before all")
    ] = 0
    copies: Annotated[
        Copies | None, Meta(description="measured after the load, for their own sake")
    ] = None
    timeout_s: Annotated[
        float, Meta(gt=0, description="that engines wait for an answer")
    ] = 30.0

    def check(self) -> None:
        """Ranks can share the heads, blocks make up chunks, faults have a target."""
        for name, part in self.parts().items():
            geometry = part.model.geometry()
            geometry.groups(1, 0, part.ranks)
            require(
                self.server.chunk_size % geometry.block_size == 0,
                "server.chunk_size",
                self.server.chunk_size,
                f"a multiple of {name}.model.block_size, {geometry.block_size}",
            )
        num_engines = sum(part.engines for part in self.parts().values())
        require(self.hosts <= num_engines, "hosts", self.hosts, "more than the engines")
        require(
            self.hosts == 1 or not self.faults,
            "hosts", self.hosts, "faults strike one host only",
        )  # fmt: skip
        if self.copies:
            most = max(self.copies.workers)
            ranks = sum(part.engines * part.ranks for part in self.parts().values())
            need = f"no more than the scenario's ranks, {ranks}"
            require(most <= ranks, "copies.workers", most, need)
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
        """Of the paged caches of one engine's ranks."""
        geometry = self.model.geometry()
        token = geometry.token_bytes(self.ranks)
        return token * geometry.block_size * self.cache_blocks * self.ranks

    def parts(self) -> dict[str, Scenario]:
        """Return what each tenant plays, as a scenario of its own; ours is `main`."""
        own = {"main": self} if not self.tenants else {"main": self._alone()}
        return own | {one.name: self._of_tenant(one) for one in self.tenants}

    def _alone(self) -> Scenario:
        return replace(self, tenants=(), faults=())

    def _of_tenant(self, tenant: Tenant) -> Scenario:
        return replace(
            self._alone(),
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
    """Read a scenario file, and take the trace of `--trace`.

    Raises:
        SetupError: naming file or flag, key and the nearest known one.
    """
    key = "workload.trace"
    flags = {key: None if trace is None else str(trace)}
    return load(Scenario, path, overrides, flags, {key: "--trace"})
