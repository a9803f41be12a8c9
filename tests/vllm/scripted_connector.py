"""Both connector sides with a scripted server and block pool, for the state machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from typing import Any, cast

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
)

from kvcore.errors import ChunksMissing, DeadlineExceeded, Overloaded, Unavailable
from kvcore.keys import ExtraKey
from kvcore.protocol import LookupReply
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.connector_scheduler import ConnectorScheduler
from kvcore.vllm.kv_cache_groups import EngineGroup
from kvcore.vllm.step_metadata import LoadOp
from tests.vllm.fake_engine import Request
from tests.vllm.fake_ranks import (
    BLOCK,
    CORRUPT,
    KV,
    Blocks,
    Extras,
    Rank,
    extras_before,
    kv_of,
    without_reset,
)
from tests.vllm.scripted_link import LinkCall, ScriptedLink

CHUNKS, WINDOW = (4, 8), 4
ERRORS = (DeadlineExceeded, Unavailable, Overloaded, ChunksMissing)
OUTCOMES = st.sampled_from(["ok", "ok", "ok", "short", *ERRORS])
EXTRAS: tuple[Extras, ...] = (
    (),
    (),
    (),
    (ExtraKey(0, b"salt"),),
    (ExtraKey(0, b"lora"),),
    (ExtraKey(5, b"image"),),
)
WINDOWS = st.sampled_from(
    [
        (EngineGroup(BLOCK),),
        (EngineGroup(BLOCK), EngineGroup(BLOCK, WINDOW)),
        (EngineGroup(BLOCK), EngineGroup(BLOCK, WINDOW, is_chunked=True)),
    ]
)


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    """Return the first `length` tokens of a prompt."""
    return tuple(100 * number + i for i in range(length))


@dataclass(eq=False)
class RequestRecord:
    """The engine's state of a request."""

    request: Request
    state: str = "waiting"
    num_computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    is_aborted: bool = False
    has_pending_lookup: bool = False

    @property
    def name(self) -> str:
        """The request id, which an earlier request may have used."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Number of known tokens."""
        return len(self.request.tokens)


