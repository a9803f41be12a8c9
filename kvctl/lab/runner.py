"""The driver of a run: starts everything, watches it, stops it, keeps what it found."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from msgspec.structs import replace

from kvcore.client import KVClient
from kvcore.config import ServerConfig
from kvcore.errors import SetupError
from kvcore.shm import remove_dead
from kvctl.lab.interleaving import can_take_turns
from kvctl.lab.process_messages import Tally
from kvctl.lab.rank.simulated_rank import SEGMENT_PREFIX
from kvctl.lab.results.result import Result
from kvctl.lab.results.result_builder import summarise
from kvctl.lab.run.load_run import LoadRun
from kvctl.lab.run.raw_measurements import RawMeasurements
from kvctl.lab.scenario import Scenario, Service
from kvctl.lab.systems.external_server import ExternalServer
from kvctl.lab.systems.local_server import LocalServer
from kvctl.lab.systems.service_processes import RunningService, fill
from kvctl.lab.systems.system_interface import SystemSpec
from kvctl.lab.systems.system_registry import start_server
from kvctl.lab.workload.access_generators import Survey, survey

ANSWER_S = 5.0
"""For a server that runs already to answer the first time."""


class RunWatcher:
    """Told how far a run is. This one says nothing."""

    def phase(self, name: str) -> None:
        """Begin a phase of the run."""

    def progress(self, done: Tally, planned: Survey) -> None:
        """Some requests are done."""


@dataclass(slots=True)
class Interrupts:
    """SIGINT or SIGTERM was received. A second one raises KeyboardInterrupt."""

    received: bool = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Take the signals for as long as the block runs."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._receive) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def run(
    name: str,
    scenario: Scenario,
    seed: int,
    address: str | None,
    watcher: RunWatcher | None = None,
    turns: str | None = None,
    system: SystemSpec | None = None,
) -> Result:
    """Play a scenario, against a server of its own where no address is given.

    With `turns` it alternates with another run; see `interleaving`. The result
    says what went wrong while it ran.

    Raises:
        SetupError: it could not begin.
        Unavailable: no server answers at the address.
    """
    watcher, spec = watcher or RunWatcher(), system or SystemSpec()
    watcher.phase("starting")
    planned = _survey(scenario, seed)
    if turns is not None and not can_take_turns(scenario):
        raise SetupError("--turns: needs one engine and load.concurrency = 1")
    if not spec.is_ours and scenario.faults:
        raise SetupError(f"--system {spec.name}: only our own server can be struck")
    if address and any(fault.target != "worker" for fault in scenario.faults):
        raise SetupError("--server: only a server that the run started can be struck")
    if scenario.hosts > 1 and (address or not spec.is_ours):
        raise SetupError(f"hosts = {scenario.hosts}: only of servers that a run starts")
    if address and spec.is_ours:
        with KVClient(address, label="bench driver", timeout_s=ANSWER_S) as client:
            client.ping()
    remove_dead(SEGMENT_PREFIX)
    interrupts = Interrupts()
    with interrupts.caught(), ExitStack() as stack:
        services = {
            service.name: stack.enter_context(_running(service))
            for service in scenario.services
        }
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kvlab-")))
        evidence = RawMeasurements(name, scenario, seed, spec=spec, turns=turns)
        configs = [] if address else _configs(scenario, services, folder)
        with _serving(spec, configs, folder, evidence.failures) as servers:
            where = [address] if address else [one.address for one in servers]
            LoadRun(
                evidence, where, servers, services, planned, interrupts, watcher
            ).run()
        return summarise(evidence)


@contextmanager
def _serving(
    spec: SystemSpec,
    configs: Sequence[ServerConfig],
    folder: Path,
    failures: list[str],
) -> Iterator[list[LocalServer | ExternalServer]]:
    """Start servers; after the block stop them, and note which ended wrongly."""
    servers: list[LocalServer | ExternalServer] = []
    try:
        servers.extend(start_server(spec, config, folder) for config in configs)
        yield servers
    finally:
        told = [server.stop() for server in servers]
        failures += [one for one in told if one and one not in failures]


def _configs(
    scenario: Scenario, services: dict[str, RunningService], folder: Path
) -> list[ServerConfig]:
    """Write each host's server down."""
    if scenario.hosts == 1:
        return [_with_places(scenario.server, services, folder, "127.0.0.1")]
    hosts = [f"127.0.0.{number}" for number in range(1, scenario.hosts + 1)]
    return [
        _with_places(
            replace(scenario.server, address=f"tcp://{host}:0"), services, folder, host
        )
        for host in hosts
    ]


@contextmanager
def _running(service: Service) -> Iterator[RunningService]:
    running = RunningService(service)
    try:
        yield running
    finally:
        running.close()


def _with_places(
    config: ServerConfig, services: dict[str, RunningService], folder: Path, host: str
) -> ServerConfig:
    """Fill in the tiers' URLs: `{NAME.port}`, `{NAME.folder}`, `{folder}`, `{host}`."""
    places = {"folder": str(folder), "host": host} | {
        f"{name}.{place}": value
        for name, service in services.items()
        for place, value in service.places.items()
    }
    return replace(config, tiers=tuple(fill(url, places) for url in config.tiers))


def _survey(scenario: Scenario, seed: int) -> Survey:
    """Add up what the tenants are asked; each must fit its engines' caches."""
    surveys = []
    for part in scenario.parts().values():
        surveys.append(survey(part.workload, seed))
        _check_room(part, surveys[-1])
    return Survey(
        sum(one.num_requests for one in surveys),
        sum(one.num_tokens for one in surveys),
        max(one.longest for one in surveys),
    )


def _check_room(scenario: Scenario, planned: Survey) -> None:
    geometry = scenario.model.geometry()
    blocks = -(-planned.longest // geometry.block_size)
    if not planned.num_requests:
        raise SetupError("the workload has no requests")
    if blocks > scenario.cache_blocks:
        raise SetupError(
            f"the longest request has {planned.longest} tokens, {blocks} blocks: "
            f"cache_blocks = {scenario.cache_blocks} cannot hold it"
        )
