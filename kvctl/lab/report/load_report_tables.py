"""The report of a load as tables and lines."""

from __future__ import annotations

from collections.abc import Iterator

from kvctl.console import Table, duration
from kvctl.lab.config.scenario import Fault
from kvctl.lab.latency import Latency
from kvctl.lab.results.load_report import Goodput, LoadReport, SweepStep, TenantReport
from kvctl.lab.run.fault_injection import FaultReport

NOTHING = "-"


def build_tables(load: LoadReport) -> Iterator[Table | str]:
    """Yield tables and lines beside counts and latencies."""
    yield from _sentences(load)
    if load.steps:
        yield _steps(load.steps)
    if load.tenants:
        yield _tenants(load.tenants)
    if load.faults:
        yield _faults(load.faults)


def _sentences(load: LoadReport) -> Iterator[str]:
    if load.offered_per_s is not None:
        yield (
            f"{load.offered_per_s:,.1f} requests/s offered, {load.done_per_s:,.1f} "
            f"completed; generator lag {_pair(load.lag)}, wait for a slot "
            f"{_pair(load.waited)} (p50, p99)"
        )
    if load.generator_bound:
        yield "the load generator was the bottleneck: it lagged behind due times"
    if load.warm_ups or load.aborted or load.preemptions:
        yield (
            f"warm-up {load.warm_ups:,} requests, aborted {load.aborted:,}, "
            f"preemptions {load.preemptions:,}"
        )
    if load.ttft is not None:
        yield f"time to first token {_pair(load.ttft)} (p50, p99)"
    if load.goodput is not None:
        yield (
            f"goodput {load.goodput.per_s:,.1f} requests/s, {load.goodput.share:.1%} "
            "within the limits"
        )
    if load.sessions is not None:
        hits = load.sessions
        yield (
            f"{hits.num_sessions:,} sessions: hit rate p10 {hits.p10:.3f}, p50 "
            f"{hits.p50:.3f}, p90 {hits.p90:.3f}; first requests "
            f"{hits.first_requests:.3f}, later requests {hits.later_requests:.3f}"
        )
    if load.steps:
        yield (
            "saturated at the first step"
            if load.saturated_at is None and not load.steps[0].kept_up
            else f"saturates above {load.saturated_at:,.1f} requests/s"
            if load.saturated_at is not None
            else "not saturated: add steps, or a longer workload"
        )
    if load.fairness is not None:
        yield f"fairness of hit rates over engines (Jain's index) {load.fairness:.3f}"


def _pair(latency: Latency | None) -> str:
    if latency is None:
        return NOTHING
    return f"{_duration(latency.p50_s)}, {_duration(latency.p99_s)}"


def _duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else duration(seconds)


def _steps(steps: tuple[SweepStep, ...]) -> Table:
    rows = tuple(
        (
            f"{step.rate:,.1f}",
            f"{step.requests:,}",
            f"{step.done_in_time:.0%}",
            *_of_latency(step.request),
            _goodput(step.goodput),
            "yes" if step.kept_up else "no",
        )
        for step in steps
    )
    columns = (
        ">offered/s",
        ">requests",
        ">in time",
        ">p50",
        ">p99",
        ">goodput",
        "kept up",
    )
    return Table("sweep", columns, rows)


def _of_latency(latency: Latency | None) -> tuple[str, ...]:
    if latency is None:
        return (NOTHING, NOTHING)
    return (_duration(latency.p50_s), _duration(latency.p99_s))


def _goodput(goodput: Goodput | None) -> str:
    return NOTHING if goodput is None else f"{goodput.share:.0%}"


def _tenants(tenants: tuple[TenantReport, ...]) -> Table:
    rows = tuple(
        (
            one.name,
            f"{one.requests:,}",
            f"{one.requests_per_s:,.1f}",
            f"{one.hit_rate:.3f}",
            *_of_latency(one.request),
            *_of_latency(one.ttft),
        )
        for one in tenants
    )
    latencies = (">p50", ">p99", ">ttft p50", ">ttft p99")
    columns = ("tenant", ">requests", ">per s", ">hit rate", *latencies)
    return Table("tenants", columns, rows)


def _faults(faults: tuple[FaultReport, ...]) -> Table:
    rows = tuple(
        (
            fault_name(one.fault),
            f"{one.struck_s:.1f} s",
            _duration(one.back_s),
            _duration(one.noticed_s),
            _duration(one.recovered_s),
            f"{one.requests_failed:,}",
            f"{one.requests_slowed:,}",
            _rate(one.hit_rate_before),
            _rate(one.hit_rate_during),
        )
        for one in faults
    )
    after = (
        ">back",
        ">detected",
        ">recovered",
        ">failed",
        ">slowed",
        ">hit rate before",
    )
    return Table(
        "faults; times since each was injected",
        ("fault", ">at", *after, ">during"),
        rows,
    )


def _rate(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def fault_name(fault: Fault) -> str:
    """Return a fault's action and target."""
    if fault.target == "worker":
        return f"{fault.action} rank {fault.rank} of engine {fault.engine}"
    return f"{fault.action} {fault.service or fault.target}"
