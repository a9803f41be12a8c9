"""Protocol: the declaration of every request and reply.

A request is a frozen Struct that names its reply type. Its wire name, fingerprint and
decoder (`kvcore.wire`), the client's types, `docs/protocol.md` and the round-trip tests
derive from it. Its handler is entered in `Engine.handlers` or in those of an optional
part.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Generic, NewType, TypeVar

import msgspec
from msgspec import Meta

from kvcore.config import Heartbeat
from kvcore.extents import PartLocation
from kvcore.keys import ExtraKey, SessionKey
from kvcore.layout import CacheGroup
from kvcore.rope import Rope
from kvcore.status import (
    DeviceStatus,
    InstanceStatus,
    L1Status,
    LeaseStatus,
    PrefetchStatus,
    QuotaStatus,
    TicketStatus,
    TierStatus,
)

PROTOCOL_VERSION = 1

BootToken = NewType("BootToken", int)
"""Identifies one run of a server: 63 random bits, or 0 for none."""

NO_BOOT = BootToken(0)
NULL_BLOCK = -1
"""Block id of a position without a block: out of a cache group's window."""


class Lane(Enum):
    """Where a request is served."""

    LOOP = "loop"
    """In the socket loop, in slices; never blocks."""
    STORE = "store"
    """On the instance's own thread for copies into L1."""
    RETRIEVE = "retrieve"
    """On the instance's own thread for copies out of L1."""


ReplyT = TypeVar("ReplyT")


class Request(msgspec.Struct, Generic[ReplyT], frozen=True):
    """Base of every request; `class Ping(Request[Pong])` declares one."""

    lane: ClassVar[Lane] = Lane.LOOP
    is_void_late: ClassVar[bool] = False
    """Rejected after the deadline; cleanup requests are always served."""
    ends_work: ClassVar[bool] = False
    """Accepted even at the client's limit of requests in progress."""


# -- memory handles ---------------------------------------------------------------


NumBytes = Annotated[int, Meta(ge=0, le=1 << 48)]
"""Sizes and offsets in memory: sums of thousands of them stay below 64 bits."""


class PosixShm(msgspec.Struct, frozen=True, tag="posix_shm"):
    """A range of a POSIX shared-memory object, /dev/shm/`name`."""

    name: str
    offset: int
    length: int


class CudaIpc(msgspec.Struct, frozen=True, tag="cuda_ipc"):
    """A range of one allocation in a GPU's memory, exported by CUDA IPC."""

    device: Annotated[str, Meta(description="UUID of the GPU, as GPU-...")]
    handle: Annotated[bytes, Meta(min_length=64, max_length=64)]
    offset: Annotated[NumBytes, Meta(description="from the allocation's start")]
    length: Annotated[int, Meta(ge=1, le=1 << 48)]


class Private(msgspec.Struct, frozen=True, tag="private"):
    """Memory that only its worker accesses; the server knows its size."""

    length: NumBytes


MemoryHandle = PosixShm | CudaIpc | Private
"""Kinds of memory that an instance may register."""


# -- requests and replies ---------------------------------------------------------


class Done(msgspec.Struct, frozen=True):
    """The request was done; there is nothing to return."""


Text = Annotated[str, Meta(max_length=1024)]
Count = Annotated[int, Meta(ge=0)]
EventHandle = Annotated[
    bytes,
    Meta(
        max_length=64,
        description="CUDA IPC event of the worker to wait for; empty: none",
    ),
]
Packed = memoryview
"""Packed bytes, decoded without a copy."""


class HelloReply(msgspec.Struct, frozen=True):
    """The server's identity and limits."""

    protocol_version: int
    boot: BootToken
    chunk_size: Annotated[int, Meta(ge=1, description="tokens per chunk")]
    hash_algorithm: str
    pid: int
    pid_start: Annotated[int, Meta(description="start time, clock ticks since boot")]
    pid_namespace: Annotated[int, Meta(description="inode of its pid namespace")]
    watched: Annotated[
        bool, Meta(description="the server watches the client's process by pidfd")
    ]
    heartbeat_s: Annotated[
        Heartbeat,
        Meta(description="longest interval between requests of an unwatched client"),
    ]
    max_message_bytes: int
    max_requests: Annotated[
        int, Meta(ge=1, description="a client's requests in progress; others wait")
    ] = 1024


