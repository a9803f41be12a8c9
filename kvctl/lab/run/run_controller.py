"""The controller of a run: starts engines, applies load and faults, and stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from time import monotonic

from msgspec.structs import replace

from kvcore.errors import KVError, SetupError, Unavailable
from kvcore.protocol import StatusReply
from kvctl.lab.latency import LatencySamples
from kvctl.lab.process_messages import (
    EngineReport,
    RegisterRepeatedly,
    Start,
    Stop,
    Tally,
    send,
)
from kvctl.lab.run.environment import anonymous_bytes
from kvctl.lab.run.fault_injection import FaultInjector
from kvctl.lab.run.fault_targets import target_of
from kvctl.lab.run.post_load_measurements import PostLoadMeasurements
from kvctl.lab.run.raw_measurements import TierBytes
from kvctl.lab.run.run_monitor import RunMonitor
from kvctl.lab.run_turns import run_exclusively
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.systems.system_registry import connect_driver

READY_S = 60.0
READY_PER_PROCESS_S = 1.0
"""More processes take longer to start, on few cores."""
GRACE_S = 15.0
"""Timeout for requests in progress, after a stop."""
SERVERLESS_GRACE_S = 3.0
"""The same without a server: calls in progress cannot finish."""


class RunController:
    """Controls one run. `run` fills the monitor's evidence."""

    def __init__(self, monitor: RunMonitor) -> None:
        self._monitor = monitor
        self._evidence = monitor.evidence
        self._processes = monitor.processes
        self._stop_by: float | None = None
        """When to give up waiting, after a stop."""

    def run(self) -> None:
        """Start engines, apply the load, and measure after it.

        Raises:
            SetupError: a process could not start.
            KeyboardInterrupt: interrupted before the load, or twice.
        """
        monitor, evidence = self._monitor, self._evidence
        with ExitStack() as stack:
            clients = [self._connect(address, stack) for address in monitor.addresses]
            chunk_size = clients[0].chunk_size
            server = replace(evidence.scenario.server, chunk_size=chunk_size)
            evidence.scenario = replace(evidence.scenario, server=server)
            after_load = PostLoadMeasurements(monitor, clients)
            try:
                for plan in monitor.plans():
                    self._processes.start_engine(plan)
                self._await_ready()
                self._register_repeatedly()
                before = [client.status(0) for client in clients]
                bytes_before = self._server_bytes()
                self._run_load(clients[0])
                if monitor.servers:
                    evidence.server_bytes = bytes_before, self._server_bytes()
                self._count(clients, before)
                if evidence.turns is None and evidence.spec.is_ours:
                    after_load.measure_isolated_calls()
                    after_load.measure_copies()
            except KeyboardInterrupt:
                self._processes.close(at_once=True)
                raise
            finally:
                self._processes.close(at_once=monitor.server_gone)
            if not monitor.server_gone:
                with run_exclusively(evidence.turns):
                    after_load.measure_ceilings()

    def _connect(self, address: str, stack: ExitStack) -> Client:
        spec, scenario = self._evidence.spec, self._evidence.scenario
        client = connect_driver(spec, address, scenario.server, scenario.timeout_s)
        stack.callback(client.close)
        return client

    def _server_bytes(self) -> int:
        """Return the private memory of all servers."""
        return sum(anonymous_bytes(server.pid) for server in self._monitor.servers)

    def _await_ready(self) -> None:
        timeout_s = READY_S + READY_PER_PROCESS_S * len(self._processes.all)
        deadline = monotonic() + timeout_s
        while len(self._monitor.ready) < len(self._processes.all):
            self._monitor.step()
            if self._monitor.interrupts.received:
                raise KeyboardInterrupt
            if self._monitor.failed:
                raise SetupError("; ".join(self._evidence.failures))
            if monotonic() > deadline:
                raise Unavailable(f"the engines were not ready in {timeout_s:.0f} s")
        self._monitor.show("running")

    def _register_repeatedly(self) -> None:
        """Let all ranks register at the same time, `storm` times."""
        rounds = self._evidence.scenario.storm
        if not rounds or self._monitor.interrupts.received:
            return
        self._monitor.show("registering")
        self._monitor.registrations_pending = len(self._processes.ranks)
        for rank in self._processes.ranks:
            send(rank.control, RegisterRepeatedly(rounds))
        while self._monitor.registrations_pending and not self._monitor.failed:
            self._monitor.step()

    def _run_load(self, client: Client) -> None:
        """Run until all engines have reported, or the timeout of a stop."""
        monitor, evidence = self._monitor, self._evidence
        evidence.begun_s = begun = monotonic()
        monitor.faults = faults = FaultInjector(
            begun, lambda fault: target_of(fault, monitor, client), monotonic
        )
        for fault in evidence.scenario.faults:
            faults.schedule(fault)
        self._processes.send_schedulers(Start(begun))
        while self._unreported() or faults.num_active:
            monitor.step()
            faults.inject_due()
            if monitor.interrupts.received:
                evidence.interrupted = True
            if evidence.interrupted or monitor.failed:
                self._request_stop()
            if self._stop_by is not None and monotonic() > self._stop_by:
                self._give_up()
                break
        evidence.elapsed_s = monotonic() - begun
        evidence.struck = faults.injected

    def _unreported(self) -> set[int]:
        engines = {scheduler.engine for scheduler in self._processes.schedulers}
        return engines - self._monitor.reported.keys()

    def _request_stop(self) -> None:
        if self._stop_by is None:
            server_gone = self._monitor.server_gone
            self._monitor.show("stopping")
            grace_s = SERVERLESS_GRACE_S if server_gone else GRACE_S
            self._stop_by = monotonic() + grace_s
            self._processes.send_schedulers(Stop(server_gone))

    def _give_up(self) -> None:
        """Use the last tallies in place of missing reports."""
        for engine in sorted(self._unreported()):
            scheduler = self._processes.scheduler_of(engine)
            self._evidence.failures.append(f"{scheduler.name} did not stop")
            tally = self._monitor.tallies.get(scheduler.engine_id, Tally())
            host = self._monitor.host_of(engine)
            report = EngineReport(tally, LatencySamples(), b"", host=host)
            self._evidence.reports.append(report)

    def _count(self, clients: Sequence[Client], before: Sequence[StatusReply]) -> None:
        """Record by how much the counters of servers and tiers have grown."""
        if self._monitor.server_gone:
            return
        with suppress(KVError):  # The server's exit is reported when it is stopped.
            pairs = [
                (status, client.status(0))
                for client, status in zip(clients, before, strict=True)
            ]
            self._evidence.counters = [_growth(*pair) for pair in pairs]
            self._evidence.tier_bytes = [
                TierBytes(
                    tier.name.partition("-")[0],
                    sum(_loaded_bytes(*pair)[number] for pair in pairs),
                )
                for number, tier in enumerate(pairs[0][1].tiers)
            ]


def _growth(before: StatusReply, after: StatusReply) -> Counter[str]:
    """Return the growth of a server's counters; a restarted one counts from 0."""
    growth = Counter(after.counters)
    if after.boot == before.boot:
        growth.subtract(before.counters)
    return growth


def _loaded_bytes(before: StatusReply, after: StatusReply) -> list[int]:
    """Return the bytes loaded from each tier between two statuses."""
    now, then = (
        [tier.counters["loaded_bytes"] for tier in status.tiers]
        for status in (after, before)
    )
    if after.boot != before.boot:
        return now
    return [more - less for more, less in zip(now, then, strict=True)]
