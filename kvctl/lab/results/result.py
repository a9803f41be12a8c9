"""The result of a run: one versioned JSON file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvcore.errors import SetupError
from kvcore.option_structs import decode_hook, encode_hook
from kvcore.status import DeviceStatus
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.config.copy_settings import CopyRow
from kvctl.lab.config.scenario import Scenario, publish
from kvctl.lab.latency import Latency
from kvctl.lab.rank.isolated_calls import IsolatedTimings
from kvctl.lab.results.load_report import LoadReport
from kvctl.lab.results.time_series import Series
from kvctl.lab.run.environment import Environment

RESULT_VERSION = 1


class Counts(msgspec.Struct, frozen=True):
    """Counts, which repeat from run to run where timing does not matter."""

    requests: int
    errors: int
    bytes_wrong: int
    leases_leaked: Annotated[
        int, Meta(description="leases left after the end of their session")
    ]
    tokens: Annotated[int, Meta(description="prompt tokens")]
    tokens_hit: int
    tokens_hit_ideal: Annotated[int, Meta(description="with an infinite cache")]
    chunks: Annotated[int, Meta(description="whole chunks of prompts")]
    chunks_hit: int
    chunks_hit_ideal: int
    parts_stored: int
    parts_present: Annotated[int, Meta(description="already stored")]
    parts_dropped: Annotated[
        int, Meta(description="no memory, or a null block in the part")
    ]
    retrieved_bytes: Annotated[int, Meta(description="all of them checked")]
    stored_bytes: Annotated[int, Meta(description="of stores that copied all parts")]
    tokens_from_tiers: Annotated[
        int, Meta(description="tokens hit that were loaded from tiers")
    ] = 0


class HitRates(msgspec.Struct, frozen=True):
    """Shares of lookups. A block here is a chunk, the unit of reuse."""

    by_block: float
    by_token: float
    ideal_by_block: float
    ideal_by_token: float


class TierHits(msgspec.Struct, frozen=True):
    """Hits of one store: memory or a tier."""

    name: Annotated[str, Meta(description="`L1`, or `tier 1: KIND` and so on")]
    hit_rate: Annotated[
        float, Meta(description="of prompt tokens; split between tiers by loaded bytes")
    ]
    loaded_bytes: Annotated[
        int | None, Meta(description="loaded into memory during the load; none for L1")
    ] = None


class Throughput(msgspec.Struct, frozen=True):
    """Rates; GB are 10**9 bytes. Copies: bytes per time in calls, with round trips."""

    requests_per_s: float
    tokens_per_s: float
    store_gb_per_s: float | None
    retrieve_gb_per_s: float | None
    plain_copy_gb_per_s: Annotated[
        float | None, Meta(description="by the ranks, of as many bytes, between calls")
    ]


class Shares(msgspec.Struct, frozen=True):
    """Shares of the ceilings that were reached; 1 is the ceiling.

    Copies are compared with the plain copies that the ranks made under the same load,
    p50 of round trips with bare ones on the idle machine.
    """

    store: float | None
    retrieve: float | None
    ping: float | None
    lookup: float | None


class DocumentReuse(msgspec.Struct, frozen=True):
    """Reuse of documents at any position, beside reuse of prefixes."""

    tokens_hit: Annotated[
        int, Meta(description="prompt tokens in documents at any position")
    ]
    chunks: Annotated[int, Meta(description="whole chunks of documents in prompts")]
    chunks_hit: int
    chunks_hit_ideal: Annotated[int, Meta(description="with an infinite cache")]
    contents: Annotated[
        int, Meta(description="documents and text between them, of any length")
    ]
    contents_prefix: Annotated[
        int, Meta(description="of these, reused by an infinite prefix cache")
    ]
    contents_anywhere: Annotated[
        int, Meta(description="of these, reused by an infinite cache at any position")
    ]

    @property
    def share_of_ideal(self) -> float:
        """Share of the hits of an infinite cache."""
        return self.chunks_hit / self.chunks_hit_ideal if self.chunks_hit_ideal else 1.0


class HostReport(msgspec.Struct, frozen=True):
    """One simulated host. Chunks are whole ones of its engines' prompts."""

    requests: int
    chunks: int
    chunks_hit: int
    chunks_hit_alone: Annotated[
        int, Meta(description="upper bound without the other hosts: infinite cache")
    ]
    retrieved_bytes: Annotated[int, Meta(description="all of them checked")]
    tier_bytes: Annotated[int, Meta(description="loaded from tiers into its L1")]

    @property
    def chunks_hit_from_others(self) -> int:
        """Lower bound of the hits on chunks that another host stored."""
        return max(0, self.chunks_hit - self.chunks_hit_alone)


class System(msgspec.Struct, frozen=True):
    """The system under load."""

    name: str = "kvctl"
    version: str = ""


class Repetition(msgspec.Struct, frozen=True):
    """Position of a run among the paired runs of two sides."""

    comparison: Annotated[str, Meta(description="id shared by all runs of both sides")]
    side: str
    number: Annotated[int, Meta(description="runs with equal numbers are a pair")]


class Result(msgspec.Struct, frozen=True):
    """The result of one run."""

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
        tuple[str, ...], Meta(description="reasons for exit code 1; empty: exit code 0")
    ]
    alone: Annotated[
        IsolatedTimings | None,
        Meta(description="calls made one at a time on the idle machine"),
    ] = None
    copies: Annotated[
        tuple[CopyRow, ...], Meta(description="one row per setting of scenario.copies")
    ] = ()
    devices: Annotated[
        tuple[DeviceStatus, ...],
        Meta(description="GPUs whose caches the server copied, with measured rates"),
    ] = ()
    load: LoadReport | None = None
    documents: DocumentReuse | None = None
    series: Annotated[Series | None, Meta(description="the load over time")] = None
    counters: Annotated[
        dict[str, int],
        Meta(description="growth of the server's counters during the load"),
    ] = {}
    server_bytes: Annotated[
        tuple[int, int] | None,
        Meta(
            description="anonymous memory of the server without L1, before and after "
            "the load"
        ),
    ] = None
    tiers: Annotated[
        tuple[TierHits, ...], Meta(description="L1 and tiers; empty without tiers")
    ] = ()
    hosts: Annotated[
        tuple[HostReport, ...], Meta(description="of a run with several hosts")
    ] = ()
    system: System = System()
    repetition: Repetition | None = None
    turns: Annotated[
        dict[str, tuple[float | None, ...]],
        Meta(description="median of each turn of interleaved runs, in seconds"),
    ] = {}

    def save(self, folder: Path) -> Path:
        """Write `NAME-STARTED.json` atomically into a folder, created if missing.

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
    """Create a folder for results if missing.

    Raises:
        SetupError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--out {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SetupError(f"--out {folder}: not writable")


def check_folder(folder: Path) -> None:
    """Check before a run that its result can be saved, and leave no new folder.

    Raises:
        SetupError: the folder cannot be created or written to.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    make_folder(folder)
    for one in missing:
        one.rmdir()


def read(path: Path) -> Result:
    """Read a saved result.

    Raises:
        SetupError: the file cannot be read, or is no result of this version.
    """
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
"""Relative to the schema of results."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema of saved results, published as docs/result.schema.json."""
    fields = [
        (one.encode_name, dict if one.name == "scenario" else one.type)
        for one in msgspec.structs.fields(Result)
    ]
    made = msgspec.json.schema(msgspec.defstruct("Result", fields, frozen=True))
    made["$defs"]["Result"]["properties"]["scenario"] = {"$ref": SCENARIO_SCHEMA}
    return publish(made)
