"""The protocol: every request declared once, everything else derived from it.

A request is a frozen Struct that names its reply type and its lane. Its wire name,
its fingerprint, the decoder, the client's types, the server's dispatch,
`docs/protocol.md` and the round-trip tests come from that declaration
(`kvcore.wire`); adding one changes nothing for the others.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Generic, NewType, TypeVar

import msgspec
from msgspec import Meta

from kvcore.config import MAX_HEARTBEAT_S, MIN_HEARTBEAT_S
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
"""Names one run of a server; 63 random bits. 0 where no run is meant."""

NO_BOOT = BootToken(0)
NULL_BLOCK = -1
"""A block id for 'no block here': an out-of-window position of a cache group."""


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
    """Refused once its deadline has passed; what cleans up is done however late."""
    ends_work: ClassVar[bool] = False
    """Taken however many requests of its client are under way."""


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
    """Memory that its own worker copies; the server knows its size and no more."""

    length: NumBytes


MemoryHandle = PosixShm | CudaIpc | Private
"""Union of the kinds of memory that an instance may register."""


# -- requests and replies ---------------------------------------------------------


class Done(msgspec.Struct, frozen=True):
    """It was done; there is nothing to say."""


Text = Annotated[str, Meta(max_length=1024)]
Count = Annotated[int, Meta(ge=0)]
EventHandle = Annotated[
    bytes,
    Meta(
        max_length=64,
        description="the worker's CUDA IPC event that is waited for; empty: none",
    ),
]
Packed = memoryview
"""Packed bytes, decoded in place without a copy."""


class HelloReply(msgspec.Struct, frozen=True):
    """Who the server is and what it accepts."""

    protocol_version: int
    boot: BootToken
    chunk_size: Annotated[int, Meta(ge=1, description="tokens a chunk")]
    hash_algorithm: str
    pid: int
    pid_start: Annotated[int, Meta(description="start time, clock ticks since boot")]
    pid_namespace: Annotated[int, Meta(description="inode of its pid namespace")]
    watched: Annotated[
        bool, Meta(description="the server watches the client's process by pidfd")
    ]
    heartbeat_s: Annotated[
        float,
        Meta(
            ge=MIN_HEARTBEAT_S,
            le=MAX_HEARTBEAT_S,
            description="send at least this often when not watched",
        ),
    ]
    max_message_bytes: int


class Hello(Request[HelloReply], frozen=True):
    """Open a connection. Only this and GOODBYE need no boot token.

    Saying it again from the same process changes nothing.
    """

    protocol_version: int
    pid: int
    pid_start: Annotated[int, Meta(description="start time, clock ticks since boot")]
    pid_namespace: Annotated[int, Meta(description="inode of its pid namespace")]
    label: Annotated[Text, Meta(description="shown by inspect")] = ""


class Goodbye(Request[Done], frozen=True):
    """Close a connection: what the client registered and leased ends now."""


class Pong(msgspec.Struct, frozen=True):
    """The server's clock."""

    monotonic_ns: int


class Ping(Request[Pong], frozen=True):
    """Ask whether the server serves; also the heartbeat. Also known as NOOP."""


class ChunkSize(msgspec.Struct, frozen=True):
    """Tokens a chunk."""

    chunk_size: int


class GetChunkSize(Request[ChunkSize], frozen=True):
    """Ask for the unit of storing, in tokens."""


class ArenaHandle(msgspec.Struct, frozen=True):
    """The memory that all parts lie in, to be mapped by who copies itself.

    Who maps it can read and write every chunk.
    """

    memory: PosixShm
    checksums: Annotated[bool, Meta(description="COMMIT carries the parts' checksums")]


class RegisterReply(msgspec.Struct, frozen=True):
    """The chunk layout that the server derived."""

    fingerprints: Annotated[
        tuple[str, ...], Meta(description="one a cache group, hexadecimal")
    ]
    chunk_bytes: Annotated[int, Meta(description="bytes a chunk of this rank")]
    arena: Annotated[
        ArenaHandle | None, Meta(description="for a private instance: where parts lie")
    ] = None


class RegisterKVCache(Request[RegisterReply], frozen=True):
    """Register one worker's paged cache. It lives as long as its process.

    Registering the same instance again replaces it. Refused when another live
    instance of the same model, world size and rank lays out its chunks otherwise.
    With private handles (all of them or none) its worker copies itself: RESERVE and
    HOLD in place of STORE and RETRIEVE. For that the server watches its process.
    """

    instance_id: Text
    engine_id: Text
    model: Annotated[Text, Meta(description="name with revision")]
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    rank: Count
    handles: Annotated[tuple[MemoryHandle, ...], Meta(max_length=4096)]
    groups: Annotated[tuple[CacheGroup, ...], Meta(max_length=256)]


