"""Report of a load: rates, lag, goodput, sessions, sweep steps, tenants, faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from kvctl.lab.config.arrival_config import ClosedLoop, Sweep
from kvctl.lab.config.scenario import Limits, Scenario
from kvctl.lab.engine.engine_state import GRACE
from kvctl.lab.engine.engine_statistics import Outcome, Records
from kvctl.lab.latency import Latency, summarise
from kvctl.lab.run.fault_injection import FaultReport, InjectedFault, describe

NOTABLE_LAG_S = 0.001
NOTABLE_LAG_SHARE = 0.1
"""Share of the median request. A generator whose p90 lag exceeds both limits is the
bottleneck of its run."""


class Goodput(msgspec.Struct, frozen=True):
    """Requests within the latency limits of the scenario."""

    requests: int
    share: float
    per_s: float


class SessionHits(msgspec.Struct, frozen=True):
    """Token hit rates over sessions."""

    num_sessions: int
    p10: float
    p50: float
    p90: float
    first_requests: Annotated[float, Meta(description="hit rate of first requests")]
    later_requests: Annotated[float, Meta(description="hit rate of all other requests")]


class SweepStep(msgspec.Struct, frozen=True):
    """One step of a sweep."""

    rate: Annotated[float, Meta(description="offered requests per second")]
    requests: int
    done_in_time: Annotated[
        float, Meta(description="share completed by the end of the step")
    ]
    request: Latency | None
    goodput: Goodput | None
    kept_up: bool


class TenantReport(msgspec.Struct, frozen=True):
    """Report of one tenant."""

    name: str
    requests: int
    requests_per_s: float
    hit_rate: float
    request: Latency | None
    ttft: Latency | None


class LoadReport(msgspec.Struct, frozen=True):
    """Report of a load without its warm-up."""

    requests: int
    failed: int
    aborted: int
    preemptions: int
    warm_ups: int
    offered_per_s: Annotated[
        float | None, Meta(description="requests per second; none in a closed loop")
    ]
    done_per_s: float
    lag: Annotated[Latency | None, Meta(description="delay of the load generator")]
    waited: Annotated[
        Latency | None, Meta(description="wait for a free slot, from the due time")
    ]
    generator_bound: Annotated[
        bool, Meta(description="the load generator was the bottleneck")
    ]
    ttft: Annotated[Latency | None, Meta(description="of engines with a time model")]
    goodput: Goodput | None
    sessions: SessionHits | None
    steps: tuple[SweepStep, ...] = ()
    saturated_at: Annotated[
        float | None, Meta(description="rate of the last step before saturation")
    ] = None
    tenants: tuple[TenantReport, ...] = ()
    fairness: Annotated[
        float | None,
        Meta(description="Jain's index of hit rates over engines; 1: all equal"),
    ] = None
    faults: tuple[FaultReport, ...] = ()


def report_load(
    scenario: Scenario,
    records: Records,
    begun_s: float,
    struck: Sequence[InjectedFault] = (),
) -> LoadReport | None:
    """Return the report of a request log; None without measured requests."""
    measured = records[records["warm_up"] == 0]
    if not measured.size:
        return None
    done = measured[measured["outcome"] == Outcome.DONE]
    first_s = float(measured["due_s"].min())
    elapsed_s = max(float(measured["ended_s"].max()) - first_s, 1e-9)
    engines = _engines(scenario)
    due = measured[np.isin(measured["engine"], _open_engines(scenario, engines))]
    request = _latency(done["ended_s"] - done["due_s"])
    lag = _latency(due["lag_s"])
    steps = _steps(scenario, measured, begun_s)
    return LoadReport(
        requests=measured.size,
        failed=int(np.count_nonzero(measured["outcome"] == Outcome.FAILED)),
        aborted=int(np.count_nonzero(measured["outcome"] == Outcome.ABORTED)),
        preemptions=int(measured["preemptions"].sum()),
        warm_ups=records.size - measured.size,
        offered_per_s=_offered_per_s(due),
        done_per_s=done.size / elapsed_s,
        lag=lag,
        waited=_latency(due["begun_s"] - due["due_s"] - due["lag_s"]),
        generator_bound=_is_bound(lag, request),
        ttft=_latency(done["ttft_s"]),
        goodput=_goodput(scenario.limits, measured, elapsed_s),
        sessions=_sessions(measured),
        steps=steps,
        saturated_at=_saturated_at(steps),
        tenants=_tenants(engines, measured, elapsed_s) if scenario.tenants else (),
        fairness=_fairness(measured),
        faults=tuple(describe(one, begun_s, records) for one in struck),
    )


def _open_engines(scenario: Scenario, engines: Mapping[str, range]) -> list[int]:
    """Return the engines with an open loop."""
    return [
        engine
        for name, part in scenario.parts().items()
        if not isinstance(part.load, ClosedLoop)
        for engine in engines[name]
    ]


def _offered_per_s(due: Records) -> float | None:
    if not due.size:
        return None
    return (due.size - 1) / max(float(np.ptp(due["due_s"])), 1e-9)


def _latency(seconds: np.typing.NDArray[np.float64]) -> Latency | None:
    seconds = seconds[~np.isnan(seconds)]
    return summarise(np.maximum(seconds, 0.0)) if seconds.size else None


def _is_bound(lag: Latency | None, request: Latency | None) -> bool:
    if lag is None or request is None:
        return False
    return lag.p90_s > max(NOTABLE_LAG_S, NOTABLE_LAG_SHARE * request.p50_s)


def _goodput(limits: Limits, records: Records, elapsed_s: float) -> Goodput | None:
    """Count requests within the limits; aborted ones are excluded, failed ones miss."""
    if limits.ttft_s is None and limits.request_s is None:
        return None
    counted = records[records["outcome"] != Outcome.ABORTED]
    good = counted["outcome"] == Outcome.DONE
    if limits.ttft_s is not None:
        good &= counted["ttft_s"] <= limits.ttft_s
    if limits.request_s is not None:
        good &= counted["ended_s"] - counted["due_s"] <= limits.request_s
    count = int(np.count_nonzero(good))
    return Goodput(count, count / max(1, counted.size), count / elapsed_s)


def _sessions(records: Records) -> SessionHits | None:
    """Return hit rates over sessions; None if each has a single request."""
    names, place, counts = np.unique(
        records["session"], return_inverse=True, return_counts=True
    )
    if not np.any(counts > 1):
        return None
    hit = np.bincount(place, records["tokens_hit"])
    rates = hit / np.maximum(np.bincount(place, records["tokens"]), 1)
    first = np.zeros(records.size, bool)
    first[np.unique(records["session"], return_index=True)[1]] = True
    p10, p50, p90 = np.quantile(rates, (0.1, 0.5, 0.9)).tolist()
    return SessionHits(
        names.size, p10, p50, p90, _hit_rate(records[first]), _hit_rate(records[~first])
    )


def _hit_rate(records: Records) -> float:
    tokens = int(records["tokens"].sum())
    return int(records["tokens_hit"].sum()) / tokens if tokens else 0.0


def _steps(
    scenario: Scenario, records: Records, begun_s: float
) -> tuple[SweepStep, ...]:
    load = scenario.load
    if not isinstance(load, Sweep):
        return ()
    steps = []
    for number in range(int(records["step"].max()) + 1):
        rows = records[records["step"] == number]
        if not rows.size:
            continue
        end_s = begun_s + (number + 1) * load.step_s
        done = rows[rows["outcome"] == Outcome.DONE]
        in_time = done["ended_s"] <= end_s + load.step_s * GRACE
        share = int(np.count_nonzero(in_time)) / rows.size
        steps.append(
            SweepStep(
                rate=load.rate * load.factor**number,
                requests=rows.size,
                done_in_time=share,
                request=_latency(done["ended_s"] - done["due_s"]),
                goodput=_goodput(scenario.limits, rows, load.step_s),
                kept_up=share >= load.kept_up,
            )
        )
    return tuple(steps)


def _saturated_at(steps: Sequence[SweepStep]) -> float | None:
    """Return the rate before the first saturated step; None if there is none."""
    kept: float | None = None
    for step in steps:
        if not step.kept_up:
            return kept
        kept = step.rate
    return None


def _engines(scenario: Scenario) -> dict[str, range]:
    parts = scenario.parts()
    ends = [*accumulate(part.engines for part in parts.values())]
    return {
        name: range(end - part.engines, end)
        for (name, part), end in zip(parts.items(), ends, strict=True)
    }


def _tenants(
    engines: Mapping[str, range], records: Records, elapsed_s: float
) -> tuple[TenantReport, ...]:
    reports = []
    for name, numbers in engines.items():
        rows = records[np.isin(records["engine"], list(numbers))]
        done = rows[rows["outcome"] == Outcome.DONE]
        reports.append(
            TenantReport(
                name=name,
                requests=rows.size,
                requests_per_s=done.size / elapsed_s,
                hit_rate=_hit_rate(rows),
                request=_latency(done["ended_s"] - done["due_s"]),
                ttft=_latency(done["ttft_s"]),
            )
        )
    return tuple(reports)


def _fairness(records: Records) -> float | None:
    """Return Jain's index over engines (Jain, Chiu and Hawe, DEC-TR-301, 1984)."""
    rates = [
        _hit_rate(records[records["engine"] == engine])
        for engine in np.unique(records["engine"])
    ]
    squares = sum(rate * rate for rate in rates)
    if len(rates) < 2 or not squares:
        return None
    return sum(rates) ** 2 / (len(rates) * squares)
