"""Runs a scenario: starts services and servers, drives the load, returns the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec.structs import replace

from kvcore.client import KVClient
from kvcore.config import ServerConfig
from kvcore.errors import SetupError
from kvcore.shm import remove_dead
from kvctl.lab.config.scenario import Scenario, SystemSpec
from kvctl.lab.rank.rank_cache import SEGMENT_PREFIX
from kvctl.lab.results.result import Result
from kvctl.lab.results.result_builder import summarise
from kvctl.lab.run.raw_measurements import RawMeasurements
from kvctl.lab.run.run_controller import RunController
from kvctl.lab.run.run_monitor import Interrupts, RunMonitor
from kvctl.lab.run_turns import can_interleave
from kvctl.lab.systems.child_processes import (
    ExternalServer,
    LocalServer,
    RunningService,
    fill,
)
from kvctl.lab.systems.system_registry import start_server
from kvctl.lab.workload.access_generators import Survey, survey

PING_S = 5.0
"""Timeout for the first reply of a server that is already running."""


def _ignore(share: float, note: str) -> None:
    """Report no progress."""


def run(
    name: str,
    scenario: Scenario,
    seed: int,
    address: str | None,
    report_progress: Callable[[float, str], None] = _ignore,
    turns: str | None = None,
    system: SystemSpec | None = None,
) -> Result:
    """Run a scenario on new servers, or on the server at `address`.

    `report_progress` receives the completed share, 0 to 1, and a note. With `turns` the
    run is interleaved with another one; see `run_turns`. Errors
    during the run are part of the result.

    Raises:
        SetupError: the run could not begin.
        Unavailable: no server answers at the address.
    """
    spec = system or SystemSpec()
    report_progress(0.0, "starting")
    planned = _survey(scenario, seed)
    _check_options(scenario, address, turns, spec)
    if address and spec.is_ours:
        with KVClient(address, label="bench driver", timeout_s=PING_S) as client:
            client.ping()
    remove_dead(SEGMENT_PREFIX)
    interrupts = Interrupts()
    with interrupts.caught(), ExitStack() as stack:
        services = {
            service.name: stack.enter_context(closing(RunningService(service)))
            for service in scenario.services
        }
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kvlab-")))
        evidence = RawMeasurements(name, scenario, seed, spec=spec, turns=turns)
        configs = [] if address else _server_configs(scenario, services, folder)
        with _serving(spec, configs, folder, evidence.failures) as servers:
            addresses = [address] if address else [one.address for one in servers]
            monitor = RunMonitor(
                evidence,
                addresses,
                servers,
                services,
                planned,
                interrupts,
                report_progress,
            )
            RunController(monitor).run()
        return summarise(evidence)


def _check_options(
    scenario: Scenario, address: str | None, turns: str | None, spec: SystemSpec
) -> None:
    if turns is not None and not can_interleave(scenario):
        raise SetupError("--turns: needs one engine and load.concurrency = 1")
    if not spec.is_ours and scenario.faults:
        raise SetupError(f"--system {spec.name}: faults need kvctl's own server")
    if address and any(fault.target != "worker" for fault in scenario.faults):
        raise SetupError("--server: faults need a server that the run has started")
    if scenario.hosts > 1 and (address or not spec.is_ours):
        raise SetupError(
            f"hosts = {scenario.hosts}: needs servers that the run has started"
        )


@contextmanager
def _serving(
    spec: SystemSpec,
    configs: Sequence[ServerConfig],
    folder: Path,
    failures: list[str],
) -> Iterator[list[LocalServer | ExternalServer]]:
    """Start servers, stop them after the block, and record unexpected exits."""
    servers: list[LocalServer | ExternalServer] = []
    try:
        servers.extend(start_server(spec, config, folder) for config in configs)
        yield servers
    finally:
        problems = [server.stop() for server in servers]
        failures += [one for one in problems if one and one not in failures]


def _server_configs(
    scenario: Scenario, services: dict[str, RunningService], folder: Path
) -> list[ServerConfig]:
    """Return the configuration of each host's server."""
    hosts = [f"127.0.0.{number}" for number in range(1, scenario.hosts + 1)]
    configs = [_fill_tiers(scenario.server, services, folder, host) for host in hosts]
    if len(configs) == 1:
        return configs
    return [
        replace(config, address=f"tcp://{host}:0")
        for config, host in zip(configs, hosts, strict=True)
    ]


def _fill_tiers(
    config: ServerConfig, services: dict[str, RunningService], folder: Path, host: str
) -> ServerConfig:
    """Replace `{NAME.port}`, `{NAME.folder}`, `{folder}`, `{host}` in tiers' URLs."""
    variables = {"folder": str(folder), "host": host} | {
        f"{name}.{variable}": value
        for name, service in services.items()
        for variable, value in service.variables.items()
    }
    return replace(config, tiers=tuple(fill(url, variables) for url in config.tiers))


def _survey(scenario: Scenario, seed: int) -> Survey:
    """Return the sum of the tenants' workloads, each of which must fit its caches."""
    surveys = []
    for part in scenario.parts().values():
        surveys.append(survey(part.workload, seed))
        _check_cache_size(part, surveys[-1])
    return Survey(
        sum(one.num_requests for one in surveys),
        sum(one.num_tokens for one in surveys),
        max(one.longest for one in surveys),
    )


def _check_cache_size(scenario: Scenario, planned: Survey) -> None:
    geometry = scenario.model.geometry()
    blocks = -(-planned.longest // geometry.block_size)
    if not planned.num_requests:
        raise SetupError("the workload has no requests")
    if blocks > scenario.cache_blocks:
        raise SetupError(
            f"the longest request has {planned.longest} tokens, {blocks} blocks: "
            f"cache_blocks = {scenario.cache_blocks} cannot hold it"
        )