class Hello(Request[HelloReply], frozen=True):
    """Open a connection. Only this and GOODBYE need no boot token.

    Repeating it from the same process changes nothing.
    """

    protocol_version: int
    pid: int
    pid_start: Annotated[int, Meta(description="start time, clock ticks since boot")]
    pid_namespace: Annotated[int, Meta(description="inode of its pid namespace")]
    label: Annotated[Text, Meta(description="shown by inspect")] = ""
    engine_key: Annotated[
        bytes,
        Meta(
            max_length=64,
            description="secret of an engine's processes, which share its sessions; "
            "empty: this client shares them with no other",
        ),
    ] = b""


class Goodbye(Request[Done], frozen=True):
    """Close a connection: end the client's registrations, sessions and leases."""


class Pong(msgspec.Struct, frozen=True):
    """The server's clock."""

    monotonic_ns: int


class Ping(Request[Pong], frozen=True):
    """Return the server's clock; also the heartbeat. NOOP in LMCache."""


class ChunkSize(msgspec.Struct, frozen=True):
    """Tokens per chunk."""

    chunk_size: int


class GetChunkSize(Request[ChunkSize], frozen=True):
    """Return the number of tokens per chunk."""


class ArenaHandle(msgspec.Struct, frozen=True):
    """The arena that holds all parts, for a worker that copies itself.

    Mapping it gives access to every chunk.
    """

    memory: PosixShm
    checksums: Annotated[bool, Meta(description="COMMIT carries the parts' checksums")]


class RegisterReply(msgspec.Struct, frozen=True):
    """The chunk layout that the server derived."""

    fingerprints: Annotated[
        tuple[str, ...], Meta(description="one per cache group, hexadecimal")
    ]
    chunk_bytes: Annotated[int, Meta(description="bytes per chunk of this rank")]
    arena: Annotated[
        ArenaHandle | None, Meta(description="arena to map, for a private instance")
    ] = None


class RegisterKVCache(Request[RegisterReply], frozen=True):
    """Register one worker's paged cache, until its process ends.

    Registering an instance again replaces it. Rejected if a live instance of the same
    engine key, model, world size and rank has another chunk layout. With private
    handles (all or none) the worker copies itself: RESERVE and HOLD replace STORE and
    RETRIEVE, and the server must be able to watch its process.
    """

    instance_id: Text
    engine_id: Text
    model: Annotated[Text, Meta(description="name with revision")]
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    rank: Count
    handles: Annotated[tuple[MemoryHandle, ...], Meta(max_length=4096)]
    groups: Annotated[tuple[CacheGroup, ...], Meta(max_length=256)]


class UnregisterKVCache(Request[Done], frozen=True):
    """Unregister an instance after its running copies."""

    instance_id: Text


class StoreReply(msgspec.Struct, frozen=True):
    """Counts of this rank's parts. Stored parts are readable when this arrives."""

    num_stored: int
    num_present: Annotated[int, Meta(description="already stored, or being written")]
    num_dropped: Annotated[int, Meta(description="no room, or a null block")]


class Store(Request[StoreReply], frozen=True):
    """Copy the whole chunks in [start, end) from an instance's blocks into L1.

    `start` is a multiple of the chunk size; a partial chunk at the end is skipped.
    Aborted if the deadline passes before the copy ends.
    """

    lane: ClassVar[Lane] = Lane.STORE
    is_void_late: ClassVar[bool] = True

    session: SessionKey
    instance_id: Text
    start: Count
    end: Count
    blocks: Annotated[
        tuple[Packed, ...],
        Meta(description="per cache group: int32 block ids from token `start` on"),
    ]
    tokens: Annotated[Packed, Meta(description="packed uint32 ids")] = memoryview(b"")
    token_offset: Annotated[Count, Meta(description="position of tokens[0]")] = 0
    extras: tuple[ExtraKey, ...] = ()
    event: EventHandle = b""


