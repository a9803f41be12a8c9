"""Fault injection: the schedule of faults, and their effects on requests."""

from __future__ import annotations

import heapq
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Annotated, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from kvctl.lab.config.scenario import Fault
from kvctl.lab.engine.engine_statistics import Outcome, Records

SIGNALS = {
    "stop": signal.SIGSTOP,
    "kill": signal.SIGKILL,
    "restart": signal.SIGTERM,
}
"""Signal of each action."""


class FaultReport(msgspec.Struct, frozen=True):
    """One fault and its effects. Times are relative to its injection."""

    fault: Fault
    struck_s: Annotated[float, Meta(description="after the start of the load")]
    back_s: Annotated[
        float | None, Meta(description="the process was resumed or started again")
    ]
    noticed_s: Annotated[
        float | None,
        Meta(description="detected by the server, or the first failed request"),
    ]
    recovered_s: Annotated[
        float | None,
        Meta(
            description="end of the first request that began after back_s; of a tier: "
            "the server uses it again"
        ),
    ]
    requests_failed: int
    requests_slowed: Annotated[
        int, Meta(description="done, and slower than any request before the fault")
    ]
    hit_rate_before: Annotated[
        float | None, Meta(description="of requests that ended before the fault")
    ] = None
    hit_rate_during: Annotated[
        float | None, Meta(description="of requests that began until the recovery")
    ] = None


@dataclass(slots=True)
class FaultNotice:
    """The server's view of a fault, on the host's monotonic clock."""

    noticed_s: float | None = None
    recovered_s: float | None = None


class FaultTarget(Protocol):
    """A process into which faults can be injected."""

    def send_signal(self, number: signal.Signals) -> FaultNotice | None:
        """Send a signal; a notice that is returned may be completed later."""

    def start_again(self) -> None:
        """Start the process again, after a signal that ends it."""


@dataclass(slots=True)
class InjectedFault:
    """A fault that was injected. Times are on the host's monotonic clock."""

    fault: Fault
    at_s: float
    back_s: float | None = None
    notice: FaultNotice = field(default_factory=FaultNotice)


@dataclass(slots=True)
class FaultInjector:
    """Injects scheduled faults, and ends them, when `inject_due` is called."""

    epoch_s: float
    target_of: Callable[[Fault], FaultTarget]
    clock: Callable[[], float]
    injected: list[InjectedFault] = field(default_factory=list)
    num_active: int = 0
    """Faults whose processes are not back yet."""
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    """A heap of times, numbers in order of scheduling, and actions."""
    _numbers: count[int] = field(default_factory=count)

    def schedule(self, fault: Fault) -> None:
        """Schedule a fault."""
        self._add(self.epoch_s + fault.at_s, lambda: self._inject(fault))

    @property
    def next_s(self) -> float | None:
        """Time of the next action; None if there is none."""
        return self._due[0][0] if self._due else None

    def inject_due(self) -> None:
        """Execute the actions that are due."""
        while self._due and self._due[0][0] <= self.clock():
            _, _, execute = heapq.heappop(self._due)
            execute()

    def _add(self, at_s: float, execute: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_s, next(self._numbers), execute))

    def _inject(self, fault: Fault) -> None:
        target = self.target_of(fault)
        injected = InjectedFault(fault, self.clock())
        self.injected.append(injected)
        self.num_active += 1
        notice = target.send_signal(SIGNALS[fault.action])
        injected.notice = notice or injected.notice
        restore: Callable[[], object] = target.start_again
        if fault.action == "stop":
            restore = partial(target.send_signal, signal.SIGCONT)
        self._add(injected.at_s + fault.for_s, lambda: self._restore(injected, restore))

    def _restore(self, injected: InjectedFault, restore: Callable[[], object]) -> None:
        restore()
        injected.back_s = self.clock()
        self.num_active -= 1


def describe(injected: InjectedFault, epoch_s: float, records: Records) -> FaultReport:
    """Return the effects of a fault on the requests of a log."""
    at_s, fault = injected.at_s, injected.fault
    if fault.target == "worker":
        records = records[records["engine"] == fault.engine]
    done = records["outcome"] == Outcome.DONE
    after = injected.back_s or at_s
    recovered = records["ended_s"][done & (records["begun_s"] >= after)]
    recovered_s = float(recovered.min()) if recovered.size else None
    if fault.target == "service":
        recovered_s = injected.notice.recovered_s
    until = recovered_s or float("inf")
    affected = (records["ended_s"] >= at_s) & (records["begun_s"] <= until)
    failed = affected & (records["outcome"] == Outcome.FAILED)
    latency = records["ended_s"] - records["due_s"]
    before = latency[done & (records["ended_s"] < at_s)]
    slowest = float(before.max()) if before.size else float("inf")
    noticed_s = injected.notice.noticed_s
    if noticed_s is None and failed.any():
        noticed_s = float(records["ended_s"][failed].min())

    def since_fault(time_s: float | None) -> float | None:
        return None if time_s is None else time_s - at_s

    during = (records["begun_s"] >= at_s) & (records["begun_s"] < until)
    return FaultReport(
        fault=fault,
        struck_s=at_s - epoch_s,
        back_s=since_fault(injected.back_s),
        noticed_s=since_fault(noticed_s),
        recovered_s=since_fault(recovered_s),
        requests_failed=int(np.count_nonzero(failed)),
        requests_slowed=int(np.count_nonzero(affected & done & (latency > slowest))),
        hit_rate_before=_hit_rate(records[records["ended_s"] < at_s]),
        hit_rate_during=_hit_rate(records[during]),
    )


def _hit_rate(records: Records) -> float | None:
    tokens = int(records["tokens"].sum())
    return int(records["tokens_hit"].sum()) / tokens if tokens else None
