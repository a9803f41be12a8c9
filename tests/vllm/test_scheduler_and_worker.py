"""Scheduler and worker sides with a scripted server, in rare orders of events."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvcore.errors import DeadlineExceeded
from kvcore.protocol import LookupReply
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.connector_scheduler import ConnectorScheduler
from kvcore.vllm.connector_worker import Collected, ConnectorWorker, Registration
from kvcore.vllm.kv_cache_groups import GroupShape
from kvcore.vllm.server_link import EngineIdentity
from kvcore.vllm.step_metadata import ScheduledRequest
from tests.vllm.fake_engine import Pool, Request
from tests.vllm.scripted_link import LinkCall, ScriptedLink

BLOCK, CHUNK = 2, 4


class Halves:
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
            groups=[GroupShape(BLOCK)],
            pool=Pool(),
        )
        self.worker = ConnectorWorker(settings, EngineIdentity("engine", b"key"), 0)
        self.worker._link = cast(Any, self.worker_link)
        self.worker._registration = Registration(cast(Any, None), (0,))

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
    halves = Halves()
    request = Request("a", list(range(2 * CHUNK)))
    assert halves.scheduler.get_num_matched_tokens(request, 0) is None
    (lookup,) = halves.link.client.pending
    lookup.future.set_exception(DeadlineExceeded("scripted"))
    assert halves.scheduler.get_num_matched_tokens(request, 0) == 0
    assert not halves.link.is_available
    halves.link.is_available = True
    assert halves.scheduler.get_num_matched_tokens(request, 0) == 0
    assert halves.link.is_available


def test_an_unanswered_lookup_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only a completed lookup expires."""
    monkeypatch.setattr("kvcore.vllm.connector_scheduler.LOOKUP_VALID_S", -1.0)
    halves = Halves()
    request = Request("a", list(range(CHUNK)))
    assert halves.scheduler.get_num_matched_tokens(request, 0) is None
    assert halves.scheduler.get_num_matched_tokens(request, 0) is None
    assert len(halves.link.client.pending) == 1


def test_a_request_id_is_not_reused_until_it_has_ended() -> None:
    """A request does not use tokens or session of an earlier one with its id."""
    halves = Halves()
    first = Request("a", list(range(CHUNK)))
    assert halves.scheduler.get_num_matched_tokens(first, 0) is None
    halves.link.client.pending[0].future.set_result(LookupReply(0, 0))
    assert halves.scheduler.get_num_matched_tokens(first, 0) == 0
    halves.scheduler.update_after_alloc("a", ([1, 2],), 0)
    halves.step(ScheduledRequest("a", 0, CHUNK, ([1, 2],), True))
    halves.scheduler.finish("a")
    second = Request("a", list(range(50, 50 + CHUNK)))
    assert (
        halves.scheduler.get_num_matched_tokens(second, 0) == 0
    )  # Its store is running.
    halves.copies("store")[0].future.set_result(None)
    halves.collect()
    assert (
        halves.scheduler.get_num_matched_tokens(second, 0) == 0
    )  # Workers keep its tokens.
    assert not [one for one in halves.link.client.pending if one.kind == "lookup"]
    halves.step()
    assert halves.scheduler.get_num_matched_tokens(second, 0) is None