class RetrieveReply(msgspec.Struct, frozen=True):
    """The range is in the blocks."""

    num_tokens: Annotated[int, Meta(description="tokens written")]
    event: Annotated[
        bytes, Meta(description="CUDA IPC event of the server, recorded after the copy")
    ] = b""


class Retrieve(Request[RetrieveReply], frozen=True):
    """Copy the chunks in [start, end) from L1 into an instance's blocks: all or none.

    Ends this rank's share of the session's lease on them. The target blocks belong to
    the server until it replies or its process ends, even past the deadline.
    """

    lane: ClassVar[Lane] = Lane.RETRIEVE
    is_void_late: ClassVar[bool] = True

    session: SessionKey
    instance_id: Text
    start: Count
    end: Count
    blocks: Annotated[
        tuple[Packed, ...],
        Meta(description="per cache group: int32 block ids from token `start` on"),
    ]
    skip_first_n_tokens: Annotated[
        Count, Meta(description="tokens after `start` that stay unwritten")
    ] = 0
    tokens: Annotated[Packed, Meta(description="packed uint32 ids")] = memoryview(b"")
    token_offset: Annotated[Count, Meta(description="position of tokens[0]")] = 0
    extras: tuple[ExtraKey, ...] = ()
    event: EventHandle = b""


class LookupReply(msgspec.Struct, frozen=True):
    """Leading chunks that all ranks have, leased to the session's ranks."""

    num_chunks: int
    num_tokens: int
    num_from_tiers: Annotated[
        int, Meta(description="chunks that were loaded from tiers")
    ] = 0


class Lookup(Request[LookupReply], frozen=True):
    """Count the leading chunks of [0, end) that all ranks have, and lease them.

    Chunks that only a tier has are loaded first, until the prefetch deadline. Replaces
    the session's earlier lease. An error unless every rank of the model is registered.
    """

    is_void_late: ClassVar[bool] = True

    session: SessionKey
    model: Text
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    end: Annotated[Count, Meta(description="tokens; a partial chunk is ignored")]
    tokens: Annotated[Packed, Meta(description="packed uint32 ids")] = memoryview(b"")
    token_offset: Annotated[Count, Meta(description="position of tokens[0]")] = 0
    extras: tuple[ExtraKey, ...] = ()


class FreeLookupLocks(Request[Done], frozen=True):
    """End the session's lease on the chunks in [start, end), for all ranks."""

    session: SessionKey
    start: Count
    end: Count


class EndSession(Request[Done], frozen=True):
    """End a session: its leases now, its hashes after its running work."""

    session: SessionKey


class Cleared(msgspec.Struct, frozen=True):
    """Chunks removed and kept."""

    num_chunks: int
    num_kept: Annotated[int, Meta(description="leased or being written")]


class Clear(Request[Cleared], frozen=True):
    """Remove every chunk that is neither leased, read nor written."""


class StatusReply(msgspec.Struct, frozen=True):
    """Snapshot of the server's state."""

    version: str
    address: str
    pid: int
    boot: BootToken
    chunk_size: int
    uptime_s: float
    num_clients: int
    num_sessions: int
    l1: L1Status
    instances: tuple[InstanceStatus, ...]
    leases: tuple[LeaseStatus, ...]
    num_leases: Annotated[int, Meta(description="all; `leases` is limited")]
    counters: dict[str, int]
    tickets: tuple[TicketStatus, ...] = ()
    num_tickets: Annotated[int, Meta(description="all; the list is limited")] = 0
    prefetches: tuple[PrefetchStatus, ...] = ()
    num_prefetches: Annotated[
        int, Meta(description="in progress; the list is limited")
    ] = 0
    tiers: tuple[TierStatus, ...] = ()
    devices: tuple[DeviceStatus, ...] = ()
    quotas: tuple[QuotaStatus, ...] = ()