class UnregisterKVCache(Request[Done], frozen=True):
    """Forget an instance, once its running copies have ended."""

    instance_id: Text


class StoreReply(msgspec.Struct, frozen=True):
    """What became of the chunks, per part of this rank. Readable when this arrives."""

    num_stored: int
    num_present: Annotated[int, Meta(description="there already, or being written")]
    num_dropped: Annotated[int, Meta(description="no room, or a null block in it")]


class Store(Request[StoreReply], frozen=True):
    """Copy an instance's blocks of the whole chunks in [start, end) into L1.

    `start` is a multiple of the chunk size; a partial chunk at the end is left out.
    Aborted when the deadline has passed by the time the copy ends.
    """

    lane: ClassVar[Lane] = Lane.STORE
    is_void_late: ClassVar[bool] = True

    session: SessionKey
    instance_id: Text
    start: Count
    end: Count
    blocks: Annotated[
        tuple[Packed, ...],
        Meta(description="one a cache group: int32 block ids from token `start` on"),
    ]
    tokens: Annotated[Packed, Meta(description="packed uint32 ids")] = memoryview(b"")
    token_offset: Annotated[Count, Meta(description="place of tokens[0]")] = 0
    extras: tuple[ExtraKey, ...] = ()
    event: EventHandle = b""


class RetrieveReply(msgspec.Struct, frozen=True):
    """The blocks hold the chunks' bytes."""

    num_tokens: Annotated[int, Meta(description="tokens written")]
    event: Annotated[
        bytes, Meta(description="CUDA IPC event of ours, recorded behind the copy")
    ] = b""


class Retrieve(Request[RetrieveReply], frozen=True):
    """Copy the chunks in [start, end) from L1 into an instance's blocks, or none.

    Takes this rank off the session's lease on them. The target blocks belong to the
    server until it answers or its process is gone, whatever the deadline says.
    """

    lane: ClassVar[Lane] = Lane.RETRIEVE
    is_void_late: ClassVar[bool] = True

    session: SessionKey
    instance_id: Text
    start: Count
    end: Count
    blocks: Annotated[
        tuple[Packed, ...],
        Meta(description="one a cache group: int32 block ids from token `start` on"),
    ]
    skip_first_n_tokens: Annotated[
        Count, Meta(description="leave the first tokens after `start` unwritten")
    ] = 0
    tokens: Annotated[Packed, Meta(description="packed uint32 ids")] = memoryview(b"")
    token_offset: Annotated[Count, Meta(description="place of tokens[0]")] = 0
    extras: tuple[ExtraKey, ...] = ()
    event: EventHandle = b""


class LookupReply(msgspec.Struct, frozen=True):
    """How much is there for all ranks. It is leased to the session's readers."""

    num_chunks: int
    num_tokens: int
    num_from_tiers: Annotated[
        int, Meta(description="of the chunks, those that memory lacked at first")
    ] = 0


class Lookup(Request[LookupReply], frozen=True):
    """Count the leading chunks of [0, end) that are present, and lease them.

    What memory lacks and a tier has is loaded first: the reply counts what is there
    when that is done, or when its time is up. Replaces the session's earlier lease.
    An error when no instance of the model has registered with this world size, or not
    every rank.
    """

    is_void_late: ClassVar[bool] = True

    session: SessionKey
    model: Text
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    end: Annotated[Count, Meta(description="tokens; a partial chunk is not looked up")]
    tokens: Annotated[Packed, Meta(description="packed uint32 ids")] = memoryview(b"")
    token_offset: Annotated[Count, Meta(description="place of tokens[0]")] = 0
    extras: tuple[ExtraKey, ...] = ()
    wait: Annotated[
        bool, Meta(description="false: answer at once; what tiers have comes behind")
    ] = True


class FreeLookupLocks(Request[Done], frozen=True):
    """End the session's lease on the chunks in [start, end), for all readers."""

    session: SessionKey
    start: Count
    end: Count


class EndSession(Request[Done], frozen=True):
    """End a session: its leases now, its hashes when its running work has ended."""

    session: SessionKey


class Cleared(msgspec.Struct, frozen=True):
    """What a clear removed and what it had to leave."""

    num_chunks: int
    num_kept: Annotated[int, Meta(description="leased or being written")]


