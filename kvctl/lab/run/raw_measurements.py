"""All that a run found, before anybody adds it up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from kvcore.status import DeviceStatus
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.latency_samples import Latency, LatencySamples
from kvctl.lab.process_messages import (
    EngineReport,
    MeasuredAlone,
    MeasuredCopies,
    Tally,
)
from kvctl.lab.rank.isolated_calls import IsolatedLookups
from kvctl.lab.run.fault_plan import FaultOutcome
from kvctl.lab.scenario import Scenario
from kvctl.lab.systems.system_interface import SystemSpec
from kvctl.lab.workload.copy_settings import CopyRow


@dataclass(frozen=True, slots=True)
class TierBytes:
    """What came from one tier."""

    kind: str
    num_bytes: int


@dataclass(slots=True)
class RawMeasurements:
    """All that a driver gathered. What it could not gather keeps its default."""

    name: str
    scenario: Scenario
    seed: int
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    elapsed_s: float = 0.0
    interrupted: bool = False
    reports: list[EngineReport] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What went wrong outside of requests; each counts as an error."""
    leases_leaked: int = 0
    pings: Latency | None = None
    ceilings: Ceilings | None = None
    alone: list[MeasuredAlone] = field(default_factory=list)
    """From ranks that called alone, after the load; likewise `lookup_alone`."""
    lookup_alone: IsolatedLookups | None = None
    num_warm: int = 0
    """Ranks of the setting that is being copied that have made their first calls."""
    copied: list[MeasuredCopies] = field(default_factory=list)
    """From the ranks of the setting that is being copied."""
    copies: list[CopyRow] = field(default_factory=list)
    copies_wrong: int = 0
    devices: tuple[DeviceStatus, ...] = ()
    """GPUs whose caches the first server copied."""
    storms: list[LatencySamples] = field(default_factory=list)
    """Of registrations, all ranks at once, before the load."""
    struck: list[FaultOutcome] = field(default_factory=list)
    """Faults that happened."""
    begun_s: float = 0.0
    """When the load began, on the host's monotonic clock."""
    counters: list[Counter[str]] = field(default_factory=list)
    """Each server's own, grown during the load."""
    tier_bytes: list[TierBytes] = field(default_factory=list)
    """Loaded from each tier during the load, in their order."""
    server_bytes: tuple[int, int] | None = None
    """The servers' own memory when the load began and when it had ended."""
    spec: SystemSpec = field(default_factory=SystemSpec)
    turns: str | None = None
    """Where it met the run that it took turns with: half of the time was another's."""

    def tally(self) -> Tally:
        """Add up what the engines counted."""
        total = Tally()
        for report in self.reports:
            total.add(report.tally)
        return total
