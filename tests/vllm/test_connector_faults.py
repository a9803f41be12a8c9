"""The connector with a server that is absent, stopped, killed or full."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing

import pytest

from kvcore.client import KVClient
from kvcore.vllm import server_link as link
from kvcore.vllm.step_metadata import ScheduledRequest
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.vllm.conftest import Start
from tests.vllm.fake_engine import FakeEngine
from tests.vllm.tcp_proxy import SlowTcpProxy
from tests.vllm.test_connector import BLOCKS, OTHERS, PER_CHUNK, RequestOf, again

Serve = Callable[..., Server]
SHORT_TIMEOUTS = {"lookup_timeout_s": 0.2, "store_timeout_s": 0.2}
OTHER_VERSION = """
import kvcore.protocol
kvcore.protocol.PROTOCOL_VERSION += 1
from kvctl.cli import main
main()
"""


def is_shared(engine: FakeEngine, request_of: RequestOf) -> bool:
    """Return whether a new prompt is stored and then found."""
    request = request_of(CHUNK)
    engine.match(request)
    engine.scheduler.update_after_alloc(request.request_id, (BLOCKS[:PER_CHUNK],), 0)
    engine.step(
        ScheduledRequest(request.request_id, 0, CHUNK, (BLOCKS[:PER_CHUNK],), True)
    )
    engine.settle()
    repeat = again(request)
    found = engine.match(repeat)
    for one in (request, repeat):
        engine.scheduler.finish(one.request_id)
    return found == CHUNK


def warnings_of(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """Return the messages that contain this text."""
    return [r.getMessage() for r in caplog.records if text in r.getMessage()]


worker_is_long = pytest.mark.parametrize(
    "driver",
    ["server", pytest.param("worker", marks=pytest.mark.long)],
    indirect=True,
)
"""The fault is handled before any copy, so one driver suffices in the short run."""


@worker_is_long
def test_without_a_server_everything_is_computed(
    start: Start, request_of: RequestOf, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """No call waits, each side logs one warning, and a later server is used."""
    server = serve()
    server.stop()
    with caplog.at_level(logging.WARNING, "kvcore.vllm"):
        engine = start(server.address)
        for _ in range(3):
            request = request_of(2 * CHUNK)
            assert engine.scheduler.get_num_matched_tokens(request, 0) == 0
            plan = engine.step(
                ScheduledRequest(request.request_id, 0, 2 * CHUNK, (BLOCKS,), True)
            )
            assert not plan.stores
        wait_until(lambda: len(warnings_of(caplog, "no KV cache for now")) == 2)
        following = server.restart()
        try:
            engine.connect()
            request = request_of(2 * CHUNK)
            engine.compute(request, BLOCKS[: 2 * PER_CHUNK])
            assert engine.match(again(request)) == 2 * CHUNK
        finally:
            following.close()
    assert len(warnings_of(caplog, "is back")) == 2


def test_a_killed_server_fails_loads_and_its_successor_is_used(
    start: Start, request_of: RequestOf, serve: Serve
) -> None:
    """Its loads fail; the cache is registered with the next server automatically."""
    server = serve()
    engine = start(server.address).connect()
    request = request_of(2 * CHUNK)
    engine.compute(request, BLOCKS[: 2 * PER_CHUNK])
    repeat = again(request)
    matched = engine.match(repeat)
    server.kill()
    engine.scheduler.update_after_alloc(
        repeat.request_id, (OTHERS[: 2 * PER_CHUNK],), matched
    )
    engine.step()
    assert engine.settle().failed == {repeat.request_id}
    assert not engine.pool.held
    following = server.restart()
    try:
        wait_until(lambda: is_shared(engine, request_of))
    finally:
        following.close()


@worker_is_long
def test_no_requests_are_sent_to_a_stopped_server(
    start: Start, request_of: RequestOf, serve: Serve
) -> None:
    """A lookup ends by its deadline; no more are sent until the server runs again."""
    server = serve()
    engine = start(server.address, **SHORT_TIMEOUTS).connect()
    server.pause()
    try:
        assert engine.match(request_of(CHUNK)) == 0
        # No request is sent, so the result is available immediately.
        assert engine.scheduler.get_num_matched_tokens(request_of(CHUNK), 0) == 0
    finally:
        server.resume()
    wait_until(lambda: is_shared(engine, request_of))


def test_a_stopped_server_keeps_the_blocks_that_it_may_write(
    start: Start, request_of: RequestOf, serve: Serve
) -> None:
    """A load ends with the server's reply; a store frees its blocks by the deadline."""
    server = serve()
    engine = start(server.address, **SHORT_TIMEOUTS).connect()
    request = request_of(2 * CHUNK)
    blocks = BLOCKS[: 2 * PER_CHUNK]
    engine.fill(blocks, seed=1)
    engine.compute(request, blocks)
    repeat = again(request)
    matched = engine.match(repeat)
    server.pause()
    try:
        targets = OTHERS[: 2 * PER_CHUNK]
        engine.scheduler.update_after_alloc(repeat.request_id, (targets,), matched)
        other = request_of(CHUNK)
        engine.scheduler.get_num_matched_tokens(other, CHUNK)
        engine.step(
            ScheduledRequest(other.request_id, 0, CHUNK, (BLOCKS[:PER_CHUNK],), True)
        )
        assert engine.pool.held
        wait_until(lambda: not engine.collect().loaded and not engine.pool.held)
        assert len(engine.worker._running) == 1
        engine.scheduler.finish(repeat.request_id)
        assert engine.scheduler.num_ops == 1
    finally:
        server.resume()
    collected = engine.settle()
    assert collected.loaded == {repeat.request_id}
    assert not collected.failed
    assert (engine.read(targets) == engine.read(blocks)).all()


