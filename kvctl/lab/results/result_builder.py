"""Computes the result of a run from the measurements of its processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from kvcore import __version__
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.config.workload_config import Documents
from kvctl.lab.engine.engine_statistics import heads_of, unpack
from kvctl.lab.latency import Latency, LatencySamples
from kvctl.lab.process_messages import EngineReport, Tally
from kvctl.lab.rank.isolated_calls import summarise_isolated
from kvctl.lab.results.load_report import LoadReport, report_load
from kvctl.lab.results.result import (
    RESULT_VERSION,
    Counts,
    DocumentReuse,
    HitRates,
    HostReport,
    Result,
    Shares,
    System,
    Throughput,
    TierHits,
)
from kvctl.lab.results.time_series import build_series
from kvctl.lab.run.environment import detect
from kvctl.lab.run.raw_measurements import RawMeasurements
from kvctl.lab.workload.document_requests import count_contents

MAX_ERRORS = 10


def summarise(raw: RawMeasurements) -> Result:
    """Return the result of a run."""
    tally, spec = raw.tally(), raw.spec
    samples = LatencySamples.merge(report.samples for report in raw.reports)
    operations = samples.summary() | LatencySamples.merge(raw.storms).summary()
    load = report_load(
        raw.scenario,
        unpack(report.journal for report in raw.reports),
        raw.begun_s,
        raw.struck,
    )
    if raw.pings:
        operations["ping"] = raw.pings
    counts = _counts(raw, tally)
    rates = _hit_rates(counts)
    elapsed_s = _elapsed_s(raw, operations)
    throughput = _throughput(tally, elapsed_s)
    errors = [message for report in raw.reports for message in report.errors]
    documents = _documents(raw, tally)
    problems = _problems(counts, raw) + _missed_limits(raw, rates, load, documents)
    return Result(
        version=RESULT_VERSION,
        name=raw.name,
        scenario=raw.scenario,
        seed=raw.seed,
        started=raw.started.isoformat(timespec="milliseconds"),
        elapsed_s=elapsed_s,
        interrupted=raw.interrupted,
        environment=detect(),
        counts=counts,
        hit_rates=rates,
        operations=operations,
        throughput=throughput,
        ceilings=raw.ceilings,
        shares=_shares(throughput, operations, raw.ceilings),
        alone=summarise_isolated(raw.alone, raw.lookup_alone, raw.ceilings),
        copies=tuple(raw.copies),
        devices=raw.devices,
        load=load,
        documents=documents,
        errors=tuple((raw.failures + errors)[:MAX_ERRORS]),
        problems=tuple(problems),
        series=build_series(samples, raw.begun_s),
        counters=_sum(raw.counters),
        tiers=_tiers(raw, counts),
        server_bytes=raw.server_bytes,
        hosts=report_hosts(raw.reports, raw.counters) if raw.scenario.hosts > 1 else (),
        system=System(spec.name, __version__ if spec.is_ours else spec.version),
        turns=samples.medians() if raw.turns else {},
    )


def report_hosts(
    reports: Sequence[EngineReport], counters: Sequence[Mapping[str, int]]
) -> tuple[HostReport, ...]:
    """Return one report per host, from its engines and its server's counters."""
    return tuple(
        _report_host([one for one in reports if one.host == host], growth)
        for host, growth in enumerate(counters)
    )


def _report_host(
    reports: Sequence[EngineReport], growth: Mapping[str, int]
) -> HostReport:
    seen = _distinct(one.chunk_heads for one in reports)
    warm = _distinct(one.warm_heads for one in reports)
    chunks = sum(one.tally.chunks for one in reports)
    return HostReport(
        requests=sum(one.tally.requests for one in reports),
        chunks=chunks,
        chunks_hit=sum(one.tally.chunks_hit for one in reports),
        chunks_hit_alone=chunks - len(seen - warm),
        retrieved_bytes=sum(one.tally.retrieve_bytes for one in reports),
        tier_bytes=growth.get("bytes_prefetched", 0),
    )


def _distinct(heads: Iterable[bytes]) -> set[bytes]:
    return set[bytes]().union(*map(heads_of, heads))


def _sum(counters: Sequence[Counter[str]]) -> dict[str, int]:
    names = dict.fromkeys(name for one in counters for name in one)
    return {name: sum(one[name] for one in counters) for name in names}


def _counts(raw: RawMeasurements, tally: Tally) -> Counts:
    """Sum the counts; in an infinite cache each chunk misses once."""
    seen = _distinct(report.chunk_heads for report in raw.reports)
    warm = _distinct(report.warm_heads for report in raw.reports)
    chunks_hit_ideal = tally.chunks - len(seen - warm)
    chunk_size = raw.scenario.server.chunk_size
    return Counts(
        requests=tally.requests,
        errors=tally.errors + len(raw.failures),
        bytes_wrong=tally.bytes_wrong
        + raw.copies_wrong
        + sum(a.bytes_wrong for a in raw.alone),
        leases_leaked=raw.leases_leaked,
        tokens=tally.tokens,
        tokens_hit=tally.tokens_hit,
        tokens_hit_ideal=chunks_hit_ideal * chunk_size,
        chunks=tally.chunks,
        chunks_hit=tally.chunks_hit,
        chunks_hit_ideal=chunks_hit_ideal,
        parts_stored=tally.parts_stored,
        parts_present=tally.parts_present,
        parts_dropped=tally.parts_dropped,
        retrieved_bytes=tally.retrieve_bytes,
        stored_bytes=tally.store_bytes,
        tokens_from_tiers=tally.tokens_from_tiers,
    )


