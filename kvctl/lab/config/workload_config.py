"""Prompts of the engines, as declared in a scenario's `[workload]`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kvcore.option_structs import Options, require

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Vocabulary = Annotated[int, Meta(ge=2, description="number of token ids")]


def _require_documents(per_request: int, num_documents: int) -> None:
    need = f"at most workload.num_documents, {num_documents}"
    fits = per_request <= num_documents
    require(fits, "workload.documents_per_request", per_request, need)


class SharedPrefix(Options, frozen=True, tag="shared_prefix", tag_field="kind"):
    """Requests with one of a few long shared prefixes and a unique suffix."""

    num_requests: Positive = 100
    num_prefixes: Positive = 4
    prefix_tokens: Positive = 2048
    suffix_tokens: Annotated[
        int, Meta(ge=1, description="mean; uniform from 0.5 to 1.5 of it")
    ] = 512
    output_tokens: Count = 0
    vocabulary: Vocabulary = 32_000


class Chat(Options, frozen=True, tag="chat", tag_field="kind"):
    """Sessions of several turns; each turn resends all previous ones with answers."""

    num_sessions: Positive = 16
    turns: Positive = 4
    system_tokens: Annotated[int, Meta(ge=0, description="shared by all")] = 512
    user_tokens: Positive = 256
    answer_tokens: Positive = 256
    vocabulary: Vocabulary = 32_000


class Rag(Options, frozen=True, tag="rag", tag_field="kind"):
    """Questions after a few documents each; popularity follows Zipf's law."""

    num_requests: Positive = 100
    system_tokens: Count = 256
    num_documents: Positive = 200
    document_tokens: Positive = 512
    documents_per_request: Positive = 4
    skew: Annotated[
        float, Meta(ge=0, description="Zipf exponent of popularity; 0: uniform")
    ] = 1.0
    ordered: Annotated[
        bool, Meta(description="documents in one global order, which shares prefixes")
    ] = False
    question_tokens: Positive = 64
    output_tokens: Count = 128
    vocabulary: Vocabulary = 32_000

    def check(self) -> None:
        """Raise `SetupError` if a request needs more documents than exist."""
        _require_documents(self.documents_per_request, self.num_documents)


class Agents(Options, frozen=True, tag="agents", tag_field="kind"):
    """Sessions whose context grows per tool call; subagents share a part of it."""

    num_sessions: Positive = 8
    steps: Positive = 12
    system_tokens: Annotated[int, Meta(ge=0, description="shared by all")] = 4096
    task_tokens: Positive = 512
    result_tokens: Annotated[
        int, Meta(ge=1, description="mean of a tool's result, exponential distribution")
    ] = 512
    answer_tokens: Positive = 128
    subagents: Annotated[
        int, Meta(ge=0, description="forked halfway, with half the context")
    ] = 0
    vocabulary: Vocabulary = 32_000


class Uniform(Options, frozen=True, tag="uniform", tag_field="kind"):
    """Each request repeats one of `num_prompts` prompts, all equally likely."""

    num_requests: Positive = 100
    num_prompts: Positive = 50
    prompt_tokens: Positive = 2048
    output_tokens: Count = 0
    vocabulary: Vocabulary = 32_000


class Thrash(Options, frozen=True, tag="thrash", tag_field="kind"):
    """Prompts in cyclic order: LRU never hits if one prompt does not fit."""

    num_requests: Positive = 100
    num_prompts: Positive = 50
    prompt_tokens: Positive = 2048
    vocabulary: Vocabulary = 32_000


class Giant(Options, frozen=True, tag="giant", tag_field="kind"):
    """Repeated small prompts, and periodically one very long prompt."""

    num_requests: Positive = 100
    every: Annotated[int, Meta(ge=1, description="requests per long prompt")] = 25
    giant_tokens: Positive = 131_072
    num_prompts: Annotated[int, Meta(ge=1, description="number of small prompts")] = 20
    prompt_tokens: Positive = 1024
    output_tokens: Count = 0
    vocabulary: Vocabulary = 32_000


class Reuse(Options, frozen=True):
    """Prompt reuse that is generated for traces which record lengths only."""

    share: Annotated[
        Share, Meta(description="of requests that extend an earlier prompt")
    ] = 0.5
    system_tokens: Annotated[int, Meta(ge=0, description="shared by all")] = 512
    sessions: Annotated[int, Meta(ge=1, description="open at the same time")] = 64


class Trace(Options, frozen=True, tag="trace", tag_field="kind"):
    """Replay of a trace file, or of a folder of trace files."""

    trace: Annotated[str | None, Meta(description="file; --trace sets it")] = None
    format: Annotated[
        Literal["auto", "mooncake", "bailian", "weka", "ragpulse", "azure", "burstgpt"],
        Meta(description="auto: detected from the first line"),
    ] = "auto"
    block_size: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="tokens per hash id, where neither row nor format defines it"),
    ] = None
    max_requests: Positive | None = None
    reuse: Annotated[Reuse, Meta(description="of azure and burstgpt")] = Reuse()

    def check(self) -> None:
        """Raise `SetupError` unless a trace is given."""
        require(bool(self.trace), "workload.trace", self.trace, "give --trace FILE")


class Documents(Options, frozen=True, tag="documents", tag_field="kind"):
    """Documents in random order between unique text, or a RAGPulse trace (blend)."""

    trace: Annotated[
        str | None, Meta(description="folder of a RAGPulse trace; --trace sets it")
    ] = None
    max_requests: Positive | None = None
    num_requests: Positive = 100
    system_tokens: Annotated[int, Meta(ge=0, description="shared by all")] = 256
    num_documents: Positive = 100
    document_tokens: Annotated[
        int, Meta(ge=1, description="mean; uniform from 0.5 to 1.5 of it")
    ] = 512
    documents_per_request: Positive = 4
    glue_tokens: Annotated[
        int, Meta(ge=1, description="mean of the unique text around documents")
    ] = 32
    vocabulary: Vocabulary = 32_000

    def check(self) -> None:
        """Raise `SetupError` if a request needs more documents than exist."""
        _require_documents(self.documents_per_request, self.num_documents)


GeneratedWorkload = SharedPrefix | Chat | Rag | Agents | Uniform | Thrash | Giant
Workload = GeneratedWorkload | Trace | Documents
