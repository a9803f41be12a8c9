"""From what the processes of a run measured to its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from kvcore import __version__
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.config.scenario import Limits, SystemSpec
from kvctl.lab.config.workload_config import Documents
from kvctl.lab.engine.engine_statistics import heads_of, unpack
from kvctl.lab.latency import Latency, LatencySamples
from kvctl.lab.process_messages import Tally
from kvctl.lab.rank.isolated_calls import summarise_isolated
from kvctl.lab.results.load_report import LoadReport, report_load
from kvctl.lab.results.result import (
    RESULT_VERSION,
    Counts,
    DocumentReuse,
    HitRates,
    Result,
    Shares,
    System,
    Throughput,
    TierHits,
)
from kvctl.lab.results.simulated_hosts import report_hosts
from kvctl.lab.results.time_series import series
from kvctl.lab.run.environment import detect
from kvctl.lab.run.raw_measurements import RawMeasurements
from kvctl.lab.workload.document_requests import count_contents

MAX_ERRORS_TOLD = 10


def summarise(evidence: RawMeasurements) -> Result:
    """Make the result."""
    tally = evidence.tally()
    samples = LatencySamples.merge(report.samples for report in evidence.reports)
    operations = samples.summary() | LatencySamples.merge(evidence.storms).summary()
    load = report_load(
        evidence.scenario,
        unpack(report.journal for report in evidence.reports),
        evidence.begun_s,
        evidence.struck,
    )
    if evidence.pings:
        operations["ping"] = evidence.pings
    counts = _counts(evidence, tally)
    rates = _hit_rates(counts)
    elapsed_s = _elapsed_s(evidence, operations)
    throughput = _throughput(tally, elapsed_s)
    told = [message for report in evidence.reports for message in report.errors]
    documents = _documents(evidence, tally)
    problems = _problems(counts, rates, evidence) + missed_goodput(evidence, load)
    problems += _missed_documents(evidence, documents)
    return Result(
        version=RESULT_VERSION,
        name=evidence.name,
        scenario=evidence.scenario,
        seed=evidence.seed,
        started=evidence.started.isoformat(timespec="milliseconds"),
        elapsed_s=elapsed_s,
        interrupted=evidence.interrupted,
        environment=detect(),
        counts=counts,
        hit_rates=rates,
        operations=operations,
        throughput=throughput,
        ceilings=evidence.ceilings,
        shares=_shares(throughput, operations, evidence.ceilings),
        alone=summarise_isolated(
            evidence.alone, evidence.lookup_alone, evidence.ceilings
        ),
        copies=tuple(evidence.copies),
        devices=evidence.devices,
        load=load,
        documents=documents,
        errors=tuple((evidence.failures + told)[:MAX_ERRORS_TOLD]),
        problems=tuple(problems),
        series=series(samples, evidence.begun_s),
        counters=_sum(evidence.counters),
        tiers=_tiers(evidence, counts),
        server_bytes=evidence.server_bytes,
        hosts=report_hosts(evidence.reports, evidence.counters)
        if evidence.scenario.hosts > 1
        else (),
        system=_system(evidence.spec),
        turns=samples.medians() if evidence.turns else {},
    )


def _sum(counters: Sequence[Counter[str]]) -> dict[str, int]:
    names = dict.fromkeys(name for one in counters for name in one)
    return {name: sum(one[name] for one in counters) for name in names}


def _system(spec: SystemSpec) -> System:
    return System(spec.name, __version__ if spec.is_ours else spec.version)


def _counts(evidence: RawMeasurements, tally: Tally) -> Counts:
    """Count; with an endless cache a chunk misses once, whoever asks first."""
    heads = [heads_of(report.chunk_heads) for report in evidence.reports]
    warm = set[bytes]().union(*(heads_of(r.warm_heads) for r in evidence.reports))
    chunks_hit_ideal = tally.chunks - len(set[bytes]().union(*heads) - warm)
    chunk_size = evidence.scenario.server.chunk_size
    return Counts(
        requests=tally.requests,
        errors=tally.errors + len(evidence.failures),
        bytes_wrong=tally.bytes_wrong
        + evidence.copies_wrong
        + sum(a.bytes_wrong for a in evidence.alone),
        leases_leaked=evidence.leases_leaked,
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


def _tiers(evidence: RawMeasurements, counts: Counts) -> tuple[TierHits, ...]:
    """Split the hits between memory and the tiers; nothing where there are none."""
    if not evidence.tier_bytes:
        return ()
    loaded = sum(tier.num_bytes for tier in evidence.tier_bytes)
    beneath = _ratio(counts.tokens_from_tiers, counts.tokens)
    found = [
        TierHits(
            f"tier {place}: {tier.kind}",
            beneath * _ratio(tier.num_bytes, loaded),
            tier.num_bytes,
        )
        for place, tier in enumerate(evidence.tier_bytes, 1)
    ]
    return (TierHits("L1", _hit_rates(counts).by_token - beneath), *found)


def _documents(evidence: RawMeasurements, tally: Tally) -> DocumentReuse | None:
    """Count the reuse of documents, where the workload is made of them."""
    workload = evidence.scenario.workload
    if not isinstance(workload, Documents):
        return None
    heads = set[bytes]().union(*(heads_of(r.document_heads) for r in evidence.reports))
    contents = count_contents(workload, evidence.seed)
    return DocumentReuse(
        tokens_hit=tally.document_tokens_hit,
        chunks=tally.document_chunks,
        chunks_hit=tally.document_chunks_hit,
        chunks_hit_ideal=tally.document_chunks - len(heads),
        contents=contents.num_asked,
        contents_prefix=contents.num_prefix,
        contents_anywhere=contents.num_anywhere,
    )


def _missed_documents(
    evidence: RawMeasurements, documents: DocumentReuse | None
) -> Sequence[str]:
    wanted = evidence.scenario.limits.min_documents_share
    if wanted is None or documents is None or evidence.interrupted:
        return ()
    if documents.share_of_ideal >= wanted:
        return ()
    reached = f"{documents.share_of_ideal:.3f}"
    return (f"min_documents_share is {wanted}, reached {reached}",)


def _hit_rates(counts: Counts) -> HitRates:
    return HitRates(
        by_block=_ratio(counts.chunks_hit, counts.chunks),
        by_token=_ratio(counts.tokens_hit, counts.tokens),
        ideal_by_block=_ratio(counts.chunks_hit_ideal, counts.chunks),
        ideal_by_token=_ratio(counts.tokens_hit_ideal, counts.tokens),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _elapsed_s(evidence: RawMeasurements, operations: Mapping[str, Latency]) -> float:
    """Return the time of the load; of a run that took turns, that of its requests."""
    request = operations.get("request")
    if evidence.turns and request:
        return request.mean_s * request.count
    return evidence.elapsed_s


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


def _problems(counts: Counts, rates: HitRates, evidence: RawMeasurements) -> list[str]:
    """Say what makes the exit code 1. A run that was cut has no hit rate to reach."""
    limits = evidence.scenario.limits
    problems = list(evidence.failures)
    if counts.bytes_wrong:
        problems.append(f"{counts.bytes_wrong} bytes were wrong")
    if counts.leases_leaked:
        problems.append(f"{counts.leases_leaked} leases outlived their sessions")
    if counts.errors > limits.max_errors:
        problems.append(
            f"{counts.errors} errors, limits.max_errors is {limits.max_errors}"
        )
    if not (evidence.interrupted or evidence.failures):
        problems += _missed(limits, rates)
        if not counts.requests:
            problems.append("no request was played")
    return problems


def _missed(limits: Limits, rates: HitRates) -> Sequence[str]:
    share = _ratio(rates.by_token, rates.ideal_by_token)
    reached = {"min_hit_rate": rates.by_token, "min_share_of_ideal": share}
    return [
        f"{name} is {limit}, reached {reached[name]:.3f}"
        for name, limit in (
            ("min_hit_rate", limits.min_hit_rate),
            ("min_share_of_ideal", limits.min_share_of_ideal),
        )
        if limit is not None and reached[name] < limit
    ]


def missed_goodput(evidence: RawMeasurements, load: LoadReport | None) -> list[str]:
    """Say when fewer requests than wanted met the limits of time."""
    wanted = evidence.scenario.limits.min_goodput
    if wanted is None or evidence.interrupted:
        return []
    reached = load.goodput.share if load and load.goodput else 0.0
    return (
        [f"min_goodput is {wanted}, reached {reached:.3f}"] if reached < wanted else []
    )