def _tiers(raw: RawMeasurements, counts: Counts) -> tuple[TierHits, ...]:
    """Split the hits between memory and tiers; empty without tiers."""
    if not raw.tier_bytes:
        return ()
    loaded = sum(tier.num_bytes for tier in raw.tier_bytes)
    share = _ratio(counts.tokens_from_tiers, counts.tokens)
    found = [
        TierHits(
            f"tier {place}: {tier.kind}",
            share * _ratio(tier.num_bytes, loaded),
            tier.num_bytes,
        )
        for place, tier in enumerate(raw.tier_bytes, 1)
    ]
    return (TierHits("L1", _hit_rates(counts).by_token - share), *found)


def _documents(raw: RawMeasurements, tally: Tally) -> DocumentReuse | None:
    """Return the reuse of documents for a workload of documents."""
    workload = raw.scenario.workload
    if not isinstance(workload, Documents):
        return None
    heads = _distinct(report.document_heads for report in raw.reports)
    contents = count_contents(workload, raw.seed)
    return DocumentReuse(
        tokens_hit=tally.document_tokens_hit,
        chunks=tally.document_chunks,
        chunks_hit=tally.document_chunks_hit,
        chunks_hit_ideal=tally.document_chunks - len(heads),
        contents=contents.num_asked,
        contents_prefix=contents.num_prefix,
        contents_anywhere=contents.num_anywhere,
    )


def _hit_rates(counts: Counts) -> HitRates:
    return HitRates(
        by_block=_ratio(counts.chunks_hit, counts.chunks),
        by_token=_ratio(counts.tokens_hit, counts.tokens),
        ideal_by_block=_ratio(counts.chunks_hit_ideal, counts.chunks),
        ideal_by_token=_ratio(counts.tokens_hit_ideal, counts.tokens),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _elapsed_s(raw: RawMeasurements, operations: Mapping[str, Latency]) -> float:
    """Return the duration of the load; for an interleaved run, that of its requests."""
    request = operations.get("request")
    if raw.turns and request:
        return request.mean_s * request.count
    return raw.elapsed_s


def _throughput(tally: Tally, elapsed_s: float) -> Throughput:
    return Throughput(
        requests_per_s=_ratio(tally.requests, elapsed_s),
        tokens_per_s=_ratio(tally.tokens, elapsed_s),
        store_gb_per_s=_gb_per_s(tally.store_bytes, tally.store_s),
        retrieve_gb_per_s=_gb_per_s(tally.retrieve_bytes, tally.retrieve_s),
        plain_copy_gb_per_s=_gb_per_s(tally.copy_bytes, tally.copy_s),
    )


def _gb_per_s(num_bytes: int, seconds: float) -> float | None:
    return num_bytes / seconds / 1e9 if seconds else None


def _shares(
    throughput: Throughput, operations: dict[str, Latency], ceilings: Ceilings | None
) -> Shares:
    plain = throughput.plain_copy_gb_per_s

    def of_copy(gb_per_s: float | None) -> float | None:
        return gb_per_s / plain if gb_per_s and plain else None

    def of_trip(name: str, bare_s: float) -> float | None:
        latency = operations.get(name)
        return bare_s / latency.p50_s if latency else None

    return Shares(
        store=of_copy(throughput.store_gb_per_s),
        retrieve=of_copy(throughput.retrieve_gb_per_s),
        ping=of_trip("ping", ceilings.ping_round_trip_s) if ceilings else None,
        lookup=of_trip("lookup", ceilings.lookup_round_trip_s) if ceilings else None,
    )


def _problems(counts: Counts, raw: RawMeasurements) -> list[str]:
    """Return the reasons for exit code 1 beside missed limits."""
    limits = raw.scenario.limits
    problems = list(raw.failures)
    if counts.bytes_wrong:
        problems.append(f"{counts.bytes_wrong} bytes were wrong")
    if counts.leases_leaked:
        problems.append(f"{counts.leases_leaked} leases left after their sessions")
    if counts.errors > limits.max_errors:
        problems.append(
            f"{counts.errors} errors, limits.max_errors is {limits.max_errors}"
        )
    if not (counts.requests or raw.interrupted or raw.failures):
        problems.append("no request was made")
    return problems


def _missed_limits(
    raw: RawMeasurements,
    rates: HitRates,
    load: LoadReport | None,
    documents: DocumentReuse | None,
) -> list[str]:
    """Return the limits that a complete run missed; hit rates count if none failed."""
    if raw.interrupted:
        return []
    reached = {"min_goodput": load.goodput.share if load and load.goodput else 0.0}
    if documents is not None:
        reached["min_documents_share"] = documents.share_of_ideal
    if not raw.failures:
        reached["min_hit_rate"] = rates.by_token
        reached["min_share_of_ideal"] = _ratio(rates.by_token, rates.ideal_by_token)
    limits = msgspec.structs.asdict(raw.scenario.limits)
    return [
        f"{name} is {limit}, reached {value:.3f}"
        for name, value in reached.items()
        if (limit := limits[name]) is not None and value < limit
    ]
