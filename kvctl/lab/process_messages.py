"""What the driver, the schedulers and the ranks of a run tell each other."""

from __future__ import annotations

from contextlib import suppress
from multiprocessing.connection import Connection

import msgspec

from kvcore.keys import SessionKey
from kvcore.protocol import CBMatch
from kvctl.lab.latency_samples import LatencySamples
from kvctl.lab.model_geometry import Geometry
from kvctl.lab.scenario import Scenario
from kvctl.lab.systems.system_interface import SystemSpec
from kvctl.lab.workload.copy_settings import Setting


class EnginePlan(msgspec.Struct, frozen=True):
    """One engine of a run; enough to play it."""

    address: str
    engine: int
    engine_id: str
    model: str
    """Carries the run's id, so that runs on one server never share chunks."""
    seed: int
    scenario: Scenario
    """What this engine's tenant plays."""
    place: int = 0
    """Among the tenant's engines."""
    first_index: int = 0
    """Of the workload, where an engine that was started again goes on."""
    system: SystemSpec = SystemSpec()
    turns: str | None = None
    """Rendezvous address of the engine it alternates with; see `interleaving`."""
    host: int = 0
    """Whose server it asks."""

    @property
    def geometry(self) -> Geometry:
        """The model's KV."""
        return self.scenario.model.geometry()


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A process has set itself up."""

    chunk_bytes: int = 0
    """Of a rank: bytes of a chunk in it."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A process cannot go on."""

    message: str


class Start(msgspec.Struct, frozen=True, tag=True):
    """Begin to play."""

    epoch_s: float = 0.0
    """On the host's monotonic clock: the time that dues count from."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Begin no more requests; finish those under way and report."""

    server_gone: bool = False
    """Nothing under way can end any more: report what there is."""


class Tally(msgspec.Struct, tag=True):
    """What an engine has counted so far. Chunks are whole ones of prompts."""

    requests: int = 0
    warm_ups: int = 0
    """Requests before the measurement, counted nowhere else."""
    aborted: int = 0
    preemptions: int = 0
    errors: int = 0
    bytes_wrong: int = 0
    tokens: int = 0
    tokens_hit: int = 0
    tokens_from_tiers: int = 0
    """Of those hit, what memory lacked when it was asked for."""
    chunks: int = 0
    chunks_hit: int = 0
    parts_stored: int = 0
    parts_present: int = 0
    parts_dropped: int = 0
    store_bytes: int = 0
    """Of stores that copied every part; likewise `store_s`."""
    store_s: float = 0.0
    retrieve_bytes: int = 0
    retrieve_s: float = 0.0
    document_tokens_hit: int = 0
    """Of prompts, found in documents at any position."""
    document_chunks: int = 0
    """Whole ones of documents in prompts."""
    document_chunks_hit: int = 0
    copy_bytes: int = 0
    """Of plain copies in the ranks, timed between their calls; likewise `copy_s`."""
    copy_s: float = 0.0

    def add(self, other: Tally) -> None:
        """Count another's in."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class EngineReport(msgspec.Struct, frozen=True, tag=True):
    """Everything that an engine measured, at its end."""

    tally: Tally
    samples: LatencySamples
    chunk_heads: bytes
    """First eight bytes of the hash of each chunk asked for, once each."""
    errors: tuple[str, ...] = ()
    next_index: int = 0
    """Of the workload: where another engine could go on."""
    warm_heads: bytes = b""
    """Likewise, of chunks asked for in the warm-up."""
    document_heads: bytes = b""
    """Likewise, of documents' chunks; nothing of the warm-up."""
    host: int = 0
    """Whose server it asked."""
    journal: bytes = b""
    """`kvctl.lab.engine.request_log.RECORD`s: one a request, warm-up included."""


class RunRequest(msgspec.Struct, frozen=True, tag=True):
    """To a rank: retrieve chunks [0, hit) and check them; write and store the rest."""

    session: SessionKey
    hit_tokens: int
    end_tokens: int
    hashes: bytes
    """32 bytes a chunk."""
    blocks: tuple[bytes, ...]
    """One a cache group: int32 ids of the blocks of [0, end)."""
    retrieve: bool = True
    """Without it [0, hit) is there already."""
    tokens: bytes = b""
    """Packed, for systems whose ranks ask with them."""


class StoredDocument(msgspec.Struct, frozen=True):
    """A document in a prompt that is to be stored."""

    start: int
    end: int
    hashes: bytes
    """32 bytes a chunk, in the document space."""


class RunDocuments(msgspec.Struct, frozen=True, tag=True):
    """To a rank: load and check what was found, store documents and the prompt."""

    session: SessionKey
    slot: int
    """Of the buffer, from 0."""
    tokens: bytes
    """Of the prompt, packed uint32."""
    matches: tuple[CBMatch, ...]
    documents: tuple[StoredDocument, ...]
    hashes: bytes
    """Of the prompt's chunks, 32 bytes each."""


class RequestDone(msgspec.Struct, frozen=True):
    """From a rank: how it went."""

    tally: Tally
    durations: dict[str, float]
    errors: tuple[str, ...] = ()
    unavailable: str | None = None
    """The server is gone, and with it everything else that could be played."""


class MeasureAlone(msgspec.Struct, frozen=True, tag=True):
    """To a rank, once nobody plays: time calls of about so many bytes."""

    max_bytes: int
    seed: int


class MeasuredAlone(msgspec.Struct, frozen=True, tag=True):
    """From a rank: how long its calls took, with plain copies of as many bytes."""

    num_bytes: int
    samples: LatencySamples
    """Of `store` and `retrieve`, and of the plain copies beside them."""
    bytes_wrong: int = 0


class MeasureCopies(msgspec.Struct, frozen=True, tag=True):
    """To a rank, once nobody plays: make calls of this setting."""

    setting: Setting
    seed: int


class Warm(msgspec.Struct, frozen=True, tag=True):
    """From a rank: its first calls are made; it waits for `Start`, as others do."""


class MeasuredCopies(msgspec.Struct, frozen=True, tag=True):
    """From a rank: how long its calls took, with plain copies of as many bytes."""

    num_bytes: int
    chunk_bytes: int
    samples: LatencySamples
    bytes_wrong: int = 0
    products_per_s: tuple[float, float] | None = None
    """Matrix products, alone and beside the calls."""
    ways: dict[str, int] = {}
    """Calls that the rank copied itself on a GPU, by way and direction."""


class Storm(msgspec.Struct, frozen=True, tag=True):
    """To a rank, before the load: unregister and register so often, timed."""

    rounds: int


class StormDone(msgspec.Struct, frozen=True, tag=True):
    """From a rank: how long `register` and `unregister` took."""

    samples: LatencySamples


Control = (
    Ready
    | Failed
    | Start
    | Stop
    | Tally
    | EngineReport
    | MeasureAlone
    | MeasuredAlone
    | MeasureCopies
    | Warm
    | MeasuredCopies
    | Storm
    | StormDone
)

_control = msgspec.msgpack.Decoder(Control)
_encoder = msgspec.msgpack.Encoder()


def send(connection: Connection, message: msgspec.Struct) -> None:
    """Send one message; `OSError` when the other end is gone."""
    connection.send_bytes(_encoder.encode(message))


def send_failed(connection: Connection, reason: str) -> None:
    """Say why a process ends, where somebody is left to hear it."""
    with suppress(OSError):
        send(connection, Failed(reason))


def receive(connection: Connection) -> Control:
    """Receive one control message; `EOFError` when the other end is gone."""
    message: Control = _control.decode(connection.recv_bytes())
    return message
