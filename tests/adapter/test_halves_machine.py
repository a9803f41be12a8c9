"""Both halves under a scheduler like vLLM's; the played server ends what it likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from kvcore.errors import ChunksMissing, DeadlineExceeded, Overloaded, Unavailable
from kvcore.protocol import LookupReply, RetrieveReply, StoreReply
from kvcore.vllm.config import ConnectorConfig
from kvcore.vllm.plan import Load
from kvcore.vllm.scheduler import SchedulerHalf
from kvcore.vllm.tracked import GroupShape, Scheduled
from kvcore.vllm.worker import Registration, WorkerHalf
from tests.adapter.engine import Request
from tests.adapter.played import Asked, PlayedLink

BLOCK, CHUNKS, WINDOW, NUM_BLOCKS = 2, (4, 8), 4, 60
NAMES = "abcd"
Tokens = tuple[int, ...]
WRONG: Tokens = (-1,)
lengths = st.sampled_from([3, 4, 8, 9, 12, 16])
ERRORS = (DeadlineExceeded, Unavailable, Overloaded, ChunksMissing)
outcomes = st.sampled_from(["well", "well", "well", "short", *ERRORS])


def prompt_of(number: int, length: int) -> Tokens:
    """One of the prompts, or its beginning."""
    return tuple(100 * number + i for i in range(length))


@dataclass(eq=False)
class Life:
    """A request as the engine has it."""

    request: Request
    state: str = "waiting"
    num_computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    is_aborted: bool = False
    has_asked: bool = False

    @property
    def name(self) -> str:
        """Its name; another may have had it."""
        return self.request.request_id


class Rank:
    """A worker half and what its blocks hold: the tokens up to a block's end."""

    def __init__(self, config: ConnectorConfig, number: int, num_groups: int) -> None:
        self.link = PlayedLink(CHUNKS[0])
        self.worker = WorkerHalf(config, "engine", number)
        self.worker._link = cast(Any, self.link)
        self.worker._registration = Registration(
            cast(Any, None), tuple(range(num_groups))
        )
        self.content: dict[int, Tokens] = {}
        self.stored: set[Tokens] = set()

    def is_right(self, ids: Sequence[int], tokens: Tokens, end: int) -> bool:
        """Say whether blocks hold the whole blocks of tokens[:end]."""
        return all(
            self.content.get(ids[i]) == tokens[: (i + 1) * BLOCK]
            for i in range(end // BLOCK)
        )


class HalvesMachine(RuleBasedStateMachine):
    """Nothing ends but by a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.lives: dict[str, Life] = {}
        self.refs: Counter[int] = Counter()
        self.held: Counter[int] = Counter()
        self.open: set[str] = set()
        self.loads: dict[str, Load] = {}
        self.ends: dict[str, list[bool]] = {}
        self.reported: Counter[str] = Counter()
        self.failed_blocks: dict[str, set[int]] = {}
        self.sync_outcome: Any = "well"
        self.ends_behind = False

    @initialize(
        load=st.sampled_from(["async", "async", "sync"]),
        windowed=st.booleans(),
        num_ranks=st.integers(1, 2),
        num_stored=st.sampled_from([16, 8, 0]),
    )
    def build(self, load: str, windowed: bool, num_ranks: int, num_stored: int) -> None:
        """One or two ranks; a window only with asynchronous loads, as in vLLM."""
        self.is_sync = load == "sync"
        config = ConnectorConfig(load=cast(Any, load), load_timeout_s=1e-5)
        windows = (None, WINDOW) if windowed and not self.is_sync else (None,)
        self.windows: tuple[int | None, ...] = windows
        self.ranks = [Rank(config, i, len(windows)) for i in range(num_ranks)]
        self.link = PlayedLink(CHUNKS[0])
        self.half = SchedulerHalf(
            cast(Any, self.link),
            config,
            engine_id="engine",
            model="model",
            world_size=num_ranks,
            groups=[GroupShape(BLOCK, window) for window in windows],
            pool=self,
        )
        self.link.client.note = self.note_scheduler
        for rank in self.ranks:
            rank.link.client.note = lambda asked, rank=rank: self.note_rank(rank, asked)
            for prompt, end in product(range(2), range(4, num_stored + 1, 4)):
                rank.stored.add(prompt_of(prompt, end))

    # -- the engine's blocks ----------------------------------------------------------

    def hold(self, blocks: Sequence[int]) -> None:
        """Count up: blocks that somebody has."""
        assert all(self.refs[block] > 0 for block in blocks)
        self.refs.update(blocks)
        self.held.update(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Count down, once each."""
        self.held.subtract(blocks)
        assert all(count >= 0 for count in self.held.values())
        self.refs.subtract(blocks)

    def free(self, life: Life) -> None:
        """Take the engine's own references off."""
        self.refs.subtract(block for ids in life.blocks for block in ids if block)
        life.blocks = []

    def grow(self, life: Life, end: int, first_needed: int = 0) -> list[list[int]]:
        """Give a request blocks up to a token; return the new ones."""
        more: list[list[int]] = []
        life.blocks = life.blocks or [[] for _ in self.windows]
        busy = {
            block
            for rank in self.ranks
            for asked in rank.link.client.pending
            for block in asked.real_blocks
        }
        for ids, window in zip(life.blocks, self.windows, strict=True):
            gone = max(first_needed - window + 1, 0) // BLOCK if window else 0
            new: list[int] = []
            while len(ids) + len(new) < -(-end // BLOCK):
                if len(ids) + len(new) < gone:
                    new.append(0)
                    continue
                block = next(b for b in range(1, NUM_BLOCKS * 4) if not self.refs[b])
                assert block not in busy, "a block was given away that is being copied"
                self.refs[block] = 1
                for rank in self.ranks:
                    rank.content[block] = WRONG
                new.append(block)
            ids.extend(new)
            more.append(new)
        return more

    def move_window(self, life: Life) -> None:
        """Free what a window has left behind."""
        for ids, window in zip(life.blocks, self.windows, strict=True):
            if window is None:
                continue
            for i in range(max(life.num_computed - window + 1, 0) // BLOCK):
                if ids[i]:
                    self.refs[ids[i]] -= 1
                    ids[i] = 0

    # -- what the server is asked -----------------------------------------------------

    def note_scheduler(self, asked: Asked) -> None:
        """A lookup is asked once for one wait, a session ended after its copies."""
        if asked.kind == "lookup":
            life = self.lives[asked.name]
            assert not life.has_asked
            life.has_asked = True
            self.open.add(asked.name)
            return
        if asked.kind == "end":
            assert not any(
                one.name == asked.name
                for rank in self.ranks
                for one in rank.link.client.pending
            )
            assert asked.name not in self.half._tracked
            self.open.discard(asked.name)
        asked.future.set_result(None)

    def note_rank(self, rank: Rank, asked: Asked) -> None:
        """A copy names tokens, and blocks that hold them or are for them."""
        self.open.add(asked.name)
        life = self.lives.get(asked.name)
        if life is not None:
            whole = tuple(life.request.tokens)
            assert asked.tokens == whole[: len(asked.tokens)]
        assert len(asked.tokens) >= asked.end
        for block in asked.real_blocks:
            assert self.refs[block] > 0
        if asked.kind == "store":
            self.check_store(rank, asked)
        elif self.is_sync and self.sync_outcome != "late":
            self.end_retrieve(rank, asked, self.sync_outcome)

    def check_store(self, rank: Rank, asked: Asked) -> None:
        """What is stored has been computed."""
        first = asked.start // BLOCK
        for ids in asked.blocks:
            assert len(ids) == (asked.end - asked.start) // BLOCK
            for i, block in enumerate(ids, first):
                if block >= 0:
                    assert rank.content[block] == asked.tokens[: (i + 1) * BLOCK]

    def end_store(self, rank: Rank, asked: Asked, outcome: Any) -> None:
        """A store's blocks are the same at its end."""
        if outcome not in ("well", "short"):
            asked.future.set_exception(outcome("played"))
            return
        self.check_store(rank, asked)
        size = rank.link.chunk_size
        for end in range(asked.start + size, asked.end + 1, size):
            lo, hi = (end - size - asked.start) // BLOCK, (end - asked.start) // BLOCK
            if all(block >= 0 for ids in asked.blocks for block in ids[lo:hi]):
                rank.stored.add(asked.tokens[:end])
        asked.future.set_result(StoreReply(0, 0, 0))

    def end_retrieve(self, rank: Rank, asked: Asked, outcome: Any) -> None:
        """Write the blocks, or some of them.

        Those of a synchronous load may have been computed by now, and stay right.
        """
        first = asked.start // BLOCK
        is_there = all(
            asked.tokens[:end] in rank.stored
            for end in range(
                asked.start + rank.link.chunk_size,
                asked.end + 1,
                rank.link.chunk_size,
            )
        )
        if outcome == "well" and not is_there:
            outcome = ChunksMissing
        for ids in asked.blocks:
            for i, block in enumerate(ids):
                if block >= 0 and i * BLOCK >= asked.skip:
                    end = (first + i + 1) * BLOCK
                    if outcome == "well":
                        rank.content[block] = asked.tokens[:end]
                    elif not self.is_sync:
                        rank.content[block] = WRONG
        num_tokens = asked.end - asked.start - asked.skip
        self.ends.setdefault(asked.name, []).append(outcome == "well")
        if outcome == "well":
            asked.future.set_result(RetrieveReply(num_tokens))
        elif outcome == "short":
            asked.future.set_result(RetrieveReply(num_tokens - 1))
        else:
            asked.future.set_exception(outcome("played"))

    def end_lookup(self, asked: Asked, outcome: Any, hit: int) -> None:
        """Answer with at most what all ranks have."""
        if outcome in ERRORS:
            asked.future.set_exception(outcome("played"))
            return
        size, n = self.link.chunk_size, 0
        while n < hit and all(
            asked.tokens[: (n + 1) * size] in rank.stored
            and (n + 1) * size <= len(asked.tokens)
            for rank in self.ranks
        ):
            n += 1
        asked.future.set_result(LookupReply(n, n * size))

    def pending(self) -> list[tuple[Rank | None, Asked]]:
        """Everything that waits for an end."""
        waiting: list[tuple[Rank | None, Asked]] = [
            (None, asked) for asked in self.link.client.pending
        ]
        for rank in self.ranks:
            waiting += [(rank, asked) for asked in rank.link.client.pending]
        return waiting

    def end_one(self, rank: Rank | None, asked: Asked, outcome: Any, hit: int) -> None:
        """End a request of any kind."""
        if rank is None:
            self.end_lookup(asked, outcome, hit)
        elif asked.kind == "store":
            self.end_store(rank, asked, outcome)
        else:
            self.end_retrieve(rank, asked, outcome)

    @rule(data=st.data(), outcome=outcomes, hit=st.sampled_from([9, 9, 2, 1, 0]))
    def answer(self, data: st.DataObject, outcome: Any, hit: int) -> None:
        """The server ends one, in any order."""
        waiting = self.pending()
        if not waiting:
            return
        index = data.draw(st.integers(0, len(waiting) - 1))
        self.end_one(*waiting[index], outcome, hit)

    @rule()
    def answer_all(self) -> None:
        """The server is quick."""
        for rank, asked in self.pending():
            self.end_one(rank, asked, "well", 9)

    @rule(chunk_size=st.sampled_from(CHUNKS), is_empty=st.booleans())
    def replace_server(self, chunk_size: int, is_empty: bool) -> None:
        """Another one is at the address, maybe with other chunks, or empty."""
        for rank, asked in self.pending():
            self.end_one(rank, asked, Unavailable, 0)
        for link in (self.link, *(rank.link for rank in self.ranks)):
            if chunk_size != link.chunk_size or is_empty:
                for rank in self.ranks:
                    rank.stored.clear()
            link.chunk_size, link.is_well = chunk_size, False

    @rule(which=st.integers(0, 2))
    def recover(self, which: int) -> None:
        """A link finds the server well, or all do."""
        links = [self.link, *(rank.link for rank in self.ranks)]
        for link in links[which : which + 1] or links:
            link.is_well = True

    # -- what the engine does ---------------------------------------------------------

    @rule(data=st.data(), prompt=st.integers(0, 1), length=lengths)
    def add(self, data: st.DataObject, prompt: int, length: int) -> None:
        """A request comes, of a name that is not in use."""
        names = [name for name in NAMES if name not in self.lives]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        self.lives[name] = Life(Request(name, list(prompt_of(prompt, length))))

    @rule(data=st.data(), num_steps=st.integers(1, 3), outcome=outcomes)
    def find(self, data: st.DataObject, num_steps: int, outcome: Any) -> None:
        """A request comes and finds what there is; then steps are made."""
        self.add(data, data.draw(st.integers(0, 1)), data.draw(lengths))
        for life in self.lives.values():
            if life.state == "waiting":
                self.half.matched(life.request, 0)
        for asked in self.link.client.pending:
            self.end_lookup(asked, "well", 9)
        for _ in range(num_steps):
            self.step(data, num_steps == 3, outcome)

    @rule(data=st.data(), late=st.booleans(), outcome=outcomes)
    def step(self, data: st.DataObject, late: bool, outcome: Any) -> None:
        """Schedule what goes on and what waits, compute it, store it."""
        self.sync_outcome = "late" if late else outcome
        self.ends_behind = late and outcome == "well"
        scheduled = []
        for life in list(self.lives.values()):
            if data.draw(st.integers(0, 4)) == 4:
                continue
            num_new = data.draw(st.sampled_from([16, 16, 8, 5, 1]))
            if life.state == "running":
                scheduled.append(self.go_on(life, num_new))
            elif life.state == "ready":
                self.grow(life, life.num_computed + num_new)
                scheduled.append(self.all_of(life, num_new))
            elif life.state == "waiting":
                scheduled.append(self.start(life, num_new, data))
        ones = [one for one in scheduled if one is not None]
        for one in ones:
            self.move_window(self.lives[one.request_id])
        self.run_step(ones)

    def go_on(self, life: Life, num_new: int) -> Scheduled:
        """Schedule more of a running request, maybe with drafts."""
        num_new = min(num_new, len(life.request.tokens) + 2 - life.num_computed)
        more = self.grow(life, life.num_computed + num_new)
        new = tuple(more) if any(more) else None
        return Scheduled(life.name, life.num_computed, num_new, new, False)

    def all_of(self, life: Life, num_new: int) -> Scheduled:
        """Schedule a new or resumed request."""
        life.state = "running"
        num_new = max(min(num_new, len(life.request.tokens) - life.num_computed), 1)
        self.grow(life, life.num_computed + num_new)
        blocks = tuple(list(ids) for ids in life.blocks)
        return Scheduled(life.name, life.num_computed, num_new, blocks, True)

    def start(self, life: Life, num_new: int, data: st.DataObject) -> Scheduled | None:
        """Ask what can be loaded, and begin if that is known and there is room."""
        shared = self.shared(life) if data.draw(st.booleans()) else []
        num_local = len(shared) * BLOCK
        matched = self.half.matched(life.request, num_local)
        if matched is None or data.draw(st.integers(0, 3)) == 3:
            return None
        if shared:
            life.blocks = [list(shared)]
            self.refs.update(shared)
        life.num_computed = num_local + matched
        num_new = max(min(num_new, len(life.request.tokens) - life.num_computed), 1)
        is_loading = matched > 0 and not self.is_sync
        end = life.num_computed + (0 if is_loading else num_new)
        self.grow(life, end, life.num_computed)
        blocks = tuple(list(ids) for ids in life.blocks)
        life.has_asked = False
        self.half.allocated(life.name, blocks, matched)
        if is_loading:
            life.state = "loading"
            return None
        return self.all_of(life, num_new)

    def shared(self, life: Life) -> list[int]:
        """Find blocks that another request has computed, as vLLM's prefix cache."""
        tokens = tuple(life.request.tokens)
        best: list[int] = []
        if len(self.windows) > 1:
            return best
        for other in self.lives.values():
            if other.state != "running":
                continue
            n = min(other.num_computed, len(tokens) - 1) // BLOCK
            while n and tokens[: n * BLOCK] != tuple(other.request.tokens[: n * BLOCK]):
                n -= 1
            best = max(best, other.blocks[0][:n], key=len)
        return best

    def run_step(self, scheduled: list[Scheduled]) -> None:
        """Do what every worker does in a step."""
        plan = self.half.step(scheduled)
        for load in plan.loads:
            self.loads[load.request_id] = load
            self.ends[load.request_id] = []
        for rank in self.ranks:
            rank.worker.learn(plan)
            rank.worker.load(plan)
        for one in scheduled:
            self.compute(one)
        for rank in self.ranks:
            rank.worker.store(plan)
            rank.worker.forget(plan.ended)
        for one in scheduled:
            life = self.lives[one.request_id]
            num_tokens = len(life.request.tokens)
            life.num_computed = min(one.num_computed + one.num_new, num_tokens)
        if self.is_sync and self.ends_behind:
            self.answer_all()
        if self.is_sync:
            self.collect_sync()
        for one in scheduled:
            life = self.lives[one.request_id]
            if life.num_computed == len(life.request.tokens) < 24:
                life.request.tokens.append(1000 + life.num_computed)

    def compute(self, one: Scheduled) -> None:
        """Fill the blocks of a step's tokens; after any rank's wrong ones come such."""
        life = self.lives[one.request_id]
        known = tuple(life.request.tokens)
        end = one.num_computed + one.num_new
        tokens = known + (-2,) * max(end - len(known), 0)
        ranks, ids = self.ranks, life.blocks[0]
        right = all(rank.is_right(ids, known, one.num_computed) for rank in ranks)
        begun = one.num_computed // BLOCK
        if one.num_computed % BLOCK:
            right = right and all(
                rank.content[ids[begun]][: one.num_computed]
                == known[: one.num_computed]
                for rank in ranks
            )
        for rank, ids in product(ranks, life.blocks):
            for i in range(begun, -(-end // BLOCK)):
                if ids[i]:
                    upto = tokens[: min(end, (i + 1) * BLOCK)]
                    # What another has computed behind these tokens stays.
                    if not right:
                        rank.content[ids[i]] = WRONG
                    elif rank.content[ids[i]][: len(upto)] != upto:
                        rank.content[ids[i]] = upto

    def collect_sync(self) -> None:
        """Take a step's output: what failed loads spoilt is computed anew."""
        failed: set[int] = set()
        for rank in self.ranks:
            collected = rank.worker.collect()
            assert not collected.loaded
            failed |= collected.failed_blocks
            self.half.acknowledged(collected.acks, collected.failed)
        for life in self.lives.values():
            bad = [i for ids in life.blocks for i, b in enumerate(ids) if b in failed]
            if bad and life.state == "running":
                life.num_computed = min(life.num_computed, min(bad) * BLOCK)
        self.check_computed()

    @rule(which=st.integers(0, 2))
    def collect(self, which: int) -> None:
        """A worker's results come late; a load has ended when all say so."""
        if self.is_sync:
            return  # Each step's are taken with its output.
        for rank in self.ranks[which : which + 1] or self.ranks:
            collected = rank.worker.collect()
            for name in collected.loaded:
                self.reported[name] += 1
                assert self.reported[name] <= len(self.ranks)
            for name in collected.failed:
                assert name in collected.loaded
            assert bool(collected.failed) == bool(collected.failed_blocks)
            for name in collected.failed:
                load = self.loads[name]
                life = self.lives[name]
                first = (load.start + load.skip) // BLOCK
                blocks = {b for ids in life.blocks for b in ids[first:] if b}
                assert blocks <= collected.failed_blocks
                collected.failed_blocks -= blocks
                self.failed_blocks[name] = blocks
            assert not collected.failed_blocks
            self.half.acknowledged(collected.acks, collected.failed)
        for name, count in list(self.reported.items()):
            if count == len(self.ranks):
                del self.reported[name]
                self.end_load(self.lives[name])

    def end_load(self, life: Life) -> None:
        """Every rank has reported: the request goes on, or its blocks are free."""
        assert life.state == "loading"
        load, ends = self.loads.pop(life.name), self.ends.pop(life.name)
        is_well = ends.count(True) == len(self.ranks)
        assert is_well != (life.name in self.failed_blocks)
        if self.failed_blocks.pop(life.name, None):
            life.num_computed = load.start + load.skip
        life.num_computed = min(life.num_computed, len(life.request.tokens) - 1)
        life.state = "ready"
        if life.is_aborted:
            del self.lives[life.name]
            self.free(life)

    @rule(data=st.data(), times=st.integers(1, 2))
    def finish(self, data: st.DataObject, times: int) -> None:
        """A request ends or is aborted at any moment; the engine may say so twice."""
        if not self.lives:
            return
        name = data.draw(st.sampled_from(sorted(self.lives)))
        life = self.lives[name]
        if life.state == "loading":
            life.is_aborted = True
            self.half.finished(name)
        else:
            del self.lives[name]
            for _ in range(times):
                self.half.finished(name)
            self.free(life)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """A request loses its blocks and waits again."""
        running = [n for n, life in self.lives.items() if life.state == "running"]
        if not running:
            return
        life = self.lives[data.draw(st.sampled_from(running))]
        self.free(life)
        life.state, life.num_computed = "waiting", 0

    # -- what holds at any time -------------------------------------------------------

    @invariant()
    def check_computed(self) -> None:
        """What the engine takes for computed is right."""
        for life in self.lives.values():
            if life.state in ("running", "ready"):
                whole = life.num_computed - life.num_computed % BLOCK
                tokens = tuple(life.request.tokens)
                for rank in self.ranks:
                    assert rank.is_right(life.blocks[0], tokens, whole)

    @invariant()
    def check_held(self) -> None:
        """The blocks of every copy under way are somebody's."""
        for _, asked in self.pending():
            assert all(self.refs[block] > 0 for block in asked.real_blocks)

    def teardown(self) -> None:
        """When all has ended nothing is left anywhere."""
        if not hasattr(self, "half"):
            return
        self.run_step([])
        self.answer_all()
        for name in sorted(self.lives):
            if not self.lives[name].is_aborted:
                self.half.finished(name)
            if self.lives[name].state != "loading":
                self.free(self.lives.pop(name))
            else:
                self.lives[name].is_aborted = True
        if self.is_sync:
            self.collect_sync()
        else:
            self.collect(len(self.ranks))
        self.run_step([])
        assert not self.lives
        assert self.half.num_ops == 0
        assert not self.half._tracked
        assert not +self.held
        assert not +self.refs
        assert not self.open
        for rank in self.ranks:
            assert rank.worker.num_under_way == 0
            assert not rank.worker._tokens


TestHalves = HalvesMachine.TestCase
# An example takes two milliseconds.
TestHalves.settings = settings(
    max_examples=2 * settings().max_examples, stateful_step_count=40
)
