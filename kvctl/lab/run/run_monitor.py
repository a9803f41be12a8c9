"""The state of a run in progress, and the messages and exits of its processes."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from time import monotonic
from types import FrameType

from msgspec.structs import replace

from kvctl.lab.config.scenario import Scenario
from kvctl.lab.process_messages import (
    CallTimes,
    EnginePlan,
    EngineReport,
    Failed,
    Ready,
    RegistrationTimes,
    Start,
    Stop,
    Tally,
    WarmedUp,
    receive,
    send,
)
from kvctl.lab.run.fault_injection import FaultInjector
from kvctl.lab.run.raw_measurements import RawMeasurements
from kvctl.lab.run.run_processes import RunProcess, RunProcesses
from kvctl.lab.systems.child_processes import ChildProcess, RunningService
from kvctl.lab.workload.access_generators import Survey

POLL_S = 0.5


@dataclass(slots=True)
class Interrupts:
    """Whether SIGINT or SIGTERM was received. A second one raises KeyboardInterrupt."""

    received: bool = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle the signals while the block runs."""
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


@dataclass(slots=True)
class RunMonitor:
    """Receives the messages of a run's processes and notices their exits."""

    evidence: RawMeasurements
    addresses: Sequence[str]
    """Of the server of each host."""
    servers: Sequence[ChildProcess]
    """Servers that this run has started."""
    services: Mapping[str, RunningService]
    planned: Survey
    interrupts: Interrupts
    report_progress: Callable[[float, str], None]
    """Receives the completed share of the requests, 0 to 1, and a note."""
    run_id: str = field(default_factory=lambda: f"{os.getpid()}.{secrets.token_hex(3)}")
    processes: RunProcesses = field(init=False)
    tallies: dict[str, Tally] = field(default_factory=dict)
    """By engine id: a restarted engine has a new one."""
    ready: set[str] = field(default_factory=set)
    reported: dict[int, EngineReport | None] = field(default_factory=dict)
    """Engines that have ended; None without a report."""
    chunk_bytes: int = 0
    server_gone: bool = False
    faults: FaultInjector | None = None
    call_times: list[CallTimes] = field(default_factory=list)
    """Received and not yet evaluated."""
    num_warm: int = 0
    """Ranks that have warmed up for the current setting of the copy benchmark."""
    registrations_pending: int = 0
    """Ranks whose `RegistrationTimes` are still to come."""

    def __post_init__(self) -> None:
        self.processes = RunProcesses(self.run_id)

    @property
    def failed(self) -> bool:
        """Whether the run cannot continue."""
        return bool(self.evidence.failures)

    def host_of(self, engine: int) -> int:
        """Return the index of an engine's host."""
        return engine % len(self.addresses)

    def plans(self) -> list[EnginePlan]:
        """Return one plan per engine, in order of tenants."""
        plans: list[EnginePlan] = []
        for part in self.evidence.scenario.parts().values():
            for place in range(part.engines):
                plans.append(self._plan(len(plans), part, place))
        return plans

    def _plan(self, engine: int, part: Scenario, place: int) -> EnginePlan:
        model = part.model.geometry().model
        host = self.host_of(engine)
        return EnginePlan(
            address=self.addresses[host],
            host=host,
            engine=engine,
            engine_id=f"{self.run_id}-{engine}",
            model=f"{model}/{part.ranks}@{self.run_id}",
            seed=self.evidence.seed,
            # Every engine needs to know whether there are faults.
            scenario=replace(part, faults=self.evidence.scenario.faults),
            place=place,
            system=self.evidence.spec,
            turns=self.evidence.turns,
        )

    def step(self) -> None:
        """Wait for messages and exits, at most `POLL_S`, and handle them."""
        sources = {p.control: p for p in self.processes.all if not p.control.closed}
        servers = {one.exited.fileno(): one for one in self.servers if not one.is_down}
        exits = {} if self.server_gone else servers
        for source in wait([*sources, *exits], self._timeout_s()):
            if isinstance(source, Connection):
                self._receive(sources[source])
            elif isinstance(source, int):
                self.server_gone = True
                self.evidence.failures.append(exits[source].describe_exit())

    def _timeout_s(self) -> float:
        next_s = self.faults.next_s if self.faults else None
        return POLL_S if next_s is None else min(POLL_S, max(0, next_s - monotonic()))

    def _receive(self, process: RunProcess) -> None:
        try:
            message = receive(process.control)
        except (EOFError, OSError):
            self._process_ended(process)
            return
        match message:
            case Ready(chunk_bytes):
                self._process_ready(process, chunk_bytes)
            case Failed(text):
                self.evidence.failures.append(f"{process.name}: {text}")
            case Tally():
                self.tallies[process.engine_id] = message
                self._show_counts()
            case WarmedUp():
                self.num_warm += 1
            case CallTimes():
                self.call_times.append(message)
            case RegistrationTimes(samples):
                self.registrations_pending -= 1
                self.evidence.storms.append(samples)
            case EngineReport():
                self.reported[process.engine] = message
                self.evidence.reports.append(message)

    def _process_ready(self, process: RunProcess, chunk_bytes: int) -> None:
        """Record a process; a restarted scheduler begins immediately."""
        self.ready.add(process.name)
        self.chunk_bytes = max(self.chunk_bytes, chunk_bytes)
        if self.faults and not process.is_rank:
            start = Start(self.faults.epoch_s)
            stopping = self.interrupts.received
            send(process.control, Stop(self.server_gone) if stopping else start)

    def _process_ended(self, process: RunProcess) -> None:
        """Record an exit: a failure after a crash or without a report."""
        process.control.close()
        process.process.join(POLL_S)
        code = process.process.exitcode
        complete = process.is_rank or process.engine in self.reported
        if (code or not complete) and not process.ended_by_fault:
            self.evidence.failures.append(f"{process.name} ended with exit code {code}")
        if not process.is_rank:
            self.reported.setdefault(process.engine, None)

    def show(self, note: str) -> None:
        """Report a note beside the completed share of the requests."""
        num_done = sum(tally.requests for tally in self.tallies.values())
        self.report_progress(num_done / self.planned.num_requests, note)

    def _show_counts(self) -> None:
        done = Tally()
        for tally in self.tallies.values():
            done.add(tally)
        rate = done.tokens_hit / done.tokens if done.tokens else 0.0
        self.show(
            f"{done.requests:,} of {self.planned.num_requests:,} requests, hit rate "
            f"{rate:.3f}, {done.errors} errors, {done.bytes_wrong} bytes wrong"
        )
