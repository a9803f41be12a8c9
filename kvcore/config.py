"""The server's options, each declared once: its file key, its flag, its help."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

from kvcore.options import ByteSize, Options, require


class L1Config(Options, frozen=True):
    """Host memory that holds the chunks."""

    size: Annotated[
        ByteSize, Meta(description="memory for chunks, taken at start from /dev/shm")
    ] = ByteSize(1 << 30)
    page: Annotated[
        ByteSize, Meta(description="unit of allocation; a part wastes less than one")
    ] = ByteSize(64 << 10)
    eviction: Annotated[
        str, Meta(description="which chunks go first when room is needed")
    ] = "lru"
    watermark: Annotated[
        float,
        Meta(description="a store that leaves more than this share used evicts down"),
    ] = 1.0
    quotas: Annotated[
        dict[str, ByteSize],
        Meta(description="what a `salt:NAME` or `model:NAME` may keep under pressure"),
    ] = {}
    verify: Annotated[
        bool, Meta(description="check the bytes' checksums at every retrieve")
    ] = False
    keep: Annotated[
        str | None,
        Meta(description="keep L1 across restarts, with its journal in this file"),
    ] = None

    def check(self) -> None:
        """The size holds at least one page, and pages suit the machine's."""
        require(
            self.page >= 4096 and self.page & (self.page - 1) == 0,
            "l1.page", self.page, "must be a power of two of at least 4KiB",
        )  # fmt: skip
        require(
            self.size >= self.page,
            "l1.size",
            self.size,
            f"less than a page, {self.page}",
        )
        require(
            0 < self.watermark <= 1, "l1.watermark", self.watermark, "above 0, up to 1"
        )
        for name in self.quotas:
            require(
                name.partition(":")[0] in {"salt", "model"} and not name.endswith(":"),
                "l1.quotas", name, "must read salt:NAME or model:NAME",
            )  # fmt: skip


MIN_HEARTBEAT_S = 0.001
MAX_HEARTBEAT_S = 86_400.0


class WireConfig(Options, frozen=True):
    """Bounds on what clients may ask at once."""

    max_requests_per_client: Annotated[
        int, Meta(description="unanswered requests; more are answered `overloaded`")
    ] = 1024
    max_message: Annotated[
        ByteSize, Meta(description="largest request that is read")
    ] = ByteSize(64 << 20)
    slice_chunks: Annotated[
        int, Meta(description="chunks hashed before others are served")
    ] = 32
    heartbeat_s: Annotated[
        float, Meta(description="a client that cannot be watched sends this often")
    ] = 5.0

    def check(self) -> None:
        """Every bound leaves room for one request."""
        requests, slices = self.max_requests_per_client, self.slice_chunks
        require(requests >= 1, "wire.max_requests_per_client", requests, "at least 1")
        require(
            self.max_message >= 4096,
            "wire.max_message",
            self.max_message,
            "at least 4KiB",
        )
        require(slices >= 1, "wire.slice_chunks", slices, "at least 1")
        require(
            MIN_HEARTBEAT_S <= self.heartbeat_s <= MAX_HEARTBEAT_S,
            "wire.heartbeat_s",
            self.heartbeat_s,
            f"from {MIN_HEARTBEAT_S:g} to {MAX_HEARTBEAT_S:g}",
        )


class SessionConfig(Options, frozen=True):
    """How long what a request left behind is kept."""

    idle_s: Annotated[
        float, Meta(description="a session without requests is forgotten after this")
    ] = 600.0
    lease_s: Annotated[
        float, Meta(description="chunks found are held for their readers this long")
    ] = 60.0
    max_sessions: Annotated[
        int, Meta(description="the longest idle are forgotten beyond this")
    ] = 100_000

    def check(self) -> None:
        """A lease does not outlive its session."""
        require(self.lease_s > 0, "sessions.lease_s", self.lease_s, "more than 0")
        require(
            self.idle_s >= self.lease_s,
            "sessions.idle_s",
            self.idle_s,
            f"less than sessions.lease_s, {self.lease_s}",
        )
        require(
            self.max_sessions >= 1,
            "sessions.max_sessions",
            self.max_sessions,
            "at least 1",
        )


Patterns = tuple[tuple[int, ...], ...]


class BlendConfig(Options, frozen=True):
    """How `--engine blend` finds documents in a prompt."""

    matcher: Annotated[
        Literal["anywhere", "separated"],
        Meta(
            description="separated: paragraphs between token patterns, each a document "
            "from its start on; anywhere: at any offset, by their tokens, and in tiers "
            "such paragraphs, too"
        ),
    ] = "anywhere"
    preset: Annotated[
        str, Meta(description="patterns of a model family (docs/blend.md); none: own")
    ] = ""
    start: Annotated[
        Patterns, Meta(description="token ids after which a paragraph begins")
    ] = ()
    end: Annotated[
        Patterns, Meta(description="token ids before which a paragraph ends")
    ] = ()
    max_tier_chunks: Annotated[
        int,
        Meta(description="anywhere: chunks known in tiers; the longest unused go"),
    ] = 1 << 18
    keep: Annotated[
        str | None,
        Meta(description="anywhere: know documents across restarts, in this file"),
    ] = None

    def check(self) -> None:
        """No pattern is empty, and no preset has patterns beside it."""
        patterns = [*self.start, *self.end]
        require(all(patterns), "blend.start", self.start, "no pattern may be empty")
        known = all(0 <= token < 1 << 32 for p in patterns for token in p)
        require(known, "blend.start", self.start, "token ids of 0 to 2**32-1")
        require(
            not (self.preset and patterns),
            "blend.preset",
            self.preset,
            "takes no blend.start or blend.end beside it",
        )
        require(
            self.keep is None or self.matcher == "anywhere",
            "blend.keep", self.keep, "blend.matcher = 'separated' has nothing to keep",
        )  # fmt: skip
        most = self.max_tier_chunks
        require(most >= 1, "blend.max_tier_chunks", most, "at least 1")


