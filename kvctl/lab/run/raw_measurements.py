"""The raw measurements of a run, from which its result is built."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from kvcore.status import DeviceStatus
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.config.copy_settings import CopyRow
from kvctl.lab.config.scenario import Scenario, SystemSpec
from kvctl.lab.latency import Latency, LatencySamples
from kvctl.lab.process_messages import CallTimes, EngineReport, Tally
from kvctl.lab.rank.isolated_calls import IsolatedLookups
from kvctl.lab.run.fault_injection import InjectedFault


@dataclass(frozen=True, slots=True)
class TierBytes:
    """Bytes loaded from one tier."""

    kind: str
    num_bytes: int


@dataclass(slots=True)
class RawMeasurements:
    """Everything that a driver measured. What was not measured keeps its default."""

    name: str
    scenario: Scenario
    seed: int
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    elapsed_s: float = 0.0
    interrupted: bool = False
    reports: list[EngineReport] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Problems outside of requests; each counts as an error."""
    leases_leaked: int = 0
    pings: Latency | None = None
    ceilings: Ceilings | None = None
    alone: list[CallTimes] = field(default_factory=list)
    """Isolated calls of ranks after the load; `lookup_alone` are those of lookups."""
    lookup_alone: IsolatedLookups | None = None
    copies: list[CopyRow] = field(default_factory=list)
    copies_wrong: int = 0
    devices: tuple[DeviceStatus, ...] = ()
    """GPUs with caches that the first server copied."""
    storms: list[LatencySamples] = field(default_factory=list)
    """Concurrent registrations of all ranks, before the load."""
    struck: list[InjectedFault] = field(default_factory=list)
    """Injected faults."""
    begun_s: float = 0.0
    """Start of the load on the host's monotonic clock."""
    counters: list[Counter[str]] = field(default_factory=list)
    """Growth of each server's counters during the load."""
    tier_bytes: list[TierBytes] = field(default_factory=list)
    """Bytes loaded from each tier during the load, in order of tiers."""
    server_bytes: tuple[int, int] | None = None
    """The servers' private memory before and after the load."""
    spec: SystemSpec = field(default_factory=SystemSpec)
    turns: str | None = None
    """Rendezvous address of an interleaved run, which used half of the time."""

    def tally(self) -> Tally:
        """Return the sum of the engines' counts."""
        total = Tally()
        for report in self.reports:
            total.add(report.tally)
        return total
