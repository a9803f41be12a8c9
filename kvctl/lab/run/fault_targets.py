"""The targets of fault injection: servers, ranks, and services of tiers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from msgspec.structs import replace

from kvcore.errors import KVError, SetupError
from kvctl.lab.config.scenario import Fault
from kvctl.lab.process_messages import Stop, send
from kvctl.lab.run.fault_injection import FaultNotice, FaultTarget
from kvctl.lab.run.run_monitor import RunMonitor
from kvctl.lab.systems.child_processes import ENDING, LocalServer, RunningService
from kvctl.lab.systems.system_interface import Client

NOTICE_S = 5.0
POLL_S = 0.002
TIER_NOTICE_S = 60.0
"""Timeout for the server to stop using a tier, and to use it again."""
REPORT_S = 40.0
"""Timeout for the report of an engine that lost a rank."""


def target_of(fault: Fault, monitor: RunMonitor, client: Client) -> FaultTarget:
    """Return the target of a fault.

    Raises:
        SetupError: the server was not started by this run.
    """
    if fault.target == "worker":
        return WorkerTarget(monitor, client, fault)
    if fault.target == "service":
        tiers = monitor.evidence.scenario.server.tiers
        variable = f"{{{fault.service}."
        numbers = [number for number, url in enumerate(tiers) if variable in url]
        return ServiceTarget(monitor.services[fault.service], client, numbers)
    for server in monitor.servers:
        if isinstance(server, LocalServer):
            return server
    raise SetupError("faults: the server was not started by this run")


@dataclass(slots=True)
class WorkerTarget:
    """One rank. Its end also ends its engine, which is then started again."""

    monitor: RunMonitor
    client: Client
    fault: Fault

    def send_signal(self, number: signal.Signals) -> FaultNotice | None:
        """Send a signal; if it ends the rank, wait until the server has noticed."""
        process = self.monitor.processes.rank_of(self.fault.engine, self.fault.rank)
        ends = number in ENDING
        process.ended_by_fault |= ends
        if (pid := process.process.pid) is not None:
            os.kill(pid, number)
        return self._await_unregistered(process.engine_id) if ends else None

    def start_again(self) -> None:
        """Start the engine again, from its position in the workload."""
        engine, reported = self.fault.engine, self.monitor.reported
        if engine not in reported:
            send(self.monitor.processes.scheduler_of(engine).control, Stop())
        deadline = monotonic() + REPORT_S
        while engine not in reported and monotonic() < deadline:
            self.monitor.step()
        report = reported.pop(engine, None)
        ended = self.monitor.processes.of_engine(engine)
        for process in ended:
            process.ended_by_fault = True
            process.control.close()
        plan = replace(
            self.monitor.plans()[engine],
            engine_id=f"{self.monitor.run_id}-{engine}.{len(ended)}",
            first_index=report.next_index if report else 0,
        )
        self.monitor.processes.start_engine(plan)

    def _await_unregistered(self, engine_id: str) -> FaultNotice:
        instance_id = f"{engine_id}/{self.fault.rank}"
        deadline, pause = monotonic() + NOTICE_S, threading.Event()
        while monotonic() < deadline:
            instances = self.client.status(0).instances
            if instance_id not in [one.instance_id for one in instances]:
                return FaultNotice(monotonic())
            pause.wait(POLL_S)
        return FaultNotice()


@dataclass(slots=True)
class ServiceTarget:
    """A service, and the numbers of the tiers that use it."""

    service: RunningService
    client: Client
    tiers: Sequence[int]

    def send_signal(self, number: signal.Signals) -> FaultNotice | None:
        """Send a signal; if the service does not serve after it, watch the tiers."""
        notice = None if number == signal.SIGCONT else self._watch_tiers()
        self.service.send_signal(number)
        return notice

    def start_again(self) -> None:
        """Start the service again."""
        self.service.start_again()

    def _watch_tiers(self) -> FaultNotice:
        """Return a notice that a thread completes when tiers go down and up."""
        notice = FaultNotice()
        if self.tiers:
            threading.Thread(target=self._poll, args=(notice,), daemon=True).start()
        return notice

    def _poll(self, notice: FaultNotice) -> None:
        deadline, pause = monotonic() + TIER_NOTICE_S, threading.Event()
        while monotonic() < deadline:
            try:
                tiers = self.client.status(0).tiers
            except KVError:
                return  # The run has ended, or the server, which is reported elsewhere.
            up = all(tiers[number].up for number in self.tiers)
            if not up and notice.noticed_s is None:
                notice.noticed_s = monotonic()
            elif up and notice.noticed_s is not None:
                notice.recovered_s = monotonic()
                return
            pause.wait(POLL_S)
