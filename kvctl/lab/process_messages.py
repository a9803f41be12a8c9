"""Messages between the driver, the schedulers and the ranks of a run."""

from __future__ import annotations

from contextlib import suppress
from multiprocessing.connection import Connection

import msgspec

from kvcore.keys import SessionKey
from kvcore.protocol import CBMatch
from kvctl.lab.config.copy_settings import Setting
from kvctl.lab.config.model_geometry import Geometry
from kvctl.lab.config.scenario import Scenario, SystemSpec
from kvctl.lab.latency import LatencySamples


class EnginePlan(msgspec.Struct, frozen=True):
    """Everything that the processes of one engine need."""

    address: str
    engine: int
    engine_id: str
    model: str
    """Contains the run's id, so that runs on one server do not share chunks."""
    seed: int
    scenario: Scenario
    """The scenario of the engine's tenant."""
    place: int = 0
    """Index among the tenant's engines."""
    first_index: int = 0
    """First request of the workload, for an engine that was restarted."""
    system: SystemSpec = SystemSpec()
    turns: str | None = None
    """Rendezvous address of the interleaved run; see `run_turns`."""
    host: int = 0
    """Index of the simulated host, and of its server."""

    @property
    def geometry(self) -> Geometry:
        """KV geometry of the model."""
        return self.scenario.model.geometry()


class Ready(msgspec.Struct, frozen=True, tag=True):
    """To the driver: the process is set up."""

    chunk_bytes: int = 0
    """Of a rank: bytes of a chunk on it."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """To the driver: the process failed and ends."""

    message: str


class Start(msgspec.Struct, frozen=True, tag=True):
    """From the driver: begin the load, or the measured calls."""

    epoch_s: float = 0.0
    """Start of the load on the host's monotonic clock."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """From the driver: begin no more requests, finish those in progress, report."""

    server_gone: bool = False
    """Requests in progress cannot finish: report immediately."""


class Tally(msgspec.Struct, tag=True):
    """Counts of an engine so far. Chunks are full ones of prompts."""

    requests: int = 0
    warm_ups: int = 0
    """Requests of the warm-up, which no other field counts."""
    aborted: int = 0
    preemptions: int = 0
    errors: int = 0
    bytes_wrong: int = 0
    tokens: int = 0
    tokens_hit: int = 0
    tokens_from_tiers: int = 0
    """Hit tokens that were not in L1 at lookup."""
    chunks: int = 0
    chunks_hit: int = 0
    parts_stored: int = 0
    parts_present: int = 0
    parts_dropped: int = 0
    store_bytes: int = 0
    """Of stores that copied every part; `store_s` is their duration."""
    store_s: float = 0.0
    retrieve_bytes: int = 0
    retrieve_s: float = 0.0
    document_tokens_hit: int = 0
    """Prompt tokens found in documents at any position."""
    document_chunks: int = 0
    """Full chunks of documents in prompts."""
    document_chunks_hit: int = 0
    copy_bytes: int = 0
    """Of plain copies that ranks make between calls; `copy_s` is their duration."""
    copy_s: float = 0.0

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class EngineReport(msgspec.Struct, frozen=True, tag=True):
    """To the driver: all measurements of an engine, at its end."""

    tally: Tally
    samples: LatencySamples
    chunk_heads: bytes
    """First eight bytes of each distinct requested chunk hash."""
    errors: tuple[str, ...] = ()
    next_index: int = 0
    """Next request of the workload, for an engine that replaces this one."""
    warm_heads: bytes = b""
    """Like `chunk_heads`, for requests of the warm-up."""
    document_heads: bytes = b""
    """Like `chunk_heads`, for chunks of documents; without the warm-up."""
    host: int = 0
    """Index of the simulated host, and of its server."""
    journal: bytes = b""
    """Packed `engine_statistics.RECORD`s, one per request, warm-up included."""


class RunRequest(msgspec.Struct, frozen=True, tag=True):
    """To a rank: retrieve and check tokens [0, hit); write and store the rest."""

    session: SessionKey
    hit_tokens: int
    end_tokens: int
    hashes: bytes
    """32 bytes per chunk."""
    blocks: tuple[bytes, ...]
    """Per cache group: int32 ids of the blocks of tokens [0, end)."""
    retrieve: bool = True
    """False if [0, hit) was retrieved before."""
    tokens: bytes = b""
    """Packed uint32, for systems whose ranks need them."""


class StoredDocument(msgspec.Struct, frozen=True):
    """A document of a prompt that is to be stored: tokens [start, end)."""

    start: int
    end: int
    hashes: bytes
    """32 bytes per chunk, in the keyspace of documents."""


class RunDocuments(msgspec.Struct, frozen=True, tag=True):
    """To a rank: retrieve and check matches, store documents and the prompt."""

    session: SessionKey
    slot: int
    """Index of the buffer's slot."""
    tokens: bytes
    """Of the prompt, packed uint32."""
    matches: tuple[CBMatch, ...]
    documents: tuple[StoredDocument, ...]
    hashes: bytes
    """Of the prompt's chunks, 32 bytes each."""


class RequestDone(msgspec.Struct, frozen=True):
    """From a rank: counts, durations and errors of one request."""

    tally: Tally
    durations: dict[str, float]
    errors: tuple[str, ...] = ()
    unavailable: str | None = None
    """Reason why the server cannot be reached; the run cannot continue."""


class MeasureIsolatedCalls(msgspec.Struct, frozen=True, tag=True):
    """To a rank, after the load: time calls of about `max_bytes`."""

    max_bytes: int
    seed: int


class MeasureCopies(msgspec.Struct, frozen=True, tag=True):
    """To a rank, after the load: make the calls of this setting."""

    setting: Setting
    seed: int


class WarmedUp(msgspec.Struct, frozen=True, tag=True):
    """From a rank: its warm-up calls are done; it waits for `Start`."""


class CallTimes(msgspec.Struct, frozen=True, tag=True):
    """From a rank: durations of isolated calls and of plain copies of equal size."""

    num_bytes: int
    chunk_bytes: int
    samples: LatencySamples
    bytes_wrong: int = 0
    products_per_s: tuple[float, float] | None = None
    """Matrix products, without and during the calls."""
    ways: dict[str, int] = {}
    """Copies that the rank made on a GPU, by method and direction."""


class RegisterRepeatedly(msgspec.Struct, frozen=True, tag=True):
    """To a rank, before the load: unregister and register `rounds` times."""

    rounds: int


class RegistrationTimes(msgspec.Struct, frozen=True, tag=True):
    """From a rank: durations of `register` and `unregister`."""

    samples: LatencySamples


Control = (
    Ready
    | Failed
    | Start
    | Stop
    | Tally
    | EngineReport
    | MeasureIsolatedCalls
    | CallTimes
    | MeasureCopies
    | WarmedUp
    | RegisterRepeatedly
    | RegistrationTimes
)

_control = msgspec.msgpack.Decoder(Control)
_encoder = msgspec.msgpack.Encoder()


def send(connection: Connection, message: msgspec.Struct) -> None:
    """Send one message.

    Raises:
        OSError: the other end is closed.
    """
    connection.send_bytes(_encoder.encode(message))


def send_failed(connection: Connection, reason: str) -> None:
    """Send the reason of a failure, unless the driver has ended."""
    with suppress(OSError):
        send(connection, Failed(reason))


def receive(connection: Connection) -> Control:
    """Return the next control message.

    Raises:
        EOFError: the other end is closed.
    """
    message: Control = _control.decode(connection.recv_bytes())
    return message