@worker_is_long
def test_no_requests_are_sent_to_a_slow_server(
    start: Start, request_of: RequestOf, serve: Serve
) -> None:
    """A late reply is a miss, and has no effect when it arrives."""
    server = serve()
    with closing(SlowTcpProxy(server.address)) as proxy:
        engine = start(proxy.address, **SHORT_TIMEOUTS).connect()
        wait_until(lambda: is_shared(engine, request_of))
        late = [request_of(CHUNK) for _ in range(2)]
        with proxy.held():
            assert engine.match(late[0]) == 0
            # No request is sent, so the result is available immediately.
            assert engine.scheduler.get_num_matched_tokens(late[1], 0) == 0
            assert engine.match(late[0]) == 0
        for request in late:
            engine.scheduler.finish(request.request_id)
        wait_until(lambda: is_shared(engine, request_of))
        with KVClient(server.address, label="test", timeout_s=20) as client:
            wait_until(lambda: client.status().num_sessions == 0)
            assert client.status().num_leases == 0


@worker_is_long
def test_a_server_of_another_version_is_warned_of_once(
    start: Start,
    request_of: RequestOf,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine runs without it, and uses the server that replaces it."""
    monkeypatch.setattr(link, "MAX_PAUSE_S", 0.1)
    server = serve(program=("-c", OTHER_VERSION))
    with caplog.at_level(logging.WARNING, "kvcore.vllm"):
        engine = start(server.address)
        wait_until(lambda: len(warnings_of(caplog, "no KV cache for now")) == 2)
        assert engine.scheduler.get_num_matched_tokens(request_of(CHUNK), 0) == 0
        assert all("version" in text for text in warnings_of(caplog, "no KV cache"))
        server.stop()
        following = Server(server.folder, address=server.address)
        try:
            engine.connect()
            wait_until(lambda: is_shared(engine, request_of))
        finally:
            following.close()
    assert len(warnings_of(caplog, "no KV cache for now")) == 2


@worker_is_long
def test_a_full_server_keeps_the_prefix(
    start: Start, request_of: RequestOf, serve: Serve
) -> None:
    """Chunks that do not fit are not found; the stored prefix is."""
    server = serve("--l1-size", "4KiB")
    engine = start(server.address).connect()
    request = request_of(3 * CHUNK)
    engine.compute(request, BLOCKS)
    with KVClient(server.address, label="test", timeout_s=20) as client:
        assert client.status().counters["parts_dropped"] == 2
    assert engine.match(again(request)) == CHUNK
    assert not engine.pool.held


def test_a_successor_with_another_chunk_size_is_used(
    start: Start, request_of: RequestOf, serve: Serve
) -> None:
    """A running request is stored with the new chunk size."""
    server = serve()
    engine = start(server.address).connect()
    request = request_of(3 * CHUNK)
    blocks = BLOCKS[:PER_CHUNK]
    assert engine.match(request) == 0
    engine.scheduler.update_after_alloc(request.request_id, (blocks,), 0)
    engine.step(ScheduledRequest(request.request_id, 0, CHUNK, (blocks,), True))
    engine.settle()
    server.kill()
    wait_until(lambda: engine.link.server is None)
    following = Server(
        server.folder, "--chunk-size", str(2 * CHUNK), address=server.address
    )
    try:
        engine.connect()
        wait_until(
            lambda: engine.link.server and engine.link.server.chunk_size == 2 * CHUNK
        )
        more = (BLOCKS[PER_CHUNK : 2 * PER_CHUNK],)
        plan = engine.step(
            ScheduledRequest(request.request_id, CHUNK, CHUNK, more, False)
        )
        assert [(s.start, s.end) for s in plan.stores] == [(0, 2 * CHUNK)]
        engine.settle()
        assert engine.match(again(request)) == 2 * CHUNK
    finally:
        following.close()
