"""Faults under load: what happens to which process when, and what came of it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from kvctl.lab.engine.request_log import Outcome, Records
from kvctl.lab.scenario import Fault


class FaultReport(msgspec.Struct, frozen=True):
    """One fault and what it did. Times count from the moment that it struck."""

    fault: Fault
    struck_s: Annotated[float, Meta(description="after the start of the load")]
    back_s: Annotated[float | None, Meta(description="the process was there again")]
    noticed_s: Annotated[
        float | None, Meta(description="the server's notice, or first failed request")
    ]
    recovered_s: Annotated[
        float | None,
        Meta(
            description="first request that began when it was back and ended; of a "
            "tier, when the server asks it again"
        ),
    ]
    requests_failed: int
    requests_slowed: Annotated[
        int, Meta(description="ended, later than any request before the fault")
    ]
    hit_rate_before: Annotated[
        float | None, Meta(description="of requests that ended before it")
    ] = None
    hit_rate_during: Annotated[
        float | None, Meta(description="of those that began until it was recovered")
    ] = None


@dataclass(slots=True)
class FaultNotice:
    """What the server knew of a fault. Times are of the host's monotonic clock."""

    noticed_s: float | None = None
    recovered_s: float | None = None


class FaultTarget(Protocol):
    """Something that a fault can strike.

    What strikes it returns what the server notices, where it can be asked; more may
    be entered there later.
    """

    def kill(self) -> FaultNotice | None:
        """End it at once; it says no goodbye."""

    def end(self) -> FaultNotice | None:
        """Ask it to end."""

    def freeze(self) -> FaultNotice | None:
        """Make it stand still."""

    def thaw(self) -> None:
        """Let it go on."""

    def begin(self) -> None:
        """Bring it back after it was killed or has ended."""


@dataclass(slots=True)
class FaultOutcome:
    """A fault that has happened. Times are of the host's monotonic clock."""

    fault: Fault
    at_s: float
    back_s: float | None = None
    notice: FaultNotice = field(default_factory=FaultNotice)


@dataclass(slots=True)
class FaultPlan:
    """What is still to happen, and what has; `play` makes what is due happen."""

    epoch_s: float
    victim_of: Callable[[Fault], FaultTarget]
    clock: Callable[[], float]
    struck: list[FaultOutcome] = field(default_factory=list)
    away: int = 0
    """Processes that were struck and are not back yet."""
    _due: list[_Planned] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    def add(self, fault: Fault) -> None:
        """Plan a fault."""
        self._plan(self.epoch_s + fault.at_s, lambda: self._strike(fault))

    @property
    def next_s(self) -> float | None:
        """When something is due next."""
        return self._due[0].at_s if self._due else None

    def play(self) -> None:
        """Make happen what is due."""
        while self._due and self._due[0].at_s <= self.clock():
            heapq.heappop(self._due).action()

    def _plan(self, at_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, _Planned(at_s, next(self._numbers), action))

    def _strike(self, fault: Fault) -> None:
        victim = self.victim_of(fault)
        struck = FaultOutcome(fault, self.clock())
        self.struck.append(struck)
        self.away += 1
        strike = {"stop": victim.freeze, "kill": victim.kill, "restart": victim.end}
        struck.notice = strike[fault.action]() or struck.notice
        bring_back = victim.thaw if fault.action == "stop" else victim.begin
        self._plan(struck.at_s + fault.for_s, lambda: self._return(struck, bring_back))

    def _return(self, struck: FaultOutcome, bring_back: Callable[[], None]) -> None:
        bring_back()
        struck.back_s = self.clock()
        self.away -= 1


@dataclass(order=True, frozen=True, slots=True)
class _Planned:
    at_s: float
    number: int
    action: Callable[[], None] = field(compare=False)


def describe(struck: FaultOutcome, epoch_s: float, records: Records) -> FaultReport:
    """Find in the journal what a fault did to requests."""
    at_s, fault = struck.at_s, struck.fault
    ours = records
    if fault.target == "worker":
        ours = records[records["engine"] == fault.engine]
    done = ours["outcome"] == Outcome.DONE
    after = struck.back_s or at_s
    recovered = ours["ended_s"][done & (ours["begun_s"] >= after)]
    recovered_s = float(recovered.min()) if recovered.size else None
    if fault.target == "service":
        recovered_s = struck.notice.recovered_s
    until = recovered_s or float("inf")
    touched = (ours["ended_s"] >= at_s) & (ours["begun_s"] <= until)
    failed = touched & (ours["outcome"] == Outcome.FAILED)
    latency = ours["ended_s"] - ours["due_s"]
    before = latency[done & (ours["ended_s"] < at_s)]
    usual = float(before.max()) if before.size else float("inf")
    noticed = struck.notice.noticed_s
    if noticed is None and failed.any():
        noticed = float(ours["ended_s"][failed].min())
    return FaultReport(
        fault=fault,
        struck_s=at_s - epoch_s,
        back_s=None if struck.back_s is None else struck.back_s - at_s,
        noticed_s=None if noticed is None else noticed - at_s,
        recovered_s=None if recovered_s is None else recovered_s - at_s,
        requests_failed=int(np.count_nonzero(failed)),
        requests_slowed=int(np.count_nonzero(touched & done & (latency > usual))),
        hit_rate_before=_hit_rate(ours[ours["ended_s"] < at_s]),
        hit_rate_during=_hit_rate(
            ours[(ours["begun_s"] >= at_s) & (ours["begun_s"] < until)]
        ),
    )


def _hit_rate(records: Records) -> float | None:
    tokens = int(records["tokens"].sum())
    return int(records["tokens_hit"].sum()) / tokens if tokens else None
