"""Values that STATUS lists, for the server and its components.

Each component in storage, server or engine fills in its own.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvcore.layout import CacheGroup


class InstanceStatus(msgspec.Struct, frozen=True):
    """One registered cache."""

    instance_id: str
    engine_id: str
    model: str
    world_size: int
    rank: int
    pid: int
    groups: tuple[str, ...]
    group_fingerprints: tuple[str, ...]
    group_descriptions: tuple[CacheGroup, ...]
    registered_bytes: int
    chunk_bytes: int
    copied_by: Annotated[str, Meta(description="server or worker")] = "server"


class LeaseStatus(msgspec.Struct, frozen=True):
    """One lease."""

    engine_id: str
    request_id: str
    model: str
    num_chunks: int
    waiting_readers: tuple[int, ...]
    age_s: float
    expires_in_s: float


class TicketStatus(msgspec.Struct, frozen=True):
    """One reservation or hold of a worker that has not ended."""

    instance_id: str
    request_id: str
    kind: Annotated[str, Meta(description="reserved or held")]
    num_parts: int
    num_bytes: int
    age_s: float


class L1Status(msgspec.Struct, frozen=True):
    """Use of the arena."""

    total_bytes: int
    used_bytes: int
    page_bytes: int
    num_chunks: int
    num_parts: int
    num_leased: Annotated[int, Meta(description="chunks under a lease or a copy")]
    num_reserved: Annotated[int, Meta(description="parts being written")]


class PrefetchStatus(msgspec.Struct, frozen=True):
    """One lookup's loads from the tiers."""

    engine_id: str
    request_id: str
    state: str
    num_chunks: Annotated[
        int, Meta(description="from the first one missing in memory on")
    ]
    num_found: Annotated[int, Meta(description="leading chunks found")]
    num_loaded: Annotated[int, Meta(description="parts")]
    num_bytes: int
    age_s: float
    due_in_s: float


class WriteBackStatus(msgspec.Struct, frozen=True):
    """Parts queued for writing to one tier."""

    tier: str
    num_parts: int
    num_bytes: int
    num_writing: Annotated[int, Meta(description="parts being written")]


class TierStatus(msgspec.Struct, frozen=True):
    """One storage tier below memory."""

    name: str
    url: Annotated[str, Meta(description="without its secrets")]
    up: bool
    since: Annotated[float, Meta(description="Unix seconds")]
    last_error: str
    used_bytes: int | None
    max_bytes: int | None
    counters: dict[str, int]
    write_back: WriteBackStatus


class PieceRate(msgspec.Struct, frozen=True, array_like=True):
    """Measured copy rate of scattered pieces of one size."""

    piece_bytes: int
    bytes_s: float


class CopyRates(msgspec.Struct, frozen=True):
    """Measured copies between one GPU and page-locked memory, in one direction."""

    link_bytes_s: Annotated[float, Meta(description="one large copy")]
    start_s: Annotated[
        float, Meta(description="one small copy, until its completion is seen")
    ]
    call_s: Annotated[float, Meta(description="each of many small copies")]
    staged_start_s: Annotated[float, Meta(description="one small copy by kernels")]
    batched: Annotated[
        tuple[PieceRate, ...], Meta(description="submitted as one batch")
    ]
    kernels: Annotated[
        tuple[PieceRate, ...], Meta(description="packed or unpacked on the device")
    ]


class DeviceRates(msgspec.Struct, frozen=True):
    """Measurements of one GPU before its first copy; they select the copy method."""

    to_host: CopyRates
    to_device: CopyRates
    measured_s: Annotated[float, Meta(description="duration of the measurement")]


class DeviceStatus(msgspec.Struct, frozen=True):
    """One GPU whose caches the server copies."""

    uuid: str
    name: str
    num_caches: int
    staging_bytes: Annotated[int, Meta(description="device memory in use for copies")]
    copies: Annotated[
        dict[str, int], Meta(description="calls, by method and direction")
    ]
    rates: DeviceRates


class QuotaStatus(msgspec.Struct, frozen=True):
    """Use of one quota: bytes protected when other spaces need memory."""

    space: Annotated[str, Meta(description="`salt:NAME` or `model:NAME`")]
    used_bytes: int
    max_bytes: int