class Clear(Request[Cleared], frozen=True):
    """Drop every chunk that nobody reads or writes."""


class StatusReply(msgspec.Struct, frozen=True):
    """The inside of the server at one moment."""

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
    num_leases: Annotated[int, Meta(description="all of them; `leases` is cut")]
    counters: dict[str, int]
    tickets: tuple[TicketStatus, ...] = ()
    num_tickets: Annotated[int, Meta(description="all of them; the list is cut")] = 0
    prefetches: tuple[PrefetchStatus, ...] = ()
    num_prefetches: Annotated[int, Meta(description="under way; the list is cut")] = 0
    tiers: tuple[TierStatus, ...] = ()
    devices: tuple[DeviceStatus, ...] = ()
    quotas: tuple[QuotaStatus, ...] = ()


class Status(Request[StatusReply], frozen=True):
    """Look inside. Costs the server time in proportion to what it lists."""

    max_leases: Count = 100


# -- copies that a worker makes itself ---------------------------------------------

Ticket = Annotated[int, Meta(description="what is to be copied; ends exactly once")]


class ReserveReply(msgspec.Struct, frozen=True):
    """Parts to write: COMMIT or ABORT ends them, and the end of the worker's process.

    Nobody else is given their memory before that, whatever the deadline says.
    """

    ticket: Annotated[
        Ticket | None, Meta(description="null where there is nothing to write")
    ]
    arena: Annotated[str, Meta(description="name of the memory that they lie in")]
    parts: Annotated[
        tuple[tuple[PartLocation, ...], ...],
        Meta(description="one list a cache group: index among the chunks, extents"),
    ]
    num_present: int
    num_dropped: int


class Reserve(Request[ReserveReply], frozen=True):
    """Make room for what a STORE of a private instance would copy."""

    is_void_late: ClassVar[bool] = True

    store: Store


class Commit(Request[StoreReply], frozen=True):
    """Make written parts readable.

    Aborted when the deadline of its RESERVE has passed.
    """

    ends_work: ClassVar[bool] = True

    ticket: Ticket
    checksums: Annotated[
        Packed, Meta(description="xxh3-128 of each part, in the order of the places")
    ] = memoryview(b"")


class Abort(Request[Done], frozen=True):
    """Give back parts that were reserved; they are not written from here on."""

    ends_work: ClassVar[bool] = True

    ticket: Ticket


class HoldReply(msgspec.Struct, frozen=True):
    """Parts to read: they stay until RELEASE, or the end of the worker's process."""

    ticket: Annotated[
        Ticket | None, Meta(description="null where there is nothing to read")
    ]
    arena: Annotated[str, Meta(description="name of the memory that they lie in")]
    parts: Annotated[
        tuple[tuple[PartLocation, ...], ...],
        Meta(description="likewise; with checksums where they are to be verified"),
    ]


class Hold(Request[HoldReply], frozen=True):
    """Hold what a RETRIEVE of a private instance would copy, all of it or nothing."""

    is_void_late: ClassVar[bool] = True

    retrieve: Retrieve


class Release(Request[RetrieveReply], frozen=True):
    """Let go of parts. When they were read, this rank is taken off the lease."""

    ends_work: ClassVar[bool] = True

    ticket: Ticket
    num_bytes: Annotated[
        NumBytes | None, Meta(description="copied to blocks; null: it was not read")
    ] = None
    wrong: Annotated[
        tuple[Count, ...], Meta(description="chunks whose bytes were found wrong")
    ] = ()


# -- blend: documents at any position ---------------------------------------------


class CBRegisterKVCache(Request[RegisterReply], frozen=True):
    """Register one worker's buffer `[K, L, T, D]`, contiguous and token-addressed.

    K is 2 (K and V), or 1 with MLA, when every rank holds the same bytes. It lives as
    long as its process, like a paged cache, and shares chunks with such of its model.
    """

    instance_id: Text
    engine_id: Text
    model: Annotated[Text, Meta(description="name with revision")]
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    rank: Count
    handle: MemoryHandle
    shape: Annotated[
        tuple[int, ...],
        Meta(description="[K, L, T, D]: T tokens, D elements of all heads of a token"),
    ]
    dtype: Annotated[str, Meta(max_length=16)]
    rope: Annotated[
        Rope | None, Meta(description="how keys turn, for retrieves that turn them")
    ] = None


class CBUnregisterKVCache(Request[Done], frozen=True):
    """Forget a buffer, once its running copies have ended."""

    instance_id: Text


