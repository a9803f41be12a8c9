"""Simulated hosts: what each one's engines found that only another can have stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from kvctl.console import Table, size
from kvctl.lab.engine.engine_statistics import heads_of
from kvctl.lab.process_messages import EngineReport


class HostReport(msgspec.Struct, frozen=True):
    """One host's part. Chunks are whole ones of its engines' prompts."""

    requests: int
    chunks: int
    chunks_hit: int
    chunks_hit_alone: Annotated[
        int, Meta(description="the most that an endless cache of its own would have")
    ]
    retrieved_bytes: Annotated[int, Meta(description="every one of them was checked")]
    tier_bytes: Annotated[int, Meta(description="loaded from tiers into its L1")]

    @property
    def chunks_hit_from_others(self) -> int:
        """Return how many hits at least are of chunks that another host stored."""
        return max(0, self.chunks_hit - self.chunks_hit_alone)


def report_hosts(
    reports: Sequence[EngineReport], counters: Sequence[Mapping[str, int]]
) -> tuple[HostReport, ...]:
    """Put together what the engines of each host saw, and its server's counters."""
    return tuple(
        _report([one for one in reports if one.host == host], grown)
        for host, grown in enumerate(counters)
    )


def _report(reports: Sequence[EngineReport], grown: Mapping[str, int]) -> HostReport:
    seen = set[bytes]().union(*(heads_of(one.chunk_heads) for one in reports))
    warm = set[bytes]().union(*(heads_of(one.warm_heads) for one in reports))
    chunks = sum(one.tally.chunks for one in reports)
    return HostReport(
        requests=sum(one.tally.requests for one in reports),
        chunks=chunks,
        chunks_hit=sum(one.tally.chunks_hit for one in reports),
        chunks_hit_alone=chunks - len(seen - warm),
        retrieved_bytes=sum(one.tally.retrieve_bytes for one in reports),
        tier_bytes=grown.get("bytes_prefetched", 0),
    )


def parts(hosts: Sequence[HostReport]) -> Iterator[Table]:
    """Render them; nothing where there are none to tell apart."""
    if not hosts:
        return
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
        ">of others, at least", ">retrieved", ">from tiers",
    )  # fmt: skip
    yield Table("hosts", columns, rows)
