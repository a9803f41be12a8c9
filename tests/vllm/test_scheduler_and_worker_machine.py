"""Both halves under a scheduler like vLLM's; the played server ends what it likes."""

from __future__ import annotations

from itertools import product
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from kvcore.vllm.step_metadata import ScheduledRequest
from tests.vllm.fake_engine import Request
from tests.vllm.fake_ranks import BLOCK, WRONG, Extras, kv
from tests.vllm.scripted_halves import EXTRAS, OUTCOMES, Life, ScriptedHalves, prompt_of

MOST_TOKENS = 24
NAMES = "abcd"
LENGTHS = st.sampled_from([3, 4, 8, 9, 12, 16])


class HalvesMachine(ScriptedHalves):
    """Requests come and go, are scheduled, preempted, aborted; weights change."""

    # -- what the engine does ---------------------------------------------------------

    @rule(
        data=st.data(),
        prompt=st.integers(0, 1),
        length=LENGTHS,
        extras=st.sampled_from(EXTRAS),
    )
    def add(
        self, data: st.DataObject, prompt: int, length: int, extras: Extras
    ) -> None:
        """A request comes, of a name that is not in use."""
        names = [name for name in NAMES if name not in self.lives]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        request = Request(name, list(prompt_of(prompt, length)), extras)
        self.lives[name] = Life(request)

    @rule(data=st.data(), extras=st.sampled_from(EXTRAS), outcome=OUTCOMES)
    def find(self, data: st.DataObject, extras: Extras, outcome: Any) -> None:
        """A request comes, and all is quick: what it finds, loads and stores."""
        self.add(data, data.draw(st.integers(0, 1)), data.draw(LENGTHS), extras)
        for life in self.lives.values():
            if life.state == "waiting":
                self.half.get_num_matched_tokens(life.request, 0)
        for call in self.link.client.pending:
            self.end_lookup(call, "well", 9)
        self.step(data, 99)
        self.answer_all(outcome)
        self.collect(len(self.ranks))
        self.step(data, 99)

    @rule(data=st.data(), budget=st.sampled_from([99, 99, 8, 3]))
    def step(self, data: st.DataObject, budget: int) -> None:
        """Schedule what goes on and what waits, compute it, store it."""
        scheduled = []
        for life in list(self.lives.values()):
            if not budget or data.draw(st.integers(0, 4)) == 4:
                continue
            num_new = min(data.draw(st.sampled_from([16, 16, 8, 5, 1])), budget)
            one = None
            if life.state == "running":
                one = self.go_on(life, num_new)
            elif life.state == "ready":
                self.grow(life, life.num_computed + num_new)
                one = self.all_of(life, num_new)
            elif life.state == "waiting":
                one = self.start(life, num_new, data)
            if one is not None:
                scheduled.append(one)
                budget -= one.num_new
        for one in scheduled:
            self.move_window(self.lives[one.request_id])
        self.run_step(scheduled)

    def go_on(self, life: Life, num_new: int) -> ScheduledRequest:
        """Schedule more of a running request, maybe with drafts."""
        num_new = min(num_new, life.num_tokens + 2 - life.num_computed)
        more = self.grow(life, life.num_computed + num_new)
        new = tuple(more) if any(more) else None
        return ScheduledRequest(life.name, life.num_computed, num_new, new, False)

    def all_of(self, life: Life, num_new: int) -> ScheduledRequest:
        """Schedule a new or resumed request."""
        life.state = "running"
        num_new = max(min(num_new, life.num_tokens - life.num_computed), 1)
        self.grow(life, life.num_computed + num_new)
        blocks = tuple(list(ids) for ids in life.blocks)
        return ScheduledRequest(life.name, life.num_computed, num_new, blocks, True)

    def start(
        self, life: Life, num_new: int, data: st.DataObject
    ) -> ScheduledRequest | None:
        """Ask what can be loaded, and begin if that is known and there is room."""
        shared = self.shared(life) if data.draw(st.integers(0, 3)) else []
        num_local = len(shared) * BLOCK
        matched = self.half.get_num_matched_tokens(life.request, num_local)
        if matched is None or data.draw(st.integers(0, 3)) == 3:
            return None
        if shared:
            life.blocks = [list(shared)]
            self.blocks.refs.update(shared)
        life.num_computed = num_local + matched
        num_new = max(min(num_new, life.num_tokens - life.num_computed), 1)
        self.grow(
            life, life.num_computed + (0 if matched else num_new), life.num_computed
        )
        blocks = tuple(list(ids) for ids in life.blocks)
        life.has_asked = False
        self.half.update_after_alloc(life.name, blocks, matched)
        if matched:
            life.state = "loading"
            return None
        return self.all_of(life, num_new)

    def shared(self, life: Life) -> list[int]:
        """Find blocks that another request has computed, as vLLM's prefix cache."""
        best: list[int] = []
        if len(self.groups) > 1:
            return best
        wanted = life.request
        for other in self.lives.values():
            if other.state != "running":
                continue
            theirs = other.request
            n = min(other.num_computed, len(wanted.tokens) - 1) // BLOCK
            while n and kv(0, wanted.extras, wanted.tokens, n * BLOCK) != kv(
                0, theirs.extras, theirs.tokens, n * BLOCK
            ):
                n -= 1
            best = max(best, other.blocks[0][:n], key=len)
        return best

    def run_step(self, scheduled: list[ScheduledRequest]) -> None:
        """Do what every worker does in a step."""
        plan = self.half.step(scheduled)
        for load in plan.loads:
            self.loads[load.request_id] = load
            self.ends[load.request_id] = []
        for rank in self.ranks:
            rank.worker.add_tokens(plan)
        for one in scheduled:
            self.compute(one)
        for rank in self.ranks:
            rank.worker.load(plan)
            rank.worker.store(plan)
            rank.worker.forget(plan.ended)
        for one in scheduled:
            life = self.lives[one.request_id]
            life.num_computed = min(one.num_computed + one.num_new, life.num_tokens)
            if life.num_computed == life.num_tokens < MOST_TOKENS:
                life.request.tokens.append(1000 + life.num_computed)

    def compute(self, one: ScheduledRequest) -> None:
        """Fill the blocks of a step's tokens; after any rank's wrong ones come such."""
        life = self.lives[one.request_id]
        whole, end = self.whole(life), one.num_computed + one.num_new
        drafts = (-2,) * max(end - len(whole.tokens), 0)
        tokens = whole.tokens + drafts
        right = all(
            rank.is_right(life.blocks[0], whole, one.num_computed)
            for rank in self.ranks
        )
        for rank, ids in product(self.ranks, life.blocks):
            for i in range(one.num_computed // BLOCK, -(-end // BLOCK)):
                made = kv(self.weights, whole.extras, tokens, min(end, (i + 1) * BLOCK))
                # What another has computed behind these tokens stays.
                if ids[i] and not (right and rank.content[ids[i]].is_of(made)):
                    rank.content[ids[i]] = made if right else WRONG

    @rule(which=st.integers(0, 2))
    def collect(self, which: int) -> None:
        """A worker's results come late; a load has ended when all say so."""
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
            self.half.acknowledge(collected.acks, collected.failed)
        for name, count in list(self.reported.items()):
            if count == len(self.ranks):
                del self.reported[name]
                self.end_load(self.lives[name])

    def end_load(self, life: Life) -> None:
        """Every rank has reported: the request goes on, or its blocks are free."""
        assert life.state == "loading"
        load, ends = self.loads.pop(life.name), self.ends.pop(life.name)
        is_complete = ends.count(True) == len(self.ranks)
        assert is_complete != (life.name in self.failed_blocks)
        if self.failed_blocks.pop(life.name, None):
            life.num_computed = load.start + load.skip
        life.num_computed = min(life.num_computed, life.num_tokens - 1)
        life.state = "ready"
        if not is_complete and not self.recomputes and not life.is_aborted:
            life.is_aborted = True
            self.half.finish(life.name)
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
        for _ in range(times):
            self.half.finish(name)
        if life.state == "loading":
            life.is_aborted = True
        else:
            del self.lives[name]
            self.free(life)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """A request loses its blocks and waits again."""
        running = [n for n, life in self.lives.items() if life.state == "running"]
        if running:
            self.lose(self.lives[data.draw(st.sampled_from(running))])

    def lose(self, life: Life) -> None:
        """Take a request's blocks."""
        self.free(life)
        life.state, life.num_computed = "waiting", 0

    @rule()
    def change_weights(self) -> None:
        """All requests are preempted, and what was computed is worth nothing."""
        if any(life.state in ("loading", "ready") for life in self.lives.values()):
            return  # vLLM refuses.
        for life in self.lives.values():
            life.has_asked = False
            if life.state == "running":
                self.lose(life)
        self.half.reset()
        self.weights += 1

    # -- what holds at any time -------------------------------------------------------

    @invariant()
    def check_computed(self) -> None:
        """What the engine takes for computed is right."""
        for life in self.lives.values():
            if life.state in ("running", "ready"):
                whole = life.num_computed - life.num_computed % BLOCK
                for rank in self.ranks:
                    assert rank.is_right(life.blocks[0], self.whole(life), whole)

    @invariant()
    def check_held(self) -> None:
        """The blocks of every copy under way are somebody's."""
        for _, call in self.pending():
            assert all(self.blocks.refs[block] > 0 for block in call.real_blocks)

    def teardown(self) -> None:
        """When all has ended nothing is left anywhere."""
        if not hasattr(self, "half"):
            return
        self.run_step([])
        self.answer_all("well")
        for name in sorted(self.lives):
            self.half.finish(name)
            if self.lives[name].state != "loading":
                self.free(self.lives.pop(name))
            else:
                self.lives[name].is_aborted = True
        self.collect(len(self.ranks))
        self.run_step([])
        assert not self.lives
        assert self.half.num_ops == 0
        assert not self.half._tracked
        assert not +self.blocks.held
        assert not +self.blocks.refs
        assert not self.open
        for rank in self.ranks:
            assert rank.worker.num_in_progress == 0
            assert not rank.worker._tokens


TestHalves = HalvesMachine.TestCase
# An example takes two milliseconds.
TestHalves.settings = settings(
    max_examples=6 * settings().max_examples, stateful_step_count=40
)