class Status(Request[StatusReply], frozen=True):
    """Return the server's state. Costs time in proportion to the lists."""

    max_leases: Count = 100


# -- copies that a worker makes itself ---------------------------------------------

Ticket = Annotated[int, Meta(description="reservation or hold; ends exactly once")]


class ReserveReply(msgspec.Struct, frozen=True):
    """Parts to write, until COMMIT, ABORT or the end of the worker's process.

    Their memory is not reused before that, even past the deadline.
    """

    ticket: Annotated[
        Ticket | None, Meta(description="null if there is nothing to write")
    ]
    arena: Annotated[str, Meta(description="name of the arena's segment")]
    parts: Annotated[
        tuple[tuple[PartLocation, ...], ...],
        Meta(description="one list per cache group: index among the chunks, extents"),
    ]
    num_present: int
    num_dropped: int


class Reserve(Request[ReserveReply], frozen=True):
    """Reserve the parts that a STORE of a private instance would write."""

    is_void_late: ClassVar[bool] = True

    store: Store


class Commit(Request[StoreReply], frozen=True):
    """Make written parts readable. Aborted after the deadline of its RESERVE."""

    ends_work: ClassVar[bool] = True

    ticket: Ticket
    checksums: Annotated[
        Packed, Meta(description="xxh3-128 of each part, in the order of `parts`")
    ] = memoryview(b"")


class Abort(Request[Done], frozen=True):
    """Release reserved parts, which the worker no longer writes."""

    ends_work: ClassVar[bool] = True

    ticket: Ticket


class HoldReply(msgspec.Struct, frozen=True):
    """Parts to read, held until RELEASE or the end of the worker's process."""

    ticket: Annotated[
        Ticket | None, Meta(description="null if there is nothing to read")
    ]
    arena: Annotated[str, Meta(description="name of the arena's segment")]
    parts: Annotated[
        tuple[tuple[PartLocation, ...], ...],
        Meta(description="as in ReserveReply; with checksums if they must be verified"),
    ]


class Hold(Request[HoldReply], frozen=True):
    """Hold the parts that a RETRIEVE of a private instance would read: all or none."""

    is_void_late: ClassVar[bool] = True

    retrieve: Retrieve


class Release(Request[RetrieveReply], frozen=True):
    """Release held parts. If they were read, end this rank's share of the lease."""

    ends_work: ClassVar[bool] = True

    ticket: Ticket
    num_bytes: Annotated[
        NumBytes | None, Meta(description="bytes copied to blocks; null: not read")
    ] = None
    wrong: Annotated[
        tuple[Count, ...], Meta(description="chunks whose checksums did not match")
    ] = ()


# -- blend: documents at any position ---------------------------------------------


class CBRegisterKVCache(Request[RegisterReply], frozen=True):
    """Register one worker's contiguous buffer `[K, L, T, D]`, until its process ends.

    K is 2 (K and V), or 1 with MLA, where every rank holds the same bytes. It shares
    chunks with the paged caches of its model.
    """

    instance_id: Text
    engine_id: Text
    model: Annotated[Text, Meta(description="name with revision")]
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    rank: Count
    handle: MemoryHandle
    shape: Annotated[
        tuple[int, ...],
        Meta(description="[K, L, T, D]: T tokens, D elements of all heads per token"),
    ]
    dtype: Annotated[str, Meta(max_length=16)]
    rope: Annotated[
        Rope | None,
        Meta(description="rotary embedding, for retrieves that rotate keys"),
    ] = None


class CBUnregisterKVCache(Request[Done], frozen=True):
    """Unregister a buffer after its running copies."""

    instance_id: Text


class CBStorePreComputed(Request[StoreReply], frozen=True):
    """Store a document's whole chunks, to be found at any position of a prompt.

    Its tokens lie in the buffer from `offset` on; its keys were computed at positions
    from 0 on. A partial chunk at its end is skipped.
    """

    lane: ClassVar[Lane] = Lane.STORE
    is_void_late: ClassVar[bool] = True

    instance_id: Text
    offset: Annotated[Count, Meta(description="slot of the document's first token")]
    tokens: Annotated[Packed, Meta(description="packed uint32 ids of all tokens")]
    extras: Annotated[
        tuple[ExtraKey, ...],
        Meta(description="at token 0: for all of it; a later one ends the document"),
    ] = ()
    event: EventHandle = b""