class PrefetchConfig(Options, frozen=True):
    """Loads from tiers on behalf of lookups."""

    deadline_s: Annotated[
        float, Meta(description="a lookup answers at the latest after this")
    ] = 1.0
    max_jobs: Annotated[
        int, Meta(description="lookups that load at once; more get what memory has")
    ] = 256
    max_bytes: Annotated[
        ByteSize, Meta(description="being loaded at once from one tier")
    ] = ByteSize(128 << 20)

    def check(self) -> None:
        """Something can be loaded, some time."""
        require(
            self.deadline_s > 0, "prefetch.deadline_s", self.deadline_s, "more than 0"
        )
        require(self.max_jobs >= 1, "prefetch.max_jobs", self.max_jobs, "at least 1")


WRITE_POLICIES = ("write_through", "on_second_use", "on_eviction")


class WriteBackConfig(Options, frozen=True):
    """Writes to tiers behind stores."""

    policy: Annotated[str, Meta(description=f"when: {', '.join(WRITE_POLICIES)}")] = (
        "write_through"
    )
    max_bytes: Annotated[
        ByteSize, Meta(description="waiting for one tier; more is skipped and counted")
    ] = ByteSize(256 << 20)
    watermark: Annotated[
        float,
        Meta(description="on_eviction: write ahead when this share of L1 is used"),
    ] = 0.8

    def check(self) -> None:
        """The policy is known and the watermark a share."""
        require(
            self.policy in WRITE_POLICIES,
            "write_back.policy", self.policy, f"one of {', '.join(WRITE_POLICIES)}",
        )  # fmt: skip
        require(
            0 <= self.watermark <= 1,
            "write_back.watermark", self.watermark, "a share, 0 to 1",
        )  # fmt: skip


LOG_LEVELS = ("debug", "info", "warning", "error")


class ServerConfig(Options, frozen=True):
    """Everything that `kvctl serve` can be told."""

    address: Annotated[
        str, Meta(description="tcp://HOST:PORT or ipc://PATH; port 0 takes a free one")
    ] = "tcp://127.0.0.1:5555"
    chunk_size: Annotated[
        int, Meta(description="tokens a chunk; a multiple of every engine's block size")
    ] = 256
    engine: Annotated[
        Literal["prefix", "blend"],
        Meta(description="blend also serves documents at any position (CB_ requests)"),
    ] = "prefix"
    copy_threads: Annotated[
        int, Meta(description="threads that a large copy in host memory is spread over")
    ] = 2
    blend: BlendConfig = BlendConfig()
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Meta(
            description="where engines' caches may lie: cuda also in the memory of "
            "GPUs; auto: cuda where there is a driver; cpu: in host memory only"
        ),
    ] = "auto"
    l1: L1Config = L1Config()
    wire: WireConfig = WireConfig()
    sessions: SessionConfig = SessionConfig()
    tiers: Annotated[
        tuple[str, ...],
        Meta(description="URLs of stores beneath L1, in the order they are asked"),
    ] = ()
    prefetch: PrefetchConfig = PrefetchConfig()
    write_back: WriteBackConfig = WriteBackConfig()
    metrics_port: Annotated[
        int | None,
        Meta(description="serve Prometheus metrics at this port"),
    ] = None
    metrics_host: Annotated[
        str, Meta(description="where: 0.0.0.0 for a scraper that is elsewhere")
    ] = "127.0.0.1"
    record: Annotated[
        str | None,
        Meta(description="write every lookup here, hashes only, to be replayed"),
    ] = None
    ready_file: Annotated[
        str | None, Meta(description="write the bound address here once serving")
    ] = None
    log_level: Annotated[
        str, Meta(description=f"what goes to stderr: {', '.join(LOG_LEVELS)}")
    ] = "info"

    def check(self) -> None:
        """The address can be bound and the chunk size cut into blocks."""
        require(
            is_address(self.address),
            "address", self.address, "must be tcp://HOST:PORT or ipc://PATH",
        )  # fmt: skip
        require(self.chunk_size >= 1, "chunk_size", self.chunk_size, "at least 1")
        require(
            self.blend.keep is None or bool(self.l1.keep or self.tiers),
            "blend.keep", self.blend.keep, "of use with l1.keep or a tier only",
        )  # fmt: skip
        threads = self.copy_threads
        require(threads >= 1, "copy_threads", threads, "at least 1")
        port = self.metrics_port
        require(port is None or 0 <= port < 1 << 16, "metrics_port", port, "0 to 65535")
        require(
            self.log_level in LOG_LEVELS,
            "log_level", self.log_level, f"one of {', '.join(LOG_LEVELS)}",
        )  # fmt: skip


def is_address(text: str) -> bool:
    """Say whether this is an address that a server can listen on."""
    if text.startswith("ipc://"):
        return len(text) > len("ipc://")
    match = re.fullmatch(r"tcp://(?:[^\s:/]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", text)
    return match is not None and int(match[1]) < 1 << 16
