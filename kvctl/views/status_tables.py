"""A server's status as tables."""

from __future__ import annotations

from collections.abc import Sequence
from time import time

from kvcore.protocol import StatusReply
from kvcore.status import (
    InstanceStatus,
    L1Status,
    LeaseStatus,
    PrefetchStatus,
    QuotaStatus,
    TicketStatus,
    TierStatus,
)
from kvctl.console import Table, bar, plural, size
from kvctl.views import device_tables as devices


def build_tables(status: StatusReply) -> list[Table | str]:
    """Return what is shown of a server, most asked first."""
    shown: list[Table | str] = [_headline(status), *_memory(status.l1)]
    if status.quotas:
        shown.append(_quotas(status.quotas))
    if status.instances:
        shown.append(_instances(status.instances))
    if status.leases:
        shown.append(_leases(status.leases, status.num_leases))
    if status.tickets:
        shown.append(_tickets(status.tickets, status.num_tickets))
    if status.prefetches:
        shown.append(_prefetches(status.prefetches, status.num_prefetches))
    if status.tiers:
        shown.append(_tiers(status.tiers))
        if any(any(tier.counters.values()) for tier in status.tiers):
            shown.append(_tier_counters(status.tiers))
    shown += devices.build_tables(status.devices)
    shown.append(_counters(status.counters))
    return shown


def _headline(status: StatusReply) -> str:
    return (
        f"kvctl {status.version} at {status.address}, pid {status.pid}, "
        f"up {_duration(status.uptime_s)}: {plural(status.num_clients, 'client')}, "
        f"{plural(len(status.instances), 'instance')}, "
        f"{plural(status.num_sessions, 'session')}, "
        f"{plural(status.num_leases, 'lease')}, chunks of {status.chunk_size} tokens"
    )


def _memory(l1: L1Status) -> list[str]:
    share = l1.used_bytes / l1.total_bytes if l1.total_bytes else 0.0
    return [
        f"L1 {bar(share)} of {size(l1.total_bytes)} in pages of {size(l1.page_bytes)}",
        f"   {plural(l1.num_chunks, 'chunk')} in {plural(l1.num_parts, 'part')}, "
        f"{l1.num_leased} leased; {plural(l1.num_reserved, 'part')} being written",
    ]


def _quotas(quotas: Sequence[QuotaStatus]) -> Table:
    rows = tuple(
        (one.space, size(one.used_bytes), size(one.max_bytes), _share(one))
        for one in quotas
    )
    return Table("quotas", ("space", ">used", ">of", ">share"), rows)


def _share(quota: QuotaStatus) -> str:
    return f"{quota.used_bytes / quota.max_bytes:.0%}" if quota.max_bytes else "-"


def _instances(instances: Sequence[InstanceStatus]) -> Table:
    columns = ("instance", "engine", "model", ">rank", ">pid", ">cache", ">chunk", "by")
    rows = tuple(
        (
            one.instance_id,
            one.engine_id,
            one.model,
            f"{one.rank} of {one.world_size}",
            str(one.pid),
            size(one.registered_bytes),
            size(one.chunk_bytes),
            one.copied_by,
            "\n".join(one.groups),
        )
        for one in instances
    )
    return Table("registrations", (*columns, "layout"), rows)


def _leases(leases: Sequence[LeaseStatus], num_leases: int) -> Table:
    columns = ("engine", "request", "model", ">chunks", ">age", ">expires in")
    rows = tuple(
        (
            lease.engine_id,
            lease.request_id,
            lease.model,
            str(lease.num_chunks),
            _duration(lease.age_s),
            _duration(lease.expires_in_s),
            " ".join(map(str, lease.waiting_readers)),
            lease.why,
        )
        for lease in leases
    )
    cut = f" ({len(leases)} of {num_leases})" if num_leases > len(leases) else ""
    return Table(f"leases{cut}", (*columns, "ranks to read", "why"), rows)


def _tickets(tickets: Sequence[TicketStatus], num_tickets: int) -> Table:
    columns = ("instance", "request", "state", ">parts", ">bytes", ">age")
    rows = tuple(
        (
            one.instance_id,
            one.request_id,
            one.kind,
            str(one.num_parts),
            size(one.num_bytes),
            _duration(one.age_s),
        )
        for one in tickets
    )
    cut = f" ({len(tickets)} of {num_tickets})" if num_tickets > len(tickets) else ""
    return Table(f"copied by workers{cut}", columns, rows)


def _prefetches(jobs: Sequence[PrefetchStatus], num_jobs: int) -> Table:
    columns = ("engine", "request", "state", ">chunks", ">found", ">parts loaded")
    rows = tuple(
        (
            job.engine_id,
            job.request_id,
            job.state,
            str(job.num_chunks),
            str(job.num_found),
            str(job.num_loaded),
            size(job.num_bytes),
            _duration(job.age_s),
            _duration(job.due_in_s),
        )
        for job in jobs
    )
    cut = f" ({len(jobs)} of {num_jobs})" if num_jobs > len(jobs) else ""
    return Table(f"prefetches{cut}", (*columns, ">bytes", ">age", ">due in"), rows)


def _tiers(tiers: Sequence[TierStatus]) -> Table:
    columns = ("tier", "state", ">used", ">of", ">waiting", ">writing", "last error")
    rows = tuple(
        (
            f"{tier.name}\n{tier.url}",
            f"{'up' if tier.up else 'down'} for {_duration(time() - tier.since)}",
            "" if tier.used_bytes is None else size(tier.used_bytes),
            "" if tier.max_bytes is None else size(tier.max_bytes),
            size(tier.write_back.num_bytes),
            str(tier.write_back.num_writing),
            tier.last_error,
        )
        for tier in tiers
    )
    return Table("tiers", columns, rows)


def _tier_counters(tiers: Sequence[TierStatus]) -> Table:
    names = list(dict.fromkeys(name for tier in tiers for name in tier.counters))
    rows = tuple(
        (name, *(f"{tier.counters.get(name, 0):,}" for tier in tiers))
        for name in names
        if any(tier.counters.get(name) for tier in tiers)
    )
    columns = ("counter", *(f">{tier.name}" for tier in tiers))
    return Table("of the tiers", columns, rows)


def _counters(counters: dict[str, int]) -> Table:
    rows = tuple((name, f"{value:,}") for name, value in sorted(counters.items()))
    return Table("counters", ("counter", ">value"), rows)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
