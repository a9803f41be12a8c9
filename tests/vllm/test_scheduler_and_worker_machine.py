"""State machine: both sides under a scheduler like vLLM's and a scripted server."""

from __future__ import annotations

from itertools import product
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from kvcore.vllm.step_metadata import ScheduledRequest
from tests.vllm.fake_engine import Request
from tests.vllm.fake_ranks import BLOCK, CORRUPT, Extras, kv_of
from tests.vllm.scripted_connector import (
    EXTRAS,
    OUTCOMES,
    RequestRecord,
    ScriptedConnector,
    prompt_of,
)

MOST_TOKENS = 24
NAMES = "abcd"
LENGTHS = st.sampled_from([3, 4, 8, 9, 12, 16])


class ConnectorMachine(ScriptedConnector):
    """Requests are added, scheduled, preempted and aborted; weights change."""

    # -- the engine ---------------------------------------------------------

    @rule(
        data=st.data(),
        prompt=st.integers(0, 1),
        length=LENGTHS,
        extras=st.sampled_from(EXTRAS),
    )
    def add(
        self, data: st.DataObject, prompt: int, length: int, extras: Extras
    ) -> None:
        """Add a request with an unused id."""
        names = [name for name in NAMES if name not in self.records]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        request = Request(name, list(prompt_of(prompt, length)), extras)
        self.records[name] = RequestRecord(request)

    @rule(data=st.data(), extras=st.sampled_from(EXTRAS), outcome=OUTCOMES)
    def find(self, data: st.DataObject, extras: Extras, outcome: Any) -> None:
        """Add a request; complete its lookup, load and store at once."""
        self.add(data, data.draw(st.integers(0, 1)), data.draw(LENGTHS), extras)
        for record in self.records.values():
            if record.state == "waiting":
                self.scheduler.get_num_matched_tokens(record.request, 0)
        for call in self.link.client.pending:
            self.end_lookup(call, "ok", 9)
        self.step(data, 99)
        self.answer_all(outcome)
        self.collect(len(self.ranks))
        self.step(data, 99)

    @rule(data=st.data(), budget=st.sampled_from([99, 99, 8, 3]))
    def step(self, data: st.DataObject, budget: int) -> None:
        """Schedule running and waiting requests, and run the step."""
        scheduled = []
        for record in list(self.records.values()):
            if not budget or data.draw(st.integers(0, 4)) == 4:
                continue
            num_new = min(data.draw(st.sampled_from([16, 16, 8, 5, 1])), budget)
            one = None
            if record.state == "running":
                one = self.continue_running(record, num_new)
            elif record.state == "ready":
                self.grow(record, record.num_computed + num_new)
                one = self.start_running(record, num_new)
            elif record.state == "waiting":
                one = self.start(record, num_new, data)
            if one is not None:
                scheduled.append(one)
                budget -= one.num_new
        for one in scheduled:
            self.move_window(self.records[one.request_id])
        self.run_step(scheduled)

    def continue_running(self, record: RequestRecord, num_new: int) -> ScheduledRequest:
        """Schedule more tokens of a running request, possibly drafts."""
        num_new = min(num_new, record.num_tokens + 2 - record.num_computed)
        more = self.grow(record, record.num_computed + num_new)
        new = tuple(more) if any(more) else None
        return ScheduledRequest(record.name, record.num_computed, num_new, new, False)

    def start_running(self, record: RequestRecord, num_new: int) -> ScheduledRequest:
        """Schedule a new or resumed request."""
        record.state = "running"
        num_new = max(min(num_new, record.num_tokens - record.num_computed), 1)
        self.grow(record, record.num_computed + num_new)
        blocks = tuple(list(ids) for ids in record.blocks)
        return ScheduledRequest(record.name, record.num_computed, num_new, blocks, True)

    def start(
        self, record: RequestRecord, num_new: int, data: st.DataObject
    ) -> ScheduledRequest | None:
        """Start a waiting request once its lookup is complete."""
        shared = self.shared(record) if data.draw(st.integers(0, 3)) else []
        num_local = len(shared) * BLOCK
        matched = self.scheduler.get_num_matched_tokens(record.request, num_local)
        if matched is None or data.draw(st.integers(0, 3)) == 3:
            return None
        if shared:
            record.blocks = [list(shared)]
            self.blocks.refs.update(shared)
        record.num_computed = num_local + matched
        num_new = max(min(num_new, record.num_tokens - record.num_computed), 1)
        self.grow(
            record,
            record.num_computed + (0 if matched else num_new),
            record.num_computed,
        )
        blocks = tuple(list(ids) for ids in record.blocks)
        record.has_pending_lookup = False
        self.scheduler.update_after_alloc(record.name, blocks, matched)
        if matched:
            record.state = "loading"
            return None
        return self.start_running(record, num_new)

    def shared(self, record: RequestRecord) -> list[int]:
        """Return blocks computed by another request, like vLLM's prefix cache."""
        best: list[int] = []
        if len(self.groups) > 1:
            return best
        wanted = record.request
        for other in self.records.values():
            if other.state != "running":
                continue
            theirs = other.request
            n = min(other.num_computed, len(wanted.tokens) - 1) // BLOCK
            while n and kv_of(0, wanted.extras, wanted.tokens, n * BLOCK) != kv_of(
                0, theirs.extras, theirs.tokens, n * BLOCK
            ):
                n -= 1
            best = max(best, other.blocks[0][:n], key=len)
        return best

    def run_step(self, scheduled: list[ScheduledRequest]) -> None:
        """Run a step on every worker."""
        plan = self.scheduler.step(scheduled)
        for load in plan.loads:
            self.loads[load.request_id] = load
            self.load_results[load.request_id] = []
        for rank in self.ranks:
            rank.worker.add_tokens(plan)
        for one in scheduled:
            self.compute(one)
        for rank in self.ranks:
            rank.worker.load(plan)
            rank.worker.store(plan)
            rank.worker.forget(plan.ended)
        for one in scheduled:
            record = self.records[one.request_id]
            record.num_computed = min(one.num_computed + one.num_new, record.num_tokens)
            if record.num_computed == record.num_tokens < MOST_TOKENS:
                record.request.tokens.append(1000 + record.num_computed)

    def compute(self, one: ScheduledRequest) -> None:
        """Fill the blocks of a step; corrupt after a corrupt block."""
        record = self.records[one.request_id]
        whole, end = self.expected_kv(record), one.num_computed + one.num_new
        drafts = (-2,) * max(end - len(whole.tokens), 0)
        tokens = whole.tokens + drafts
        right = all(
            rank.is_right(record.blocks[0], whole, one.num_computed)
            for rank in self.ranks
        )
        for rank, ids in product(self.ranks, record.blocks):
            for i in range(one.num_computed // BLOCK, -(-end // BLOCK)):
                made = kv_of(
                    self.weights, whole.extras, tokens, min(end, (i + 1) * BLOCK)
                )
                # Keep later tokens that another request has computed.
                if ids[i] and not (right and rank.content[ids[i]].covers(made)):
                    rank.content[ids[i]] = made if right else CORRUPT

    @rule(which=st.integers(0, 2))
    def collect(self, which: int) -> None:
        """Collect one worker or all; a load ends when every rank has reported it."""
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
                record = self.records[name]
                first = (load.start + load.skip) // BLOCK
                blocks = {b for ids in record.blocks for b in ids[first:] if b}
                assert blocks <= collected.failed_blocks
                collected.failed_blocks -= blocks
                self.failed_blocks[name] = blocks
            assert not collected.failed_blocks
            self.scheduler.acknowledge(collected.acks, collected.failed)
        for name, count in list(self.reported.items()):
            if count == len(self.ranks):
                del self.reported[name]
                self.end_load(self.records[name])

    def end_load(self, record: RequestRecord) -> None:
        """Continue a request after its load, or free its blocks if it was aborted."""
        assert record.state == "loading"
        load, ends = self.loads.pop(record.name), self.load_results.pop(record.name)
        is_complete = ends.count(True) == len(self.ranks)
        assert is_complete != (record.name in self.failed_blocks)
        if self.failed_blocks.pop(record.name, None):
            record.num_computed = load.start + load.skip
        record.num_computed = min(record.num_computed, record.num_tokens - 1)
        record.state = "ready"
        if not is_complete and not self.recomputes and not record.is_aborted:
            record.is_aborted = True
            self.scheduler.finish(record.name)
        if record.is_aborted:
            del self.records[record.name]
            self.free(record)

    @rule(data=st.data(), times=st.integers(1, 2))
    def finish(self, data: st.DataObject, times: int) -> None:
        """Finish or abort a request; the engine may report it twice."""
        if not self.records:
            return
        name = data.draw(st.sampled_from(sorted(self.records)))
        record = self.records[name]
        for _ in range(times):
            self.scheduler.finish(name)
        if record.state == "loading":
            record.is_aborted = True
        else:
            del self.records[name]
            self.free(record)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Preempt a running request."""
        running = [n for n, record in self.records.items() if record.state == "running"]
        if running:
            self.preempt_request(self.records[data.draw(st.sampled_from(running))])

    def preempt_request(self, record: RequestRecord) -> None:
        """Free a request's blocks and make it wait again."""
        self.free(record)
        record.state, record.num_computed = "waiting", 0

    @rule()
    def change_weights(self) -> None:
        """Preempt all requests and reset the connector."""
        if any(
            record.state in ("loading", "ready") for record in self.records.values()
        ):
            return  # vLLM refuses.
        for record in self.records.values():
            record.has_pending_lookup = False
            if record.state == "running":
                self.preempt_request(record)
        self.scheduler.reset()
        self.weights += 1

    # -- invariants -------------------------------------------------------

    @invariant()
    def check_computed(self) -> None:
        """All tokens that the engine considers computed have the right KV."""
        for record in self.records.values():
            if record.state in ("running", "ready"):
                whole = record.num_computed - record.num_computed % BLOCK
                for rank in self.ranks:
                    assert rank.is_right(
                        record.blocks[0], self.expected_kv(record), whole
                    )

    @invariant()
    def check_held(self) -> None:
        """The blocks of every running copy are referenced."""
        for _, call in self.pending():
            assert all(self.blocks.refs[block] > 0 for block in call.real_blocks)

    def teardown(self) -> None:
        """After all requests have ended, no state remains."""
        if not hasattr(self, "scheduler"):
            return
        self.run_step([])
        self.answer_all("ok")
        for name in sorted(self.records):
            self.scheduler.finish(name)
            if self.records[name].state != "loading":
                self.free(self.records.pop(name))
            else:
                self.records[name].is_aborted = True
        self.collect(len(self.ranks))
        self.run_step([])
        assert not self.records
        assert self.scheduler.num_ops == 0
        assert not self.scheduler._tracked
        assert not +self.blocks.held
        assert not +self.blocks.refs
        assert not self.open_sessions
        for rank in self.ranks:
            assert rank.worker._running == []
            assert not rank.worker._tokens


TestConnectorMachine = ConnectorMachine.TestCase
# An example takes 2 ms.
TestConnectorMachine.settings = settings(
    max_examples=6 * settings().max_examples, stateful_step_count=40
)