class CBRange(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, end) of a prompt that are consecutive chunks of one document."""

    start: Count
    end: Count


class CBMatch(msgspec.Struct, frozen=True, array_like=True):
    """A document's chunk found in a prompt."""

    old_start: Annotated[Count, Meta(description="position in its document")]
    start: Annotated[Count, Meta(description="position in the prompt")]
    hash: Annotated[bytes, Meta(description="chunk hash, chained within its document")]


class CBLookupReply(msgspec.Struct, frozen=True):
    """Chunks of documents that all ranks have, leased to the session's ranks.

    In the prompt's order, without overlap.
    """

    ranges: tuple[CBRange, ...]
    matches: Annotated[tuple[CBMatch, ...], Meta(description="chunks of the ranges")]
    num_tokens: int


class CBLookupPreComputed(Request[CBLookupReply], frozen=True):
    """Find stored documents at any position of a prompt, and lease them.

    Replaces the session's earlier lease on documents. An error unless every rank of the
    model is registered.
    """

    is_void_late: ClassVar[bool] = True

    session: SessionKey
    model: Text
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    tokens: Annotated[Packed, Meta(description="packed uint32 ids of all tokens")]
    extras: Annotated[
        tuple[ExtraKey, ...],
        Meta(description="at token 0: as the documents'; a later one ends the search"),
    ] = ()


class CBRetrievePreComputed(Request[RetrieveReply], frozen=True):
    """Copy documents' chunks from L1 to their slots of a prompt: all or none.

    Names matches or ranges of the session's last lookup; only these can be retrieved.
    Ends this rank's share of the session's lease on them. The target slots belong to
    the server until it replies or its process ends, even past the deadline.
    """

    lane: ClassVar[Lane] = Lane.RETRIEVE
    is_void_late: ClassVar[bool] = True

    session: SessionKey
    instance_id: Text
    offset: Annotated[Count, Meta(description="slot of the prompt's first token")]
    ranges: tuple[CBRange, ...] = ()
    matches: tuple[CBMatch, ...] = ()
    rotate_keys: Annotated[
        bool, Meta(description="rotate K from its old positions to those in the prompt")
    ] = False
    tokens: Annotated[
        Packed,
        Meta(description="the whole prompt, for a new lookup if none is known"),
    ] = memoryview(b"")
    extras: Annotated[
        tuple[ExtraKey, ...], Meta(description="the prompt's extra keys")
    ] = ()
    event: EventHandle = b""


class CBStoreFinal(Request[StoreReply], frozen=True):
    """Store the whole chunks of [start, end) of a prompt from a buffer; see STORE."""

    lane: ClassVar[Lane] = Lane.STORE
    is_void_late: ClassVar[bool] = True

    session: SessionKey
    instance_id: Text
    offset: Annotated[Count, Meta(description="slot of the prompt's first token")]
    start: Count
    end: Count
    tokens: Annotated[Packed, Meta(description="packed uint32 ids")] = memoryview(b"")
    token_offset: Annotated[Count, Meta(description="position of tokens[0]")] = 0
    extras: tuple[ExtraKey, ...] = ()
    event: EventHandle = b""


class Finding(msgspec.Struct, frozen=True):
    """One known fact about a miss."""

    code: Annotated[
        str, Meta(description="never_stored, evicted, not_all_ranks, expired, ...")
    ]
    message: str


class WhyReply(msgspec.Struct, frozen=True):
    """Known facts, the most specific first. The server's memory of them is bounded."""

    findings: tuple[Finding, ...]


class Why(Request[WhyReply], frozen=True):
    """Explain why a lookup missed, or what happened to a chunk."""

    about: Annotated[
        Text,
        Meta(description="request id, ENGINE/REQUEST, or digits of a chunk hash"),
    ]
