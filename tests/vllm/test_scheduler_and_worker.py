"""Scheduler and worker sides with a scripted server, in rare orders of events."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvcore.errors import DeadlineExceeded
from kvcore.protocol import LookupReply, RegisterKVCache
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.connector_scheduler import ConnectorScheduler
from kvcore.vllm.connector_worker import Collected, ConnectorWorker, Registration
from kvcore.vllm.kv_cache_groups import EngineGroup
from kvcore.vllm.server_link import EngineIdentity
from kvcore.vllm.step_metadata import ScheduledRequest
from tests.vllm.fake_engine import Pool, Request
from tests.vllm.scripted_link import LinkCall, ScriptedLink

BLOCK, CHUNK = 2, 4


class ConnectorSides:
    """A scheduler side and a worker side, each with a scripted link."""

    def __init__(self, **config: Any) -> None:
        settings = ConnectorConfig(**config)
        self.link, self.worker_link = ScriptedLink(CHUNK), ScriptedLink(CHUNK)
        self.scheduler = ConnectorScheduler(
            cast(Any, self.link),
            settings,
            engine_id="engine",
            model="model",
            world_size=1,
            groups=[EngineGroup(BLOCK)],
            pool=Pool(),
        )
        self.worker = ConnectorWorker(settings, EngineIdentity("engine", b"key"))
        self.worker._link = cast(Any, self.worker_link)
        request = RegisterKVCache("engine:0", "engine", "model", 1, 0, (), ())
        self.worker._registration = Registration(request, (0,))

    def step(self, *scheduled: ScheduledRequest) -> None:
        """Plan a step and submit its loads and stores."""
        plan = self.scheduler.step(scheduled)
        self.worker.add_tokens(plan)
        self.worker.load(plan)
        self.worker.store(plan)
        self.worker.forget(plan.ended)

    def collect(self) -> Collected:
        """Collect completed operations and report them to the scheduler side."""
        collected = self.worker.collect()
        self.scheduler.acknowledge(collected.acks, collected.failed)
        return collected

    def copies(self, kind: str) -> list[LinkCall]:
        """Return the worker's copies in progress."""
        return [one for one in self.worker_link.client.pending if one.kind == kind]


def test_a_late_reply_is_handled_once() -> None:
    """Repeated calls do not mark a recovered server as down."""
    sides = ConnectorSides()
    request = Request("a", list(range(2 * CHUNK)))
    assert sides.scheduler.get_num_matched_tokens(request, 0) is None
    (lookup,) = sides.link.client.pending
    lookup.future.set_exception(DeadlineExceeded("scripted"))
    assert sides.scheduler.get_num_matched_tokens(request, 0) == 0
    assert not sides.link.is_available
    sides.link.is_available = True
    assert sides.scheduler.get_num_matched_tokens(request, 0) == 0
    assert sides.link.is_available


def test_an_unanswered_lookup_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only a completed lookup expires."""
    monkeypatch.setattr("kvcore.vllm.connector_scheduler.LOOKUP_VALID_S", -1.0)
    sides = ConnectorSides()
    request = Request("a", list(range(CHUNK)))
    assert sides.scheduler.get_num_matched_tokens(request, 0) is None
    assert sides.scheduler.get_num_matched_tokens(request, 0) is None
    assert len(sides.link.client.pending) == 1


def test_a_request_id_is_not_reused_until_it_has_ended() -> None:
    """A request does not use tokens or session of an earlier one with its id."""
    sides = ConnectorSides()
    first = Request("a", list(range(CHUNK)))
    assert sides.scheduler.get_num_matched_tokens(first, 0) is None
    sides.link.client.pending[0].future.set_result(LookupReply(0, 0))
    assert sides.scheduler.get_num_matched_tokens(first, 0) == 0
    sides.scheduler.update_after_alloc("a", ([1, 2],), 0)
    sides.step(ScheduledRequest("a", 0, CHUNK, ([1, 2],), True))
    sides.scheduler.finish("a")
    second = Request("a", list(range(50, 50 + CHUNK)))
    assert (
        sides.scheduler.get_num_matched_tokens(second, 0) == 0
    )  # Its store is running.
    sides.copies("store")[0].future.set_result(None)
    sides.collect()
    assert (
        sides.scheduler.get_num_matched_tokens(second, 0) == 0
    )  # Workers keep its tokens.
    assert not [one for one in sides.link.client.pending if one.kind == "lookup"]
    sides.step()
    assert sides.scheduler.get_num_matched_tokens(second, 0) is None


def test_a_worker_whose_cache_is_not_shared_acknowledges_stores() -> None:
    """The scheduler side releases the blocks that it holds for them."""
    sides = ConnectorSides()
    sides.worker._link = sides.worker._registration = None
    request = Request("a", list(range(CHUNK)))
    assert sides.scheduler.get_num_matched_tokens(request, CHUNK) == 0
    sides.step(ScheduledRequest("a", 0, CHUNK, ([1, 2],), True))
    assert sides.scheduler.num_ops == 1
    sides.collect()
    assert sides.scheduler.num_ops == 0
    assert not sides.scheduler.pool.held
