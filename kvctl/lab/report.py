"""A result as tables."""

from __future__ import annotations

from collections.abc import Iterator

from kvctl.console import Table
from kvctl.lab.measure import Latency
from kvctl.lab.result import Result

NOTHING = "-"


def parts(result: Result) -> Iterator[Table | str]:
    """Render a result for `console.show`."""
    yield _headline(result)
    yield _counts(result)
    yield _operations(result)
    yield _copies(result)
    if result.ceilings:
        yield _round_trips(result)
    for message in result.errors:
        yield f"error: {message}"
    for problem in result.problems:
        yield f"problem: {problem}"


def _headline(result: Result) -> str:
    scenario, rates = result.scenario, result.throughput
    model = scenario.model.geometry()
    ended = ", interrupted" if result.interrupted else ""
    return (
        f"{result.name}: {model.model}, {scenario.engines} engines x {scenario.ranks} "
        f"ranks, {result.elapsed_s:.1f} s, {rates.requests_per_s:,.1f} requests/s, "
        f"{rates.tokens_per_s:,.0f} tokens/s{ended}"
    )


def _counts(result: Result) -> Table:
    counts, rates = result.counts, result.hit_rates
    rows = (
        ("requests", f"{counts.requests:,}"),
        ("errors", f"{counts.errors:,}"),
        ("bytes checked", f"{counts.retrieved_bytes:,}"),
        ("bytes wrong", f"{counts.bytes_wrong:,}"),
        ("leases leaked", f"{counts.leases_leaked:,}"),
        ("hit rate by token", _rate(rates.by_token, rates.ideal_by_token)),
        ("hit rate by block", _rate(rates.by_block, rates.ideal_by_block)),
        ("parts stored", f"{counts.parts_stored:,}"),
        ("parts dropped", f"{counts.parts_dropped:,}"),
    )
    return Table("counts", ("", ">"), rows)


def _rate(served: float, ideal: float) -> str:
    return f"{served:.3f} (endless cache {ideal:.3f})"


def _operations(result: Result) -> Table:
    rows = tuple(
        (name, f"{latency.count:,}", *_percentiles(latency))
        for name, latency in result.operations.items()
    )
    columns = ("call", ">count", ">p50", ">p90", ">p99", ">p99.9", ">max")
    return Table("latency", columns, rows)


def _percentiles(latency: Latency) -> tuple[str, ...]:
    return tuple(
        duration(seconds)
        for seconds in (
            latency.p50_s,
            latency.p90_s,
            latency.p99_s,
            latency.p999_s,
            latency.max_s,
        )
    )


def duration(seconds: float) -> str:
    """Write a duration with three digits: `12.3 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _copies(result: Result) -> Table:
    ceilings, rates, shares = result.ceilings, result.throughput, result.shares
    idle = _number(ceilings.copy_gb_per_s if ceilings else None)
    pieces = _number(ceilings.gather_gb_per_s if ceilings else None)
    beside = _number(rates.plain_copy_gb_per_s)
    rows = tuple(
        (name, _number(rate), beside, _share(share), idle, pieces)
        for name, rate, share in (
            ("store", rates.store_gb_per_s, shares.store),
            ("retrieve", rates.retrieve_gb_per_s, shares.retrieve),
        )
    )
    columns = (">in calls", ">plain copy beside", ">share", ">idle", ">idle in pieces")
    sizes = (
        f" (idle: {ceilings.copy_bytes:,} bytes, pieces of {ceilings.piece_bytes:,})"
        if ceilings
        else ""
    )
    return Table(f"copies, GB/s{sizes}", ("", *columns), rows)


def _round_trips(result: Result) -> Table:
    ceilings, shares = result.ceilings, result.shares
    if ceilings is None:
        return Table("", (), ())
    rows = tuple(
        (name, duration(result.operations[name].p50_s), duration(bare), _share(share))
        for name, bare, share in (
            ("ping", ceilings.ping_round_trip_s, shares.ping),
            ("lookup", ceilings.lookup_round_trip_s, shares.lookup),
        )
        if name in result.operations
    )
    return Table("round trips, p50", ("", ">ours", ">bare sockets", ">share"), rows)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"
