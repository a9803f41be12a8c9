"""One run under way: its processes, what they say, what strikes them."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Protocol

from msgspec.structs import replace

from kvcore.errors import KVError, SetupError, Unavailable
from kvcore.protocol import StatusReply
from kvctl.lab.interleaving import in_turn
from kvctl.lab.latency_samples import LatencySamples
from kvctl.lab.process_messages import (
    EnginePlan,
    EngineReport,
    Failed,
    MeasuredAlone,
    MeasuredCopies,
    Ready,
    Start,
    Stop,
    StormDone,
    Tally,
    Warm,
    receive,
    send,
)
from kvctl.lab.run.environment import anonymous_bytes
from kvctl.lab.run.fault_plan import FaultPlan
from kvctl.lab.run.fault_targets import FaultTargets
from kvctl.lab.run.post_load_checks import PostLoadChecks
from kvctl.lab.run.raw_measurements import RawMeasurements, TierBytes
from kvctl.lab.run.run_processes import RunProcess, RunProcesses
from kvctl.lab.scenario import Scenario
from kvctl.lab.systems.external_server import ExternalServer
from kvctl.lab.systems.local_server import LocalServer
from kvctl.lab.systems.service_processes import RunningService
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.systems.system_registry import connect_other
from kvctl.lab.workload.access_generators import Survey

TICK_S = 0.5
READY_S = 60.0
READY_PER_PROCESS_S = 1.0
"""More processes take longer to start, on few cores."""
GRACE_S = 15.0
"""For requests under way to end, once a run is to stop."""
SERVERLESS_GRACE_S = 3.0
"""For the same once the server is gone: what waits for another waits in vain."""


class RunObserver(Protocol):
    """Who is told how far a run is."""

    def phase(self, name: str) -> None:
        """Begin a phase of the run."""

    def progress(self, done: Tally, planned: Survey) -> None:
        """Some requests are done."""


class Interruptible(Protocol):
    """Who knows whether to stop."""

    @property
    def received(self) -> bool:
        """A signal asked to stop."""


@dataclass(slots=True)
class LoadRun:
    """One run under way."""

    evidence: RawMeasurements
    addresses: Sequence[str]
    """One a host."""
    servers: Sequence[LocalServer | ExternalServer]
    """Those that this run has started."""
    services: Mapping[str, RunningService]
    planned: Survey
    interrupts: Interruptible
    watcher: RunObserver
    run_id: str = field(default_factory=lambda: f"{os.getpid()}.{secrets.token_hex(3)}")
    tallies: dict[str, Tally] = field(default_factory=dict)
    """By engine id: an engine that came back counts anew."""
    ready: set[str] = field(default_factory=set)
    reported: dict[int, EngineReport | None] = field(default_factory=dict)
    """Engines that play no more; None of those that ended without a word."""
    chunk_bytes: int = 0
    stop_by: float | None = None
    """When patience ends, once a stop was asked for."""
    server_gone: bool = False
    faults: FaultPlan | None = None
    storms_wanted: int = 0

    def run(self) -> None:
        """Fill the evidence."""
        with ExitStack() as stack:
            clients = [self._connect(address, stack) for address in self.addresses]
            client = clients[0]
            served = replace(
                self.evidence.scenario.server, chunk_size=client.chunk_size
            )
            self.evidence.scenario = replace(self.evidence.scenario, server=served)
            after = PostLoadChecks(self, clients)
            cast = RunProcesses(self.plans())
            try:
                self._set_up(cast)
                self._storm(cast)
                before = [one.status(0) for one in clients]
                begun_bytes = self._server_bytes()
                self._watch(cast, client)
                if self.servers:
                    self.evidence.server_bytes = begun_bytes, self._server_bytes()
                self._count(clients, before)
                if self.evidence.turns is None and self.evidence.spec.is_ours:
                    after.play_alone(cast)
                    after.play_copies(cast)
            except KeyboardInterrupt:
                cast.close(at_once=True)
                raise
            finally:
                cast.close(at_once=self.server_gone)
            if not self.server_gone:
                with in_turn(self.evidence.turns):
                    after.look()

    def _connect(self, address: str, stack: ExitStack) -> Client:
        spec, scenario = self.evidence.spec, self.evidence.scenario
        client = connect_other(spec, address, scenario.server, scenario.timeout_s)
        stack.callback(client.close)
        return client

    def _server_bytes(self) -> int:
        """Add up the servers' own memory; those that are gone have none."""
        return sum(anonymous_bytes(server.pid) for server in self.servers)

    def _host_of(self, engine: int) -> int:
        return engine % len(self.addresses)

    def plans(self) -> list[EnginePlan]:
        """Return one an engine, tenant after tenant."""
        plans: list[EnginePlan] = []
        for part in self.evidence.scenario.parts().values():
            for place in range(part.engines):
                plans.append(self._plan(len(plans), part, place))
        return plans

    def _plan(self, engine: int, part: Scenario, place: int) -> EnginePlan:
        model = part.model.geometry().model
        host = self._host_of(engine)
        return EnginePlan(
            address=self.addresses[host],
            host=host,
            engine=engine,
            engine_id=f"{self.run_id}-{engine}",
            model=f"{model}/{part.ranks}@{self.run_id}",
            seed=self.evidence.seed,
            # Each part knows whether anything may be struck.
            scenario=replace(part, faults=self.evidence.scenario.faults),
            place=place,
            system=self.evidence.spec,
            turns=self.evidence.turns,
        )

    def _set_up(self, cast: RunProcesses) -> None:
        """Wait until every process has set itself up.

        Raises:
            SetupError: one of them could not.
            KeyboardInterrupt: a signal asked to stop meanwhile.
        """
        patience = READY_S + READY_PER_PROCESS_S * len(cast.actors)
        give_up = monotonic() + patience
        while len(self.ready) < len(cast.actors):
            self.step(cast)
            if self.interrupts.received:
                raise KeyboardInterrupt
            if self.evidence.failures:
                raise SetupError("; ".join(self.evidence.failures))
            if monotonic() > give_up:
                raise Unavailable(f"the engines were not ready in {patience:.0f} s")
        self.watcher.phase("playing")

    def _storm(self, cast: RunProcesses) -> None:
        """Let all ranks register at once, again and again."""
        rounds = self.evidence.scenario.storm
        if not rounds or self.interrupts.received:
            return
        self.watcher.phase("registering")
        self.storms_wanted = len(cast.ranks)
        cast.storm(rounds)
        while self.storms_wanted and not self.evidence.failures:
            self.step(cast)

    def _watch(self, cast: RunProcesses, client: Client) -> None:
        """Let them play until all have reported or the patience of a stop ends."""
        self.evidence.begun_s = begun = monotonic()
        self.faults = FaultPlan(begun, FaultTargets(self, cast, client).of, monotonic)
        for fault in self.evidence.scenario.faults:
            self.faults.add(fault)
        cast.tell_schedulers(Start(begun))
        while self._unreported(cast) or self.faults.away:
            self.step(cast)
            self.faults.play()
            if self.interrupts.received:
                self.evidence.interrupted = True
            if self.evidence.interrupted or self.evidence.failures:
                self._ask_to_stop(cast)
            if self.stop_by is not None and monotonic() > self.stop_by:
                self._give_up(cast)
                break
        self.evidence.elapsed_s = monotonic() - begun
        self.evidence.struck = self.faults.struck

    def _unreported(self, cast: RunProcesses) -> set[int]:
        return {actor.engine for actor in cast.schedulers} - self.reported.keys()

    def _ask_to_stop(self, cast: RunProcesses) -> None:
        if self.stop_by is None:
            self.watcher.phase("stopping")
            grace = SERVERLESS_GRACE_S if self.server_gone else GRACE_S
            self.stop_by = monotonic() + grace
            cast.tell_schedulers(Stop(self.server_gone))

    def _give_up(self, cast: RunProcesses) -> None:
        """End without the last reports: what was told on the way stands for them."""
        for engine in sorted(self._unreported(cast)):
            actor = cast.scheduler_of(engine)
            self.evidence.failures.append(f"{actor.name} did not stop")
            tally = self.tallies.get(actor.engine_id, Tally())
            host = self._host_of(engine)
            lost = EngineReport(tally, LatencySamples(), b"", host=host)
            self.evidence.reports.append(lost)

    def step(self, cast: RunProcesses) -> None:
        """Wait a little for something to happen, and take note of it."""
        actors = {a.control: a for a in cast.actors if not a.control.closed}
        servers = {one.exited: one for one in self.servers if not one.away}
        watched = {} if self.server_gone else servers
        for source in wait([*actors, *watched], self._timeout_s()):
            if isinstance(source, Connection):
                self._hear(actors[source])
            elif isinstance(source, int):
                self._server_ended(watched[source])

    def _timeout_s(self) -> float:
        next_s = self.faults.next_s if self.faults else None
        return TICK_S if next_s is None else min(TICK_S, max(0, next_s - monotonic()))

    def _server_ended(self, server: LocalServer | ExternalServer) -> None:
        """Take note once, and say how."""
        self.server_gone = True
        self.evidence.failures.append(server.epitaph())

    def _hear(self, actor: RunProcess) -> None:
        try:
            message = receive(actor.control)
        except (EOFError, OSError):
            self._lost(actor)
            return
        match message:
            case Ready(chunk_bytes):
                self._is_ready(actor, chunk_bytes)
            case Failed(text):
                self.evidence.failures.append(f"{actor.name}: {text}")
            case Tally():
                self.tallies[actor.engine_id] = message
                self._show_progress()
            case MeasuredAlone():
                self.evidence.alone.append(message)
            case Warm():
                self.evidence.num_warm += 1
            case MeasuredCopies():
                self.evidence.copied.append(message)
            case StormDone(samples):
                self.storms_wanted -= 1
                self.evidence.storms.append(samples)
            case EngineReport():
                self.reported[actor.engine] = message
                self.evidence.reports.append(message)

    def _is_ready(self, actor: RunProcess, chunk_bytes: int) -> None:
        """Count a process in; a scheduler that came back begins at once."""
        self.ready.add(actor.name)
        self.chunk_bytes = max(self.chunk_bytes, chunk_bytes)
        if self.faults and not actor.is_rank:
            over = self.interrupts.received
            begun = Start(self.faults.epoch_s)
            send(actor.control, Stop(self.server_gone) if over else begun)

    def _lost(self, actor: RunProcess) -> None:
        """A process ended: a failure where it crashed, or never told what it did."""
        actor.control.close()
        actor.process.join(TICK_S)
        code = actor.process.exitcode
        told = actor.is_rank or actor.engine in self.reported
        if (code or not told) and not actor.struck:
            self.evidence.failures.append(f"{actor.name} ended with exit code {code}")
        if not actor.is_rank:
            self.reported.setdefault(actor.engine, None)

    def _show_progress(self) -> None:
        total = Tally()
        for tally in self.tallies.values():
            total.add(tally)
        self.watcher.progress(total, self.planned)

    def _count(self, clients: Sequence[Client], before: Sequence[StatusReply]) -> None:
        """Keep by how much the counters of each server and its tiers grew."""
        if self.server_gone:
            return
        with suppress(KVError):  # What ended the server is told when it is stopped.
            pairs = [
                (then, client.status(0))
                for client, then in zip(clients, before, strict=True)
            ]
            self.evidence.counters = [_grown(*pair) for pair in pairs]
            self.evidence.tier_bytes = [
                TierBytes(
                    tier.name.partition("-")[0],
                    sum(_loaded(*pair)[place] for pair in pairs),
                )
                for place, tier in enumerate(pairs[0][1].tiers)
            ]


def _grown(before: StatusReply, after: StatusReply) -> Counter[str]:
    """Return what a server has counted since; one that restarted counts anew."""
    grown = Counter(after.counters)
    if after.boot == before.boot:
        grown.subtract(before.counters)
    return grown


def _loaded(before: StatusReply, after: StatusReply) -> list[int]:
    """Return the bytes that came from each tier since."""
    now, then = (
        [tier.counters["loaded_bytes"] for tier in status.tiers]
        for status in (after, before)
    )
    if after.boot != before.boot:
        return now
    return [more - less for more, less in zip(now, then, strict=True)]
