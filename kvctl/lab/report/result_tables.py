"""A result as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import fmean

from kvcore.options import ByteSize
from kvctl.console import Table, duration, many, size, spark
from kvctl.lab.compare.conclusions import of_result
from kvctl.lab.config.copy_settings import CopyRow
from kvctl.lab.latency import Latency
from kvctl.lab.report import load_tables
from kvctl.lab.results import simulated_hosts as hosts
from kvctl.lab.results.ceiling_shares import NOTE, reached
from kvctl.lab.results.result import DocumentReuse, Result, TierHits

NOTHING = "-"
MIN_POINTS = 3


def parts(result: Result) -> Iterator[Table | str]:
    """Render a result for `console.show`."""
    yield _headline(result)
    if result.scenario.question:
        yield result.scenario.question
    if not result.problems:  # They end the tables, where they are seen.
        yield of_result(result)
    yield _counts(result)
    if result.documents:
        yield _documents(result, result.documents)
    yield from hosts.parts(result.hosts)
    yield _operations(result)
    yield from _courses(result)
    yield from _limits(result)
    if result.copies:
        yield copy_rows(result.copies)
    if result.load:
        yield from load_tables.parts(result.load)
    for message, times in Counter(result.errors).items():
        if message not in result.problems:
            yield f"error: {message}" + (f" ({times} times)" if times > 1 else "")
    for problem in result.problems:
        yield f"problem: {problem}"


def _headline(result: Result) -> str:
    scenario, rates = result.scenario, result.throughput
    model = scenario.model.geometry()
    ended = ", interrupted" if result.interrupted else ""
    return (
        f"{result.name}: {model.model}, {many(scenario.engines, 'engine')} x "
        f"{many(scenario.ranks, 'rank')}, {result.elapsed_s:.1f} s, "
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
        ("hit rate by token", _rate(rates.by_token, rates.ideal_by_token)),
        *((f"  from {one.name}", _brought(one)) for one in result.tiers),
        ("hit rate by block", _rate(rates.by_block, rates.ideal_by_block)),
        ("parts stored", f"{counts.parts_stored:,}"),
        ("parts dropped", f"{counts.parts_dropped:,}"),
        *_memory(result),
    )
    return Table("counts", ("", ">"), rows)


def _rate(served: float, ideal: float) -> str:
    return f"{served:.3f} (endless cache {ideal:.3f})"


def _memory(result: Result) -> Iterator[tuple[str, str]]:
    if result.server_bytes:
        begun, ended = map(size, result.server_bytes)
        yield "server's memory beside L1", f"{begun}, after the load {ended}"


def _brought(one: TierHits) -> str:
    loaded = "" if one.loaded_bytes is None else f" ({size(one.loaded_bytes)} loaded)"
    return f"{one.hit_rate:.3f}{loaded}"


def _documents(result: Result, reuse: DocumentReuse) -> Table:
    """Put reuse by prefix alone beside reuse at any position."""
    counts, contents = result.counts, reuse.contents or 1
    tokens, chunks = counts.tokens or 1, reuse.chunks or 1
    rows = (
        (
            "prompt tokens served",
            f"{counts.tokens_hit / tokens:.3f}",
            f"{reuse.tokens_hit / tokens:.3f}",
        ),
        (
            "whole chunks served",
            f"{result.hit_rates.by_block:.3f}",
            f"{reuse.chunks_hit / chunks:.3f}",
        ),
        (
            "endless cache, whole chunks",
            f"{result.hit_rates.ideal_by_block:.3f}",
            f"{reuse.chunks_hit_ideal / chunks:.3f}",
        ),
        (
            "served of the endless cache's",
            _share(counts.chunks_hit / (counts.chunks_hit_ideal or 1)),
            _share(reuse.share_of_ideal),
        ),
        (
            "endless cache, contents of any length",
            f"{reuse.contents_prefix / contents:.3f}",
            f"{reuse.contents_anywhere / contents:.3f}",
        ),
    )
    return Table("reuse", ("", ">by prefix alone", ">by documents anywhere"), rows)


def _courses(result: Result) -> Iterator[Table]:
    """Draw how the run went, where it was long enough to see."""
    points = result.series.points if result.series else ()
    if len(points) < MIN_POINTS or result.series is None:
        return
    width = result.series.width_s
    requests = [point.counts.get("requests", 0) / width for point in points]
    hits = [
        point.counts.get("tokens_hit", 0) / max(1, point.counts.get("tokens", 0))
        for point in points
    ]
    moments = [point.operations.get("request") for point in points]
    tails = [moment.p99_s if moment else 0.0 for moment in moments]
    rows = (
        _course("requests/s", requests, "{:,.3g}".format),
        _course("hit rate", hits, "{:.3f}".format),
        _course("request p99", tails, duration),
    )
    columns = ("", "", ">first tenth", ">last tenth", ">highest")
    yield Table(f"over {points[-1].end_s:g} s", columns, rows)


def _course(
    name: str, values: list[float], write: Callable[[float], str]
) -> tuple[str, ...]:
    """Draw values; beside them the means of the first and the last, and the highest."""
    many = max(1, len(values) // 10)
    shown = (fmean(values[:many]), fmean(values[-many:]), max(values))
    return (name, spark(values), *map(write, shown))


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


def _limits(result: Result) -> Iterator[Table | str]:
    """What calls reached of what the machine could, alone and under load."""
    rows = tuple(
        (one.name, one.size, one.figure, one.limit, f"{one.share:.0%}")
        for one in reached(result)
    )
    if rows:
        columns = ("call", ">size", ">reached", ">limit", ">share")
        yield Table("how near to what this machine can do", columns, rows)
        yield NOTE


def copy_rows(rows: tuple[CopyRow, ...]) -> Table:
    """Put every setting of `copies` in a row."""
    calls = (">store", ">retrieve", ">both at once")
    costs = (">spread", ">server us/chunk", ">slowdown")
    columns = ("pieces", "order", ">workers", *calls, *costs)
    made = tuple(
        (
            str(ByteSize(row.setting.piece_bytes)),
            row.setting.order,
            str(row.setting.workers),
            f"{row.store_gb_per_s:.3g} ({row.store:.0%})",
            f"{row.retrieve_gb_per_s:.3g} ({row.retrieve:.0%})",
            f"{row.both_gb_per_s:.3g} ({row.both:.0%})",
            _share(row.spread),
            _if_known(row.server_s_per_chunk, lambda s: f"{s * 1e6:,.0f}"),
            _if_known(row.product_slowdown, _share),
        )
        for row in rows
    )
    size = ByteSize(rows[0].call_bytes)
    title = f"GB/s of a worker in calls of {size} (share of plain copies beside them)"
    return Table(title, columns, made)


def _if_known(value: float | None, text: Callable[[float], str]) -> str:
    return NOTHING if value is None else text(value)


def _share(value: float) -> str:
    return f"{value:.0%}"