class CBStorePreComputed(Request[StoreReply], frozen=True):
    """Store a document's whole chunks in the document space.

    Its tokens lie in the buffer from `offset` on, its keys computed at positions from
    0 on. A partial chunk at its end is left out.
    """

    lane: ClassVar[Lane] = Lane.STORE
    is_void_late: ClassVar[bool] = True

    instance_id: Text
    offset: Annotated[Count, Meta(description="slot of the document's first token")]
    tokens: Annotated[Packed, Meta(description="packed uint32 ids, all of them")]
    extras: Annotated[
        tuple[ExtraKey, ...],
        Meta(description="at token 0: of the whole; a later one ends the document"),
    ] = ()
    event: EventHandle = b""


class CBRange(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, end) of a prompt: whole chunks of one document, in its order."""

    start: Count
    end: Count


class CBMatch(msgspec.Struct, frozen=True, array_like=True):
    """One chunk of a document, found in a prompt."""

    old_start: Annotated[Count, Meta(description="position in its document")]
    start: Annotated[Count, Meta(description="position in the prompt")]
    hash: Annotated[bytes, Meta(description="of the chunk, chained from its document")]


class CBLookupReply(msgspec.Struct, frozen=True):
    """What is there for all ranks, in the prompt's order; nothing overlaps.

    It is leased to the session's readers.
    """

    ranges: tuple[CBRange, ...]
    matches: Annotated[
        tuple[CBMatch, ...], Meta(description="the chunks that the ranges consist of")
    ]
    num_tokens: int


class CBLookupPreComputed(Request[CBLookupReply], frozen=True):
    """Find stored documents in a prompt, wherever they stand, and lease them.

    Replaces the session's earlier lease on documents. An error when no instance of
    the model has registered with this world size, or not every rank.
    """

    is_void_late: ClassVar[bool] = True

    session: SessionKey
    model: Text
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    tokens: Annotated[Packed, Meta(description="packed uint32 ids, all of them")]
    extras: Annotated[
        tuple[ExtraKey, ...],
        Meta(description="at token 0: as the documents'; a later one ends the search"),
    ] = ()


class CBRetrievePreComputed(Request[RetrieveReply], frozen=True):
    """Copy documents' chunks from L1 to their places in a prompt's buffer, or none.

    Names either matches, or ranges of the session's last lookup. Takes this rank off
    the session's lease on them. The target slots belong to the server until it
    answers or its process is gone, whatever the deadline says.
    """

    lane: ClassVar[Lane] = Lane.RETRIEVE
    is_void_late: ClassVar[bool] = True

    session: SessionKey
    instance_id: Text
    offset: Annotated[Count, Meta(description="slot of the prompt's first token")]
    ranges: tuple[CBRange, ...] = ()
    matches: tuple[CBMatch, ...] = ()
    rotate_keys: Annotated[
        bool, Meta(description="turn K from old positions to those in the prompt")
    ] = False
    tokens: Annotated[
        Packed, Meta(description="of the whole prompt; ranges are then found anew")
    ] = memoryview(b"")
    extras: Annotated[
        tuple[ExtraKey, ...], Meta(description="of the prompt, beside its tokens")
    ] = ()
    event: EventHandle = b""


class CBStoreFinal(Request[StoreReply], frozen=True):
    """Store the whole chunks of [start, end) of a prompt in the normal space.

    As STORE, from the slots of a buffer.
    """

    lane: ClassVar[Lane] = Lane.STORE
    is_void_late: ClassVar[bool] = True

    session: SessionKey
    instance_id: Text
    offset: Annotated[Count, Meta(description="slot of the prompt's first token")]
    start: Count
    end: Count
    tokens: Annotated[Packed, Meta(description="packed uint32 ids")] = memoryview(b"")
    token_offset: Annotated[Count, Meta(description="place of tokens[0]")] = 0
    extras: tuple[ExtraKey, ...] = ()
    event: EventHandle = b""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is known about a miss."""

    code: Annotated[
        str, Meta(description="such as never_stored, evicted, not_all_ranks, expired")
    ]
    message: str


class WhyReply(msgspec.Struct, frozen=True):
    """All that is known, the most telling first; the server forgets old things."""

    findings: tuple[Finding, ...]


class Why(Request[WhyReply], frozen=True):
    """Ask why a lookup missed, or what became of a chunk."""

    about: Annotated[
        Text,
        Meta(description="a request's id, ENGINE/REQUEST, or digits of a chunk's hash"),
    ]