class ScriptedConnector(RuleBasedStateMachine):
    """Requests to the server and their replies, which only rules deliver."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, RequestRecord] = {}
        self.blocks = Blocks()
        self.weights = 0
        self.open_sessions: set[str] = set()
        self.loads: dict[str, LoadOp] = {}
        self.load_results: dict[str, list[bool]] = {}
        self.reported: Counter[str] = Counter()
        self.failed_blocks: dict[str, set[int]] = {}

    @initialize(
        groups=WINDOWS,
        num_ranks=st.integers(1, 2),
        num_stored=st.sampled_from([16, 8, 0]),
        recomputes=st.sampled_from([True, True, False]),
    )
    def build(
        self,
        groups: tuple[EngineGroup, ...],
        num_ranks: int,
        num_stored: int,
        recomputes: bool,
    ) -> None:
        """Create one or two ranks; a failed load is recomputed or fails its request."""
        self.groups, self.recomputes = groups, recomputes
        config, size = ConnectorConfig(), CHUNKS[0]
        self.ranks = [Rank(config, i, len(groups), size) for i in range(num_ranks)]
        self.link = ScriptedLink(size)
        self.scheduler = ConnectorScheduler(
            cast(Any, self.link),
            config,
            engine_id="engine",
            model="model",
            world_size=num_ranks,
            groups=groups,
            pool=self.blocks,
        )
        self.link.client.note = self.note_scheduler
        ends = range(size, num_stored + 1, size)
        for rank in self.ranks:
            rank.link.client.note = lambda call, rank=rank: self.note_rank(rank, call)
            for extras, prompt, end in product(EXTRAS, range(2), ends):
                rank.stored[extras_before(extras, end), prompt_of(prompt, end)] = 0

    def expected_kv(self, record: RequestRecord) -> KV:
        """Return the expected content of a request's last block."""
        tokens = record.request.tokens
        return kv_of(self.weights, record.request.extras, tokens, len(tokens))

    # -- the engine's blocks ----------------------------------------------------------

    def free(self, record: RequestRecord) -> None:
        """Remove the engine's references to a request's blocks."""
        ids = (block for ids in record.blocks for block in ids if block)
        self.blocks.refs.subtract(ids)
        record.blocks = []

    def grow(
        self, record: RequestRecord, end: int, first_needed: int = 0
    ) -> list[list[int]]:
        """Allocate a request's blocks up to token `end`; return the new ones."""
        more: list[list[int]] = []
        record.blocks = record.blocks or [[] for _ in self.groups]
        busy = {
            block
            for rank in self.ranks
            for call in rank.link.client.pending
            for block in call.real_blocks
        }
        for ids, group in zip(record.blocks, self.groups, strict=True):
            gone = group.num_skipped(first_needed)
            new: list[int] = []
            while len(ids) + len(new) < -(-end // BLOCK):
                if len(ids) + len(new) < gone:
                    new.append(0)
                    continue
                block = self.blocks.take()
                assert block not in busy, (
                    "a block that is being copied was allocated again"
                )
                for rank in self.ranks:
                    rank.content[block] = CORRUPT
                new.append(block)
            ids.extend(new)
            more.append(new)
        return more

    def move_window(self, record: RequestRecord) -> None:
        """Free the blocks before a group's window."""
        for ids, group in zip(record.blocks, self.groups, strict=True):
            for i in range(min(group.num_skipped(record.num_computed), len(ids))):
                if ids[i]:
                    self.blocks.refs[ids[i]] -= 1
                    ids[i] = 0

    # -- requests to the server -----------------------------------------------------

    def note_scheduler(self, call: LinkCall) -> None:
        """Check that lookups are sent once and sessions end after their copies."""
        if call.kind == "lookup":
            record = self.records[call.name]
            assert not record.has_pending_lookup
            record.has_pending_lookup = True
            self.open_sessions.add(call.name)
            return
        if call.kind == "end":
            assert not any(
                one.name == call.name
                for rank in self.ranks
                for one in rank.link.client.pending
            )
            assert call.name not in self.scheduler._tracked
            self.open_sessions.discard(call.name)
        call.future.set_result(None)

    def note_rank(self, rank: Rank, call: LinkCall) -> None:
        """Check a copy's tokens and blocks."""
        self.open_sessions.add(call.name)
        record = self.records.get(call.name)
        if record is not None:
            whole = tuple(record.request.tokens)
            assert call.tokens == whole[: len(call.tokens)]
            assert without_reset(call.extras) == record.request.extras
        assert len(call.tokens) >= call.end
        assert all(self.blocks.refs[block] > 0 for block in call.real_blocks)
        if call.kind == "store":
            assert not call.start % rank.link.chunk_size
            assert not call.end % rank.link.chunk_size
            rank.check_store(call)

    def end_lookup(self, call: LinkCall, outcome: Any, hit: int) -> None:
        """Complete a lookup with at most `hit` chunks that all ranks have."""
        if outcome in ERRORS:
            call.future.set_exception(outcome("scripted"))
            return
        size, n = self.link.chunk_size, 0
        while (
            n < hit
            and (n + 1) * size <= len(call.tokens)
            and all(rank.has(call, (n + 1) * size) for rank in self.ranks)
        ):
            n += 1
        call.future.set_result(LookupReply(n, n * size))

    def pending(self) -> list[tuple[Rank | None, LinkCall]]:
        """Return all pending requests, each with its rank."""
        waiting: list[tuple[Rank | None, LinkCall]] = [
            (None, call) for call in self.link.client.pending
        ]
        for rank in self.ranks:
            waiting += [(rank, call) for call in rank.link.client.pending]
        return waiting

    def end_one(
        self, rank: Rank | None, call: LinkCall, outcome: Any, hit: int
    ) -> None:
        """Complete a request of any kind."""
        if rank is None:
            self.end_lookup(call, outcome, hit)
        elif call.kind == "store":
            rank.end_store(call, outcome)
        else:
            is_complete = rank.end_retrieve(call, outcome)
            self.load_results.setdefault(call.name, []).append(is_complete)

    @rule(data=st.data(), outcome=OUTCOMES, hit=st.sampled_from([9, 9, 2, 1, 0]))
    def answer(self, data: st.DataObject, outcome: Any, hit: int) -> None:
        """Complete one request, in any order."""
        waiting = self.pending()
        if not waiting:
            return
        index = data.draw(st.integers(0, len(waiting) - 1))
        self.end_one(*waiting[index], outcome, hit)

    @rule(outcome=OUTCOMES)
    def answer_all(self, outcome: Any) -> None:
        """Complete all requests."""
        for rank, call in self.pending():
            self.end_one(rank, call, outcome, 9)

    @rule(chunk_size=st.sampled_from(CHUNKS), is_empty=st.booleans())
    def replace_server(self, chunk_size: int, is_empty: bool) -> None:
        """Replace the server, possibly with another chunk size or without chunks."""
        for rank, call in self.pending():
            self.end_one(rank, call, Unavailable, 0)
        for link in (self.link, *(rank.link for rank in self.ranks)):
            if chunk_size != link.chunk_size or is_empty:
                for rank in self.ranks:
                    rank.stored.clear()
            link.chunk_size, link.is_available = chunk_size, False

    @rule(which=st.integers(0, 2))
    def recover(self, which: int) -> None:
        """Make the server available to one link or to all."""
        links = [self.link, *(rank.link for rank in self.ranks)]
        for link in links[which : which + 1] or links:
            link.is_available = True
