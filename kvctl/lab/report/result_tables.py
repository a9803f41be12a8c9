"""A result as a sentence and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from kvcore.option_structs import ByteSize
from kvctl.console import Table, duration, plural, size, sparkline
from kvctl.lab.config.copy_settings import CopyRow
from kvctl.lab.rank.isolated_calls import IsolatedTimings
from kvctl.lab.report import load_report_tables
from kvctl.lab.results.result import DocumentReuse, HostReport, Result, TierHits

NOTHING = "-"
MIN_POINTS = 3
CEILING_NOTE = (
    "Ceilings: for calls made alone, a plain copy of as many bytes and a bare round "
    "trip; for lookups and pings, a bare round trip of their size; under load, plain "
    "copies that the ranks made between their calls. All processes of a run share "
    "its cores."
)


def build_tables(result: Result) -> Iterator[Table | str]:
    """Yield tables and lines for `console.show`."""
    yield _headline(result)
    if result.scenario.question:
        yield result.scenario.question
    if not result.problems:  # They come last, next to the prompt.
        yield describe_result(result)
    yield _counts(result)
    if result.documents:
        yield _documents(result, result.documents)
    if result.hosts:
        yield _hosts(result.hosts)
    yield _operations(result)
    yield from _series(result)
    yield from _ceilings(result)
    if result.copies:
        yield copy_table(result.copies)
    if result.load:
        yield from load_report_tables.build_tables(result.load)
    for message, times in Counter(result.errors).items():
        if message not in result.problems:
            yield f"error: {message}" + (f" ({times} times)" if times > 1 else "")
    for problem in result.problems:
        yield f"problem: {problem}"


# -- sentences --------------------------------------------------------------------


def describe_result(result: Result) -> str:
    """Return what a run showed, as one sentence."""
    if result.problems:
        return f"{result.name} failed: {result.problems[0]}."
    counts, rates = result.counts, result.hit_rates
    cut = ", until it was interrupted" if result.interrupted else ""
    if result.copies:
        return f"All bytes correct{cut}: {_describe_copies(result.copies)}."
    checked = "All bytes correct" if counts.retrieved_bytes else "Nothing retrieved"
    return (
        f"{checked}{cut}: {rates.by_token:.0%} of tokens came from the cache "
        f"(infinite cache: {rates.ideal_by_token:.0%}), {_describe_load(result)}."
    )


def _describe_load(result: Result) -> str:
    """Return the main figure of this kind of load."""
    load, documents = result.load, result.documents
    if documents and result.counts.tokens:
        share = documents.tokens_hit / result.counts.tokens
        return f"{share:.0%} with documents reused at any position"
    if load and load.faults:
        times = [one.recovered_s for one in load.faults if one.recovered_s is not None]
        failed = sum(one.requests_failed for one in load.faults)
        end = f"recovered within {duration(max(times))}" if times else "not recovered"
        return f"{plural(len(load.faults), 'fault')} {end}, {failed:,} requests failed"
    if load and load.saturated_at is not None:
        return f"it kept up with {load.saturated_at:,.3g} requests/s"
    if load and load.ttft:
        return f"median time to first token {duration(load.ttft.p50_s)}"
    return f"{result.throughput.requests_per_s:,.3g} requests/s"


def _describe_copies(rows: Sequence[CopyRow]) -> str:
    stores, retrieves = ([row.store for row in rows], [row.retrieve for row in rows])
    text = (
        f"stores reached {min(stores):.0%} to {max(stores):.0%} of a plain copy, "
        f"retrieves {min(retrieves):.0%} to {max(retrieves):.0%}"
    )
    slower = [one for row in rows if (one := row.product_slowdown) is not None]
    if slower:
        text += f"; a concurrent matrix product ran at most {max(slower):.0%} slower"
    return text


# -- tables -----------------------------------------------------------------------


def _headline(result: Result) -> str:
    scenario, rates = result.scenario, result.throughput
    model = scenario.model.geometry()
    ended = ", interrupted" if result.interrupted else ""
    return (
        f"{result.name}: {model.model}, {plural(scenario.engines, 'engine')} x "
        f"{plural(scenario.ranks, 'rank')}, {result.elapsed_s:.1f} s, "
        f"{rates.requests_per_s:,.1f} requests/s, "
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
        ("hit rate by token", _hit_rate(rates.by_token, rates.ideal_by_token)),
        *((f"  from {one.name}", _tier_hits(one)) for one in result.tiers),
        ("hit rate by block", _hit_rate(rates.by_block, rates.ideal_by_block)),
        ("parts stored", f"{counts.parts_stored:,}"),
        ("parts dropped", f"{counts.parts_dropped:,}"),
        *_memory(result),
    )
    return Table("counts", ("", ">"), rows)


def _hit_rate(served: float, ideal: float) -> str:
    return f"{served:.3f} (infinite cache {ideal:.3f})"


def _memory(result: Result) -> Iterator[tuple[str, str]]:
    if result.server_bytes:
        start, end = map(size, result.server_bytes)
        yield "server memory without L1", f"{start}, after the load {end}"


def _tier_hits(one: TierHits) -> str:
    loaded = "" if one.loaded_bytes is None else f" ({size(one.loaded_bytes)} loaded)"
    return f"{one.hit_rate:.3f}{loaded}"


def _documents(result: Result, reuse: DocumentReuse) -> Table:
    """Return reuse by prefix beside reuse at any position."""
    counts, rates = result.counts, result.hit_rates
    tokens, chunks = counts.tokens or 1, reuse.chunks or 1
    contents, ideal = reuse.contents or 1, counts.chunks_hit_ideal or 1
    rows = tuple(
        (label, form.format(prefix), form.format(anywhere))
        for label, form, prefix, anywhere in (
            (
                "prompt tokens served", "{:.3f}",
                counts.tokens_hit / tokens, reuse.tokens_hit / tokens,
            ),
            (
                "whole chunks served", "{:.3f}",
                rates.by_block, reuse.chunks_hit / chunks,
            ),
            (
                "infinite cache, whole chunks", "{:.3f}",
                rates.ideal_by_block, reuse.chunks_hit_ideal / chunks,
            ),
            (
                "served share of the infinite cache", "{:.0%}",
                counts.chunks_hit / ideal, reuse.share_of_ideal,
            ),
            (
                "infinite cache, contents of any length", "{:.3f}",
                reuse.contents_prefix / contents, reuse.contents_anywhere / contents,
            ),
        )
    )  # fmt: skip
    return Table("reuse", ("", ">prefixes only", ">documents at any position"), rows)


def _hosts(hosts: Sequence[HostReport]) -> Table:
    rows = tuple(
        (
            str(number),
            f"{one.requests:,}",
            f"{one.chunks:,}",
            f"{one.chunks_hit:,}",
            f"{one.chunks_hit_alone:,}",
            f"{one.chunks_hit_from_others:,}",
            size(one.retrieved_bytes),
            size(one.tier_bytes),
        )
        for number, one in enumerate(hosts)
    )
    columns = (
        "host", ">requests", ">chunks", ">hit", ">possible alone",
        ">from other hosts, at least", ">retrieved", ">from tiers",
    )  # fmt: skip
    return Table("hosts", columns, rows)


def _series(result: Result) -> Iterator[Table]:
    """Yield sparklines of a run with at least MIN_POINTS points."""
    points = result.series.points if result.series else ()
    if len(points) < MIN_POINTS or result.series is None:
        return
    width = result.series.width_s
    requests = [point.counts.get("requests", 0) / width for point in points]
    hits = [
        point.counts.get("tokens_hit", 0) / max(1, point.counts.get("tokens", 0))
        for point in points
    ]
    latencies = [point.operations.get("request") for point in points]
    tails = [latency.p99_s if latency else 0.0 for latency in latencies]
    rows = (
        _series_row("requests/s", requests, "{:,.3g}".format),
        _series_row("hit rate", hits, "{:.3f}".format),
        _series_row("request p99", tails, duration),
    )
    columns = ("", "", ">first tenth", ">last tenth", ">highest")
    yield Table(f"over {points[-1].end_s:g} s", columns, rows)


def _series_row(
    name: str, values: list[float], write: Callable[[float], str]
) -> tuple[str, ...]:
    """Return a sparkline, the means of the first and last tenth, and the maximum."""
    tenth = max(1, len(values) // 10)
    figures = (fmean(values[:tenth]), fmean(values[-tenth:]), max(values))
    return (name, sparkline(values), *map(write, figures))


def _operations(result: Result) -> Table:
    rows = tuple(
        (
            name,
            f"{one.count:,}",
            *map(duration, (one.p50_s, one.p90_s, one.p99_s, one.p999_s, one.max_s)),
        )
        for name, one in result.operations.items()
    )
    columns = ("call", ">count", ">p50", ">p90", ">p99", ">p99.9", ">max")
    return Table("latency", columns, rows)


def copy_table(rows: Sequence[CopyRow]) -> Table:
    """Return one row per setting of `copies`."""
    calls = (">store", ">retrieve", ">both at once")
    costs = (">spread", ">server us/chunk", ">slowdown")
    columns = ("run bytes", "order", ">workers", *calls, *costs)
    made = tuple(
        (
            str(ByteSize(row.setting.piece_bytes)),
            row.setting.order,
            str(row.setting.workers),
            f"{row.store_gb_per_s:.3g} ({row.store:.0%})",
            f"{row.retrieve_gb_per_s:.3g} ({row.retrieve:.0%})",
            f"{row.both_gb_per_s:.3g} ({row.both:.0%})",
            f"{row.spread:.0%}",
            _if_known(row.server_s_per_chunk, lambda s: f"{s * 1e6:,.0f}"),
            _if_known(row.product_slowdown, "{:.0%}".format),
        )
        for row in rows
    )
    call = ByteSize(rows[0].call_bytes)
    title = f"GB/s per worker in calls of {call} (share of a concurrent plain copy)"
    return Table(title, columns, made)


def _if_known(value: float | None, text: Callable[[float], str]) -> str:
    return NOTHING if value is None else text(value)


# -- ceilings ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CeilingShare:
    """One figure, its ceiling, and its share of that."""

    name: str
    size: str
    figure: str
    ceiling: str
    share: float


def _ceilings(result: Result) -> Iterator[Table | str]:
    rows = tuple(
        (one.name, one.size, one.figure, one.ceiling, f"{one.share:.0%}")
        for one in list_ceiling_shares(result)
    )
    if rows:
        columns = ("call", ">size", ">reached", ">ceiling", ">share")
        yield Table("how close to the ceiling of this machine", columns, rows)
        yield CEILING_NOTE


def list_ceiling_shares(result: Result) -> Iterator[CeilingShare]:
    """Yield the calls made alone, one at a time, then those under load."""
    lookup, ping = result.operations.get("lookup"), result.operations.get("ping")
    if result.alone:
        yield from _alone(result.alone)
    if result.ceilings and ping:
        trip_s = result.ceilings.ping_round_trip_s
        yield _timed("ping, alone", "", ping.p50_s, trip_s)
    rates, shares = result.throughput, result.shares
    for name, share, rate in (
        ("store, under load", shares.store, rates.store_gb_per_s),
        ("retrieve, under load", shares.retrieve, rates.retrieve_gb_per_s),
    ):
        if share and rate:
            ceiling = f"{rate / share:.3g} GB/s"
            yield CeilingShare(name, "", f"{rate:.3g} GB/s", ceiling, share)
    if result.ceilings and lookup:
        trip_s = result.ceilings.lookup_round_trip_s
        yield _timed("lookup, under load", "", lookup.p50_s, trip_s)


def _alone(alone: IsolatedTimings) -> Iterator[CeilingShare]:
    limit_s = alone.copy_bytes / alone.plain_copy_gb_per_s / 1e9 + alone.ping_trip_s
    for name, rate in (
        ("store, alone", alone.store_gb_per_s),
        ("retrieve, alone", alone.retrieve_gb_per_s),
    ):
        took_s = alone.copy_bytes / rate / 1e9
        yield _timed(name, size(alone.copy_bytes), took_s, limit_s)
    if alone.lookup is not None:
        trip_s = alone.lookup * alone.lookup_s
        tokens = f"{alone.lookup_tokens:,} tokens"
        yield _timed("lookup, alone", tokens, alone.lookup_s, trip_s)


def _timed(name: str, amount: str, took_s: float, limit_s: float) -> CeilingShare:
    share = limit_s / took_s
    return CeilingShare(name, amount, duration(took_s), duration(limit_s), share)
