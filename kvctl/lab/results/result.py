"""What a run measured: one versioned JSON file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvcore.errors import SetupError
from kvcore.options import decode_hook, encode_hook
from kvcore.status import DeviceStatus
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.config.copy_settings import CopyRow
from kvctl.lab.config.scenario import Scenario, publish
from kvctl.lab.latency import Latency
from kvctl.lab.rank.isolated_calls import IsolatedTimings
from kvctl.lab.results.load_report import LoadReport
from kvctl.lab.results.simulated_hosts import HostReport
from kvctl.lab.results.time_series import Series
from kvctl.lab.run.environment import Environment

RESULT_VERSION = 1


class Counts(msgspec.Struct, frozen=True):
    """What must repeat from run to run, timing aside."""

    requests: int
    errors: int
    bytes_wrong: int
    leases_leaked: Annotated[
        int, Meta(description="leases that outlived their session")
    ]
    tokens: Annotated[int, Meta(description="of prompts")]
    tokens_hit: int
    tokens_hit_ideal: Annotated[int, Meta(description="with an endless cache")]
    chunks: Annotated[int, Meta(description="whole chunks of prompts")]
    chunks_hit: int
    chunks_hit_ideal: int
    parts_stored: int
    parts_present: Annotated[int, Meta(description="stored before, or by another")]
    parts_dropped: Annotated[int, Meta(description="no room, or a null block in it")]
    retrieved_bytes: Annotated[int, Meta(description="every one of them was checked")]
    stored_bytes: Annotated[int, Meta(description="of stores that copied every part")]
    tokens_from_tiers: Annotated[
        int, Meta(description="of those hit, what memory lacked when asked")
    ] = 0


class HitRates(msgspec.Struct, frozen=True):
    """Shares of what was asked for. A block here is a chunk, the unit of reuse."""

    by_block: float
    by_token: float
    ideal_by_block: float
    ideal_by_token: float


class TierHits(msgspec.Struct, frozen=True):
    """What one store brought: memory, or a tier beneath it."""

    name: Annotated[str, Meta(description="`L1`, or `tier 1: KIND` and so on")]
    hit_rate: Annotated[
        float,
        Meta(
            description="of prompt tokens; several tiers share theirs by loaded bytes"
        ),
    ]
    loaded_bytes: Annotated[
        int | None, Meta(description="into memory, during the load; none of L1")
    ] = None


class Throughput(msgspec.Struct, frozen=True):
    """GB are 10**9 bytes. Copies: bytes by the time in calls, round trip included."""

    requests_per_s: float
    tokens_per_s: float
    store_gb_per_s: float | None
    retrieve_gb_per_s: float | None
    plain_copy_gb_per_s: Annotated[
        float | None,
        Meta(description="of as many bytes, by the ranks themselves, between calls"),
    ]


class Shares(msgspec.Struct, frozen=True):
    """Shares of the ceilings that were reached; 1 is the ceiling.

    Copies are held against the plain copies that the ranks made under the same load,
    p50 of round trips against bare ones on the idle machine.
    """

    store: float | None
    retrieve: float | None
    ping: float | None
    lookup: float | None


class DocumentReuse(msgspec.Struct, frozen=True):
    """What reuse at any position gives beside reuse of prefixes alone."""

    tokens_hit: Annotated[int, Meta(description="of prompts, in documents anywhere")]
    chunks: Annotated[int, Meta(description="whole chunks of documents in prompts")]
    chunks_hit: int
    chunks_hit_ideal: Annotated[int, Meta(description="with an endless cache")]
    contents: Annotated[
        int, Meta(description="documents and glue asked for, whatever their length")
    ]
    contents_prefix: Annotated[
        int, Meta(description="of these, reused by an ideal that knows prefixes")
    ]
    contents_anywhere: Annotated[
        int, Meta(description="likewise, that knows them at any position")
    ]

    @property
    def share_of_ideal(self) -> float:
        """What was found of what an endless cache would have found."""
        return self.chunks_hit / self.chunks_hit_ideal if self.chunks_hit_ideal else 1.0


class System(msgspec.Struct, frozen=True):
    """What was under the load."""

    name: str = "kvctl"
    version: str = ""


class Repetition(msgspec.Struct, frozen=True):
    """A run's place among the interleaved runs of two sides."""

    comparison: Annotated[str, Meta(description="the same for all runs of both sides")]
    side: str
    number: Annotated[int, Meta(description="runs of one number are a pair")]


