"""A scenario: the server, the model, the engines, what they are asked, and limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from kvcore.config import ServerConfig
from kvcore.options import Options, load, require
from kvctl.lab.geometry import Geometry, preset

Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]


class ModelConfig(Options, frozen=True):
    """A preset of `kvctl.lab.geometry`, and what differs from it."""

    preset: str
    num_layers: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    dtype: str | None = None
    block_size: Positive | None = None
    window: Positive | None = None
    cache_shape: str | None = None

    def check(self) -> None:
        """The preset exists."""
        preset(self.preset)

    def geometry(self) -> Geometry:
        """Return the preset with what was overridden."""
        given = {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if name != "preset" and value is not None
        }
        return replace(preset(self.preset), **given)


class SharedPrefix(Options, frozen=True, tag="shared_prefix", tag_field="kind"):
    """Requests that begin with one of a few long prefixes and end on their own."""

    num_requests: Positive = 100
    num_prefixes: Positive = 4
    prefix_tokens: Positive = 2048
    suffix_tokens: Annotated[
        int, Meta(ge=1, description="mean; drawn evenly from half to one and a half")
    ] = 512
    vocabulary: Positive = 32_000


class Chat(Options, frozen=True, tag="chat", tag_field="kind"):
    """Sessions of several turns; each turn resends all before it, answers included."""

    num_sessions: Positive = 16
    turns: Positive = 4
    system_tokens: Annotated[int, Meta(ge=0, description="shared by all")] = 512
    user_tokens: Positive = 256
    answer_tokens: Positive = 256
    vocabulary: Positive = 32_000


class Mooncake(Options, frozen=True, tag="mooncake", tag_field="kind"):
    """Replay of a trace in Mooncake's JSONL."""

    trace: Annotated[str | None, Meta(description="file; --trace sets it")] = None
    block_size: Annotated[
        int, Meta(ge=2, description="tokens a hash id, where a row names none")
    ] = 512
    max_requests: Positive | None = None

    def check(self) -> None:
        """A trace is named."""
        require(bool(self.trace), "workload.trace", self.trace, "give --trace FILE")


Workload = SharedPrefix | Chat | Mooncake


class ClosedLoop(Options, frozen=True, tag="closed", tag_field="kind"):
    """Each engine keeps so many requests under way."""

    concurrency: Annotated[int, Meta(ge=1, le=256, description="per engine")] = 4
    max_s: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="begin no request after so long"),
    ] = None


class Limits(Options, frozen=True):
    """What a run must reach; missing one is exit code 1."""

    max_errors: Annotated[int, Meta(ge=0)] = 0
    min_hit_rate: Annotated[Share | None, Meta(description="of prompt tokens")] = None
    min_share_of_ideal: Annotated[
        Share | None, Meta(description="token hits, against an endless cache")
    ] = None


class Scenario(Options, frozen=True):
    """One experiment, as `scenarios/*.toml` declares it."""

    model: ModelConfig
    workload: Workload
    question: Annotated[str, Meta(description="what a run of it answers")] = ""
    engines: Annotated[int, Meta(ge=1, le=64)] = 1
    ranks: Annotated[int, Meta(ge=1, le=64, description="workers an engine")] = 1
    cache_blocks: Annotated[
        int, Meta(ge=1, description="blocks of each rank's paged cache, a group")
    ] = 1024
    server: ServerConfig = ServerConfig()
    load: ClosedLoop = ClosedLoop()
    limits: Limits = Limits()

    def check(self) -> None:
        """Ranks can share the heads, and blocks make up chunks."""
        geometry = self.model.geometry()
        geometry.groups(1, 0, self.ranks)
        require(
            self.server.chunk_size % geometry.block_size == 0,
            "server.chunk_size",
            self.server.chunk_size,
            f"a multiple of model.block_size, {geometry.block_size}",
        )


def read(path: Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario file; `SetupError` names file, key and the nearest known one."""
    return load(Scenario, path, overrides)
