"""Both halves with a played server: what no real one does at the right moment."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvcore.errors import DeadlineExceeded
from kvcore.protocol import LookupReply, RetrieveReply
from kvcore.vllm.config import ConnectorConfig
from kvcore.vllm.plan import OpId
from kvcore.vllm.scheduler import SchedulerHalf
from kvcore.vllm.tracked import GroupShape, Scheduled
from kvcore.vllm.worker import Collected, Registration, WorkerHalf
from tests.adapter.engine import Pool, Request
from tests.adapter.played import Asked, PlayedLink

BLOCK, CHUNK = 2, 4


class Halves:
    """One scheduler half and one worker half, each with a played link."""

    def __init__(self, **config: Any) -> None:
        settings = ConnectorConfig(**config)
        self.link, self.worker_link = PlayedLink(CHUNK), PlayedLink(CHUNK)
        self.scheduler = SchedulerHalf(
            cast(Any, self.link),
            settings,
            engine_id="engine",
            model="model",
            world_size=1,
            groups=[GroupShape(BLOCK)],
            pool=Pool(),
        )
        self.worker = WorkerHalf(settings, "engine", 0)
        self.worker._link = cast(Any, self.worker_link)
        self.worker._registration = Registration(cast(Any, None), (0,))

    def step(self, *scheduled: Scheduled) -> None:
        """Plan a step and begin what it says."""
        plan = self.scheduler.step(scheduled)
        self.worker.learn(plan)
        self.worker.load(plan)
        self.worker.store(plan)
        self.worker.forget(plan.ended)

    def collect(self) -> Collected:
        """Collect what ended and report it to the scheduler half."""
        collected = self.worker.collect()
        self.scheduler.acknowledged(collected.acks, collected.failed)
        return collected

    def copies(self, kind: str) -> list[Asked]:
        """Return the worker's copies under way."""
        return [one for one in self.worker_link.client.pending if one.kind == kind]

    def load_in_step(self, request: Request, blocks: list[int]) -> None:
        """Find a chunk and load it in the step that computes all that follows."""
        assert self.scheduler.matched(request, 0) is None
        (lookup,) = self.link.client.pending
        lookup.future.set_result(LookupReply(1, CHUNK))
        assert self.scheduler.matched(request, 0) == CHUNK
        self.scheduler.allocated(request.request_id, (blocks,), CHUNK)
        num_new = len(request.tokens) - CHUNK
        self.step(Scheduled(request.request_id, CHUNK, num_new, (blocks,), True))


def end_first(halves: Halves, reply: RetrieveReply | None) -> None:
    """End a load when it is asked for, within the step's wait."""

    def note(asked: Asked) -> None:
        if asked.kind == "retrieve" and reply is not None:
            asked.future.set_result(reply)
        elif asked.kind == "retrieve":
            asked.future.set_exception(DeadlineExceeded("played"))

    halves.worker_link.client.note = note


def test_a_late_answer_is_judged_once() -> None:
    """An engine that asks on and on makes no server ill that is well again."""
    halves = Halves()
    request = Request("a", list(range(2 * CHUNK)))
    assert halves.scheduler.matched(request, 0) is None
    (lookup,) = halves.link.client.pending
    lookup.future.set_exception(DeadlineExceeded("played"))
    assert halves.scheduler.matched(request, 0) == 0
    assert not halves.link.is_well
    halves.link.is_well = True
    assert halves.scheduler.matched(request, 0) == 0
    assert halves.link.is_well


def test_an_unanswered_lookup_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only an answer grows old."""
    monkeypatch.setattr("kvcore.vllm.scheduler.LOOKUP_VALID_S", -1.0)
    halves = Halves()
    request = Request("a", list(range(CHUNK)))
    assert halves.scheduler.matched(request, 0) is None
    assert halves.scheduler.matched(request, 0) is None
    assert len(halves.link.client.pending) == 1


@pytest.mark.parametrize("reply", [None, RetrieveReply(CHUNK - 1)])
def test_what_is_computed_after_a_failed_load_is_not_stored(
    reply: RetrieveReply | None,
) -> None:
    """The tokens behind it were computed from blocks that hold anything."""
    halves = Halves(load="sync")
    end_first(halves, reply)
    halves.load_in_step(Request("a", list(range(2 * CHUNK))), [1, 2, 3, 4])
    assert not halves.copies("store")
    assert halves.collect().failed_blocks == {1, 2}
    assert halves.scheduler.num_ops == 0
    halves.worker_link.is_well = True
    halves.step(Scheduled("a", 0, 2 * CHUNK, None, False))
    (store,) = halves.copies("store")
    assert (store.start, store.end) == (0, 2 * CHUNK)


def test_nothing_is_stored_until_every_rank_has_loaded() -> None:
    """One rank's failed load spoils what all of them compute."""
    halves = Halves(load="sync")
    halves.scheduler._world_size = 2
    end_first(halves, RetrieveReply(CHUNK))
    halves.load_in_step(Request("a", list(range(2 * CHUNK + 2))), [1, 2, 3, 4, 5])
    halves.collect()
    one = Scheduled("a", 2 * CHUNK, 1, None, False)
    assert not halves.scheduler.step([one]).stores
    halves.scheduler.acknowledged({OpId(1): 1})
    (store,) = halves.scheduler.step([one]).stores
    assert (store.start, store.end) == (CHUNK, 2 * CHUNK)


def test_a_load_that_ends_behind_its_step_failed() -> None:
    """The step did not wait for it, so nothing is kept, though all was written."""
    halves = Halves(load="sync", load_timeout_s=1e-5)
    halves.load_in_step(Request("a", list(range(2 * CHUNK))), [1, 2, 3, 4])
    assert not halves.copies("store")
    (load,) = halves.copies("retrieve")
    load.future.set_result(RetrieveReply(CHUNK))
    collected = halves.collect()
    assert collected.failed == {"a"}
    assert collected.failed_blocks == {1, 2}
    assert halves.scheduler.num_ops == 0


def test_a_name_is_not_used_again_until_it_has_ended() -> None:
    """Tokens and session of a request are not taken for those of the next."""
    halves = Halves()
    first = Request("a", list(range(CHUNK)))
    assert halves.scheduler.matched(first, 0) is None
    halves.link.client.pending[0].future.set_result(LookupReply(0, 0))
    assert halves.scheduler.matched(first, 0) == 0
    halves.scheduler.allocated("a", ([1, 2],), 0)
    halves.step(Scheduled("a", 0, CHUNK, ([1, 2],), True))
    halves.scheduler.finished("a")
    second = Request("a", list(range(50, 50 + CHUNK)))
    assert halves.scheduler.matched(second, 0) == 0  # Its store is under way.
    halves.copies("store")[0].future.set_result(None)
    halves.collect()
    assert halves.scheduler.matched(second, 0) == 0  # No worker has forgotten it.
    assert not [one for one in halves.link.client.pending if one.kind == "lookup"]
    halves.step()
    assert halves.scheduler.matched(second, 0) is None
