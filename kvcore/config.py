"""The server's options: file keys, defaults and help.

Every option can be set in a file and by `--set`; `kvctl/commands/serve.py` adds flags
for the common ones.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

from kvcore.option_structs import ByteSize, Options, require

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Heartbeat = Annotated[float, Meta(ge=0.001, le=86_400.0)]
"""Seconds."""
TokenId = Annotated[int, Meta(ge=0, lt=1 << 32)]
Patterns = tuple[Annotated[tuple[TokenId, ...], Meta(min_length=1)], ...]
WritePolicy = Literal["write_through", "on_second_use", "on_eviction"]
LogLevel = Literal["debug", "info", "warning", "error"]


class L1Config(Options, frozen=True):
    """L1: host memory for chunks."""

    size: Annotated[
        ByteSize, Meta(description="memory for chunks in /dev/shm, allocated at start")
    ] = ByteSize(1 << 30)
    page: Annotated[
        ByteSize, Meta(description="allocation unit; each part wastes less than one")
    ] = ByteSize(64 << 10)
    eviction: Annotated[
        str, Meta(description="order of eviction: lru, lru-uses, s3fifo")
    ] = "lru"
    watermark: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="evict after stores until at most this share is used",
        ),
    ] = 1.0
    engine_share: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="share that the leases and tickets of one engine, or of one "
            "cache salt, keep from eviction; 1: no limit",
        ),
    ] = 0.5
    quotas: Annotated[
        dict[str, ByteSize],
        Meta(description="bytes of `salt:NAME` or `model:NAME` safe from eviction"),
    ] = {}
    verify: Annotated[bool, Meta(description="verify checksums at every retrieve")] = (
        False
    )
    keep: Annotated[
        str | None,
        Meta(description="keep L1 across restarts, with its journal in this file"),
    ] = None

    def check(self) -> None:
        """Require a valid page size, a size of at least one page, and valid quotas."""
        require(
            self.page >= 4096 and self.page & (self.page - 1) == 0,
            "l1.page", self.page, "must be a power of two of at least 4KiB",
        )  # fmt: skip
        need = f"less than a page, {self.page}"
        require(self.size >= self.page, "l1.size", self.size, need)
        for name in self.quotas:
            require(
                name.partition(":")[0] in {"salt", "model"} and not name.endswith(":"),
                "l1.quotas", name, "must read salt:NAME or model:NAME",
            )  # fmt: skip


class WireConfig(Options, frozen=True):
    """Limits per client."""

    max_requests_per_client: Annotated[
        Count, Meta(description="requests in progress; more are answered `overloaded`")
    ] = 1024
    max_message: Annotated[ByteSize, Meta(description="largest accepted request")] = (
        ByteSize(64 << 20)
    )
    slice_chunks: Annotated[
        Count, Meta(description="chunks hashed before other requests are served")
    ] = 32
    heartbeat_s: Annotated[
        Heartbeat,
        Meta(description="heartbeat of clients that cannot be watched by pidfd"),
    ] = 5.0

    def check(self) -> None:
        """Require room for the smallest requests."""
        size = self.max_message
        require(size >= 4096, "wire.max_message", size, "at least 4KiB")


class SessionConfig(Options, frozen=True):
    """Lifetime of sessions and leases."""

    idle_s: Annotated[
        float, Meta(description="seconds until a session without requests ends")
    ] = 600.0
    lease_s: Annotated[
        Seconds, Meta(description="seconds that found chunks are leased to a session")
    ] = 60.0
    max_sessions: Annotated[
        Count, Meta(description="limit of sessions; the longest idle end first")
    ] = 100_000

    def check(self) -> None:
        """Require that a lease ends no later than its session."""
        need = f"less than sessions.lease_s, {self.lease_s}"
        require(self.idle_s >= self.lease_s, "sessions.idle_s", self.idle_s, need)


class BlendConfig(Options, frozen=True):
    """Search for documents in prompts (`--engine blend`)."""

    matcher: Annotated[
        Literal["anywhere", "separated"],
        Meta(
            description="separated: documents are paragraphs between token patterns; "
            "anywhere: documents at any offset, and such paragraphs in tiers"
        ),
    ] = "anywhere"
    preset: Annotated[
        str, Meta(description="patterns of a model family (docs/blend.md)")
    ] = ""
    start: Annotated[
        Patterns, Meta(description="token ids after which a paragraph begins")
    ] = ()
    end: Annotated[
        Patterns, Meta(description="token ids before which a paragraph ends")
    ] = ()
    max_tier_chunks: Annotated[
        Count, Meta(description="anywhere: limit of known chunks in tiers, LRU")
    ] = 1 << 18
    keep: Annotated[
        str | None,
        Meta(description="anywhere: file that keeps the index across restarts"),
    ] = None

    def check(self) -> None:
        """Require a preset or patterns, not both, and a matcher that `keep` serves."""
        require(
            not (self.preset and (self.start or self.end)),
            "blend.preset", self.preset, "takes no blend.start or blend.end beside it",
        )  # fmt: skip
        require(
            self.keep is None or self.matcher == "anywhere",
            "blend.keep", self.keep, "blend.matcher = 'separated' has nothing to keep",
        )  # fmt: skip


class PrefetchConfig(Options, frozen=True):
    """Loads from tiers within lookups."""

    deadline_s: Annotated[
        Seconds, Meta(description="seconds that a lookup waits for tiers")
    ] = 1.0
    max_jobs: Annotated[
        Count, Meta(description="lookups that load at once; others use L1 alone")
    ] = 256
    max_bytes: Annotated[
        ByteSize, Meta(description="bytes loaded at once from one tier")
    ] = ByteSize(128 << 20)


class WriteBackConfig(Options, frozen=True):
    """Asynchronous writes from L1 to tiers."""

    policy: Annotated[
        WritePolicy, Meta(description="when a part is written to the tiers")
    ] = "write_through"
    max_bytes: Annotated[
        ByteSize, Meta(description="queue per tier; more is skipped and counted")
    ] = ByteSize(256 << 20)
    watermark: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="on_eviction: start to write when this share of L1 is used",
        ),
    ] = 0.8


class ServerConfig(Options, frozen=True):
    """All options of `kvctl serve`."""

    address: Annotated[
        str, Meta(description="tcp://HOST:PORT or ipc://PATH; port 0 takes a free one")
    ] = "tcp://127.0.0.1:5555"
    chunk_size: Annotated[
        Count,
        Meta(description="tokens per chunk; a multiple of every engine's block size"),
    ] = 256
    engine: Annotated[
        Literal["prefix", "blend"],
        Meta(description="blend also serves documents at any position (CB_ requests)"),
    ] = "prefix"
    copy_threads: Annotated[
        Count, Meta(description="threads per large copy in host memory")
    ] = 2
    blend: BlendConfig = BlendConfig()
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Meta(
            description="memory of engines' caches: cuda: GPUs and host; auto: cuda if "
            "there is a driver; cpu: host only"
        ),
    ] = "auto"
    l1: L1Config = L1Config()
    wire: WireConfig = WireConfig()
    sessions: SessionConfig = SessionConfig()
    tiers: Annotated[
        tuple[str, ...],
        Meta(description="URLs of tiers behind L1, in lookup order"),
    ] = ()
    prefetch: PrefetchConfig = PrefetchConfig()
    write_back: WriteBackConfig = WriteBackConfig()
    metrics_port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(description="port of Prometheus metrics"),
    ] = None
    metrics_host: Annotated[
        str, Meta(description="address of metrics; 0.0.0.0 for other hosts")
    ] = "127.0.0.1"
    record: Annotated[
        str | None,
        Meta(description="file that records lookups as hashes, for replay"),
    ] = None
    ready_file: Annotated[
        str | None, Meta(description="file that receives the bound address")
    ] = None
    log_level: Annotated[
        LogLevel, Meta(description="lowest level logged to stderr")
    ] = "info"

    def check(self) -> None:
        """Require a valid address, and for `blend.keep` a store that keeps chunks."""
        require(
            is_address(self.address),
            "address", self.address, "must be tcp://HOST:PORT or ipc://PATH",
        )  # fmt: skip
        require(
            self.blend.keep is None or bool(self.l1.keep or self.tiers),
            "blend.keep", self.blend.keep, "needs l1.keep or a tier",
        )  # fmt: skip


def is_address(text: str) -> bool:
    """Return whether a server can listen on this address."""
    if text.startswith("ipc://"):
        return len(text) > len("ipc://")
    match = re.fullmatch(r"tcp://(?:[^\s:/]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", text)
    return match is not None and int(match[1]) < 1 << 16