class Result(msgspec.Struct, frozen=True):
    """One run."""

    version: int
    name: str
    scenario: Scenario
    seed: int
    started: Annotated[str, Meta(description="UTC, ISO 8601")]
    elapsed_s: float
    interrupted: bool
    environment: Environment
    counts: Counts
    hit_rates: HitRates
    operations: dict[str, Latency]
    throughput: Throughput
    ceilings: Ceilings | None
    shares: Shares
    errors: Annotated[tuple[str, ...], Meta(description="the first ones")]
    problems: Annotated[
        tuple[str, ...], Meta(description="why the exit code is 1; none: it is 0")
    ]
    alone: Annotated[
        IsolatedTimings | None, Meta(description="calls with the machine to themselves")
    ] = None
    copies: Annotated[
        tuple[CopyRow, ...], Meta(description="of every setting in scenario.copies")
    ] = ()
    devices: Annotated[
        tuple[DeviceStatus, ...],
        Meta(description="GPUs whose caches the server copied, how fast it found them"),
    ] = ()
    load: LoadReport | None = None
    documents: DocumentReuse | None = None
    series: Annotated[Series | None, Meta(description="the load, over time")] = None
    counters: Annotated[
        dict[str, int], Meta(description="the server's own, grown during the load")
    ] = {}
    server_bytes: Annotated[
        tuple[int, int] | None,
        Meta(
            description="anonymous memory of the server, L1 not included, when the "
            "load began and when it had ended"
        ),
    ] = None
    tiers: Annotated[
        tuple[TierHits, ...],
        Meta(description="L1 and the tiers beneath, where there are any"),
    ] = ()
    hosts: Annotated[
        tuple[HostReport, ...], Meta(description="of a run with more than one")
    ] = ()
    system: System = System()
    repetition: Repetition | None = None
    turns: Annotated[
        dict[str, tuple[float | None, ...]],
        Meta(description="medians of each turn, where two runs took turns; seconds"),
    ] = {}

    def save(self, folder: Path) -> Path:
        """Write `NAME-STARTED.json` into a folder, made if need be; whole or not.

        Raises:
            SetupError: the folder or the file cannot be written.
        """
        again = self.repetition
        suffix = f"-{again.side}-{again.number:02}" if again else ""
        stamp = self.started.replace(":", "").replace("-", "").partition("+")[0]
        path = folder / f"{self.name}-{stamp}{suffix}.json"
        text = msgspec.json.format(msgspec.json.encode(self, enc_hook=encode_hook))
        part = path.with_suffix(".part")
        make_folder(folder)
        try:
            part.write_bytes(text + b"\n")
            return part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise SetupError(f"--out {folder}: {error.strerror}") from None


def make_folder(folder: Path) -> None:
    """Make a folder for results, if need be.

    Raises:
        SetupError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--out {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SetupError(f"--out {folder}: cannot be written to")


def check_folder(folder: Path) -> None:
    """Find out before a run whether its result could be saved; leave nothing there.

    Raises:
        SetupError: the folder cannot be made, or not be written to.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    make_folder(folder)
    for one in missing:
        one.rmdir()


def read(path: Path) -> Result:
    """Read a saved result; `SetupError` says what is wrong with the file."""
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != RESULT_VERSION:
            raise SetupError(
                f"{path}: result version {version}; this kvctl reads {RESULT_VERSION}"
            )
        return msgspec.json.decode(data, type=Result, dec_hook=decode_hook)
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise SetupError(f"{path}: not a result: {error}") from None


class _Versioned(msgspec.Struct):
    version: int


SCENARIO_SCHEMA = "scenario.schema.json#/$defs/Scenario"
"""Beside the result's own schema."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a saved result; docs/result.schema.json is it."""
    fields = [
        (one.encode_name, dict if one.name == "scenario" else one.type)
        for one in msgspec.structs.fields(Result)
    ]
    made = msgspec.json.schema(msgspec.defstruct("Result", fields, frozen=True))
    made["$defs"]["Result"]["properties"]["scenario"] = {"$ref": SCENARIO_SCHEMA}
    return publish(made)
