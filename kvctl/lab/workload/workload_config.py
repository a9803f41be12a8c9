"""What engines are asked, as a scenario's `[workload]` declares it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kvcore.options import Options, require

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Vocabulary = Annotated[int, Meta(ge=2, description="different token ids")]


class SharedPrefix(Options, frozen=True, tag="shared_prefix", tag_field="kind"):
    """Requests that begin with one of a few long prefixes and end on their own."""

    num_requests: Positive = 100
    num_prefixes: Positive = 4
    prefix_tokens: Positive = 2048
    suffix_tokens: Annotated[
        int, Meta(ge=1, description="mean; drawn evenly from half to one and a half")
    ] = 512
    output_tokens: Count = 0
    vocabulary: Vocabulary = 32_000


class Chat(Options, frozen=True, tag="chat", tag_field="kind"):
    """Sessions of several turns; each turn resends all before it, answers included."""

    num_sessions: Positive = 16
    turns: Positive = 4
    system_tokens: Annotated[int, Meta(ge=0, description="shared by all")] = 512
    user_tokens: Positive = 256
    answer_tokens: Positive = 256
    vocabulary: Vocabulary = 32_000


class Rag(Options, frozen=True, tag="rag", tag_field="kind"):
    """Questions behind a few documents each, some documents far more asked for."""

    num_requests: Positive = 100
    system_tokens: Count = 256
    num_documents: Positive = 200
    document_tokens: Positive = 512
    documents_per_request: Positive = 4
    skew: Annotated[
        float, Meta(ge=0, description="of the documents' popularity (Zipf); 0: none")
    ] = 1.0
    ordered: Annotated[
        bool,
        Meta(description="documents in one order everywhere, so that prefixes meet"),
    ] = False
    question_tokens: Positive = 64
    output_tokens: Count = 128
    vocabulary: Vocabulary = 32_000

    def check(self) -> None:
        """There are as many documents as a request names."""
        require(
            self.documents_per_request <= self.num_documents,
            "workload.documents_per_request",
            self.documents_per_request,
            f"at most workload.num_documents, {self.num_documents}",
        )


class Agents(Options, frozen=True, tag="agents", tag_field="kind"):
    """Sessions whose context grows with every tool call; subagents share a part."""

    num_sessions: Positive = 8
    steps: Positive = 12
    system_tokens: Annotated[int, Meta(ge=0, description="and tools; shared")] = 4096
    task_tokens: Positive = 512
    result_tokens: Annotated[
        int, Meta(ge=1, description="of a tool, mean; drawn from an exponential")
    ] = 512
    answer_tokens: Positive = 128
    subagents: Annotated[
        int, Meta(ge=0, description="forked off half-way, with half the context")
    ] = 0
    vocabulary: Vocabulary = 32_000


class Uniform(Options, frozen=True, tag="uniform", tag_field="kind"):
    """Each request repeats any of so many prompts, all equally likely."""

    num_requests: Positive = 100
    num_prompts: Positive = 50
    prompt_tokens: Positive = 2048
    output_tokens: Count = 0
    vocabulary: Vocabulary = 32_000


class Thrash(Options, frozen=True, tag="thrash", tag_field="kind"):
    """Prompts asked for in a circle: with one too many for its room, LRU never hits."""

    num_requests: Positive = 100
    num_prompts: Positive = 50
    prompt_tokens: Positive = 2048
    vocabulary: Vocabulary = 32_000


class Giant(Options, frozen=True, tag="giant", tag_field="kind"):
    """Now and then one giant prompt among small ones that repeat."""

    num_requests: Positive = 100
    every: Annotated[int, Meta(ge=1, description="requests to a giant one")] = 25
    giant_tokens: Positive = 131_072
    num_prompts: Annotated[int, Meta(ge=1, description="small ones")] = 20
    prompt_tokens: Positive = 1024
    output_tokens: Count = 0
    vocabulary: Vocabulary = 32_000


class Reuse(Options, frozen=True):
    """For traces of lengths alone: who continues whose prompt."""

    share: Annotated[
        Share, Meta(description="of requests that continue an earlier one, if any fits")
    ] = 0.5
    system_tokens: Annotated[int, Meta(ge=0, description="shared by all")] = 512
    sessions: Annotated[int, Meta(ge=1, description="open at a time")] = 64


class Trace(Options, frozen=True, tag="trace", tag_field="kind"):
    """Replay of a trace file, or of a folder of them."""

    trace: Annotated[str | None, Meta(description="file; --trace sets it")] = None
    format: Annotated[
        Literal["auto", "mooncake", "bailian", "weka", "ragpulse", "azure", "burstgpt"],
        Meta(description="auto looks at the file's first line"),
    ] = "auto"
    block_size: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="tokens a hash id, where neither row nor format says"),
    ] = None
    max_requests: Positive | None = None
    reuse: Annotated[Reuse, Meta(description="of azure and burstgpt")] = Reuse()

    def check(self) -> None:
        """A trace is named."""
        require(bool(self.trace), "workload.trace", self.trace, "give --trace FILE")


class Documents(Options, frozen=True, tag="documents", tag_field="kind"):
    """Documents in random order between glue, for servers that blend; or RAGPulse's."""

    trace: Annotated[
        str | None, Meta(description="folder of a RAGPulse trace; --trace sets it")
    ] = None
    max_requests: Positive | None = None
    num_requests: Positive = 100
    system_tokens: Annotated[int, Meta(ge=0, description="shared by all")] = 256
    num_documents: Positive = 100
    document_tokens: Annotated[
        int, Meta(ge=1, description="mean; drawn evenly from half to one and a half")
    ] = 512
    documents_per_request: Positive = 4
    glue_tokens: Annotated[
        int, Meta(ge=1, description="mean, around documents; never the same twice")
    ] = 32
    vocabulary: Vocabulary = 32_000

    def check(self) -> None:
        """There are as many documents as a request names."""
        require(
            self.documents_per_request <= self.num_documents,
            "workload.documents_per_request",
            self.documents_per_request,
            f"at most workload.num_documents, {self.num_documents}",
        )


Workload = (
    SharedPrefix | Chat | Rag | Agents | Uniform | Thrash | Giant | Trace | Documents
)
