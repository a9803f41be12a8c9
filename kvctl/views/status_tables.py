"""The status of a server as tables."""

from __future__ import annotations

from collections.abc import Sequence
from time import time

from kvcore.protocol import StatusReply
from kvcore.status import (
    CopyRates,
    DeviceStatus,
    InstanceStatus,
    L1Status,
    LeaseStatus,
    PieceRate,
    PrefetchStatus,
    QuotaStatus,
    TicketStatus,
    TierStatus,
)
from kvctl.console import Table, bar, duration, plural, size


def build_tables(status: StatusReply) -> list[Table | str]:
    """Return tables and lines for `console.show`."""
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
    shown += build_device_tables(status.devices)
    shown.append(_counters(status.counters))
    return shown


def _headline(status: StatusReply) -> str:
    return (
        f"kvctl {status.version} at {status.address}, pid {status.pid}, "
        f"up {format_age(status.uptime_s)}: {plural(status.num_clients, 'client')}, "
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
        (
            one.space,
            size(one.used_bytes),
            size(one.max_bytes),
            f"{one.used_bytes / one.max_bytes:.0%}" if one.max_bytes else "-",
        )
        for one in quotas
    )
    return Table("quotas", ("space", ">used", ">limit", ">share"), rows)


def _instances(instances: Sequence[InstanceStatus]) -> Table:
    columns = (
        "instance",
        "engine",
        "model",
        ">rank",
        ">pid",
        ">cache",
        ">chunk",
        "copied by",
    )
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
            format_age(lease.age_s),
            format_age(lease.expires_in_s),
            " ".join(map(str, lease.waiting_readers)),
        )
        for lease in leases
    )
    cut = f" ({len(leases)} of {num_leases})" if num_leases > len(leases) else ""
    return Table(f"leases{cut}", (*columns, "ranks to read"), rows)


def _tickets(tickets: Sequence[TicketStatus], num_tickets: int) -> Table:
    columns = ("instance", "request", "state", ">parts", ">bytes", ">age")
    rows = tuple(
        (
            one.instance_id,
            one.request_id,
            one.kind,
            str(one.num_parts),
            size(one.num_bytes),
            format_age(one.age_s),
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
            format_age(job.age_s),
            format_age(job.due_in_s),
        )
        for job in jobs
    )
    cut = f" ({len(jobs)} of {num_jobs})" if num_jobs > len(jobs) else ""
    return Table(f"prefetches{cut}", (*columns, ">bytes", ">age", ">due in"), rows)


def _tiers(tiers: Sequence[TierStatus]) -> Table:
    columns = ("tier", "state", ">used", ">limit", ">waiting", ">writing", "last error")
    rows = tuple(
        (
            f"{tier.name}\n{tier.url}",
            f"{'up' if tier.up else 'down'} for {format_age(time() - tier.since)}",
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
    return Table("tier counters", columns, rows)


def _counters(counters: dict[str, int]) -> Table:
    rows = tuple((name, f"{value:,}") for name, value in sorted(counters.items()))
    return Table("counters", ("counter", ">value"), rows)


def format_age(seconds: float) -> str:
    """Return a long duration: `90.2 s`, `5 min`, `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# -- GPUs -------------------------------------------------------------------------


def build_device_tables(devices: Sequence[DeviceStatus]) -> list[Table | str]:
    """Return a table of GPUs and one of their measured copy rates; empty without."""
    return [_devices(devices), _device_rates(devices)] if devices else []


def _devices(devices: Sequence[DeviceStatus]) -> Table:
    columns = ("GPU", "name", ">caches", ">staging", "copies by method")
    rows = tuple(
        (
            one.uuid,
            one.name,
            str(one.num_caches),
            size(one.staging_bytes),
            "\n".join(f"{name}: {count:,}" for name, count in one.copies.items()),
        )
        for one in devices
    )
    return Table("GPUs", columns, rows)


def _device_rates(devices: Sequence[DeviceStatus]) -> Table:
    columns = ("GPU", "direction", ">link", ">one copy", ">staged", "batched", "packed")
    rows = tuple(
        _rate_row(one.name, direction, rates)
        for one in devices
        for direction, rates in (
            ("to host", one.rates.to_host),
            ("to device", one.rates.to_device),
        )
    )
    return Table("measured copy rates", columns, rows)


def _rate_row(name: str, direction: str, rates: CopyRates) -> tuple[str, ...]:
    return (
        name,
        direction,
        _speed(rates.link_bytes_s),
        duration(rates.start_s),
        duration(rates.staged_start_s) if rates.kernels else "no kernels",
        _by_size(rates.batched),
        _by_size(rates.kernels),
    )


def _by_size(rates: Sequence[PieceRate]) -> str:
    return "\n".join(f"{size(one.piece_bytes)}: {_speed(one.bytes_s)}" for one in rates)


def _speed(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.1f} GB/s"
