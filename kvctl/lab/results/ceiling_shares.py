"""What calls reached of what the machine could, as one list for tables and pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvctl.console import duration, size
from kvctl.lab.rank.isolated_calls import IsolatedTimings
from kvctl.lab.results.result import Result

NOTE = (
    "Limits: alone, a plain copy of as many bytes and a bare round trip; of lookups "
    "and pings a bare round trip of their size; under load, plain copies that the "
    "ranks made between their calls. All processes of a run share its cores."
)


@dataclass(frozen=True, slots=True)
class Reached:
    """One figure, the limit that it is held against, and its share of that."""

    name: str
    size: str
    figure: str
    limit: str
    share: float


def reached(result: Result) -> Iterator[Reached]:
    """List calls made alone, one at a time, then those under load."""
    if result.alone:
        yield from _alone(result.alone)
    ceilings, ping = result.ceilings, result.operations.get("ping")
    if ceilings and ping:
        trip_s = ceilings.ping_round_trip_s
        yield _timed("ping, alone", "", ping.p50_s, trip_s)
    yield from _under_load(result)


def _alone(alone: IsolatedTimings) -> Iterator[Reached]:
    limit_s = alone.copy_bytes / alone.plain_copy_gb_per_s / 1e9 + alone.ping_trip_s
    for name, rate in (
        ("store", alone.store_gb_per_s),
        ("retrieve", alone.retrieve_gb_per_s),
    ):
        took_s = alone.copy_bytes / rate / 1e9
        many = size(alone.copy_bytes)
        yield _timed(f"{name}, alone", many, took_s, limit_s)
    if alone.lookup is not None:
        trip_s = alone.lookup * alone.lookup_s
        many = f"{alone.lookup_tokens:,} tokens"
        yield _timed("lookup, alone", many, alone.lookup_s, trip_s)


def _under_load(result: Result) -> Iterator[Reached]:
    rates, shares = result.throughput, result.shares
    for name, share, rate in (
        ("store", shares.store, rates.store_gb_per_s),
        ("retrieve", shares.retrieve, rates.retrieve_gb_per_s),
    ):
        if share and rate:
            limit = f"{rate / share:.3g} GB/s"
            yield Reached(f"{name}, under load", "", f"{rate:.3g} GB/s", limit, share)
    lookup, ceilings = result.operations.get("lookup"), result.ceilings
    if lookup and ceilings:
        trip_s = ceilings.lookup_round_trip_s
        yield _timed("lookup, under load", "", lookup.p50_s, trip_s)


def _timed(name: str, many: str, took_s: float, limit_s: float) -> Reached:
    share = limit_s / took_s
    return Reached(name, many, duration(took_s), duration(limit_s), share)
