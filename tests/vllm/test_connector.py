"""Scheduler and worker sides of the connector with an available server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvcore.client import KVClient
from kvcore.keys import ExtraKey
from kvcore.protocol import NULL_BLOCK
from kvcore.vllm.step_metadata import ScheduledRequest, unpack_blocks
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.vllm.conftest import Start
from tests.vllm.fake_engine import BLOCK, Request

RequestOf = Callable[[int], Request]
PER_CHUNK = CHUNK // BLOCK
BLOCKS = list(range(1, 1 + 3 * PER_CHUNK))
OTHERS = list(range(21, 21 + 3 * PER_CHUNK))


def again(request: Request, name: str = "again") -> Request:
    """Make another request with the same prompt."""
    return Request(f"{name}-{request.request_id}", request.tokens, request.extras)


def held(client: KVClient) -> tuple[int, int, int]:
    """Count leases, chunks under one, and sessions."""
    status = client.status()
    return status.num_leases, status.l1.num_leased, status.num_sessions


def test_another_engine_loads_what_one_stored(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """Every byte of the whole chunks arrives, and nothing is held at the end."""
    first, second = start().connect(), start().connect()
    request = request_of(3 * CHUNK + 5)
    first.fill(BLOCKS, seed=1)
    first.compute(request, [*BLOCKS, 60])
    first.scheduler.finish(request.request_id)

    assert second.match(request) == 3 * CHUNK
    collected = second.load(request, [*OTHERS, 61])
    assert collected.loaded == {request.request_id}
    assert not collected.failed
    assert (second.read(OTHERS) == first.read(BLOCKS)).all()
    second.scheduler.finish(request.request_id)
    wait_until(lambda: held(client) == (0, 0, 0))


def test_a_lookup_is_submitted_once_and_polled(
    start: Start, request_of: RequestOf, client: KVClient, server: Server
) -> None:
    """None until it is answered; asking again asks no server."""
    engine = start().connect()
    request = request_of(2 * CHUNK)
    before = client.status().counters["lookups"]
    server.pause()
    try:
        assert engine.scheduler.get_num_matched_tokens(request, 0) is None
        assert engine.scheduler.get_num_matched_tokens(request, 0) is None
    finally:
        server.resume()
    assert engine.match(request) == 0
    assert engine.scheduler.get_num_matched_tokens(request, 0) == 0
    assert client.status().counters["lookups"] == before + 1
    engine.scheduler.finish(request.request_id)


def test_computed_tokens_are_not_overwritten(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """Blocks before the first token to load are not written, nor their lease kept."""
    first, second = start().connect(), start().connect()
    request = request_of(3 * CHUNK)
    first.fill(BLOCKS, seed=2)
    first.compute(request, BLOCKS)
    first.scheduler.finish(request.request_id)
    own = CHUNK + BLOCK
    second.fill(OTHERS, seed=3)
    before = second.read(OTHERS)
    matched = second.match(request, own)
    assert matched == 3 * CHUNK - own
    second.scheduler.update_after_alloc(request.request_id, (OTHERS,), matched)
    second.step()
    assert not second.settle().failed
    count = own // BLOCK
    assert (second.read(OTHERS)[:count] == before[:count]).all()
    assert (second.read(OTHERS)[count:] == first.read(BLOCKS)[count:]).all()
    wait_until(lambda: held(client)[:2] == (0, 0))
    second.scheduler.finish(request.request_id)


def test_an_unused_lookup_is_freed(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """An engine that has it all already keeps no lease."""
    engine = start().connect()
    request = request_of(2 * CHUNK)
    engine.compute(request, BLOCKS[: 2 * PER_CHUNK])
    repeat = again(request)
    assert engine.match(repeat, 2 * CHUNK - BLOCK) == BLOCK
    engine.scheduler.update_after_alloc(
        repeat.request_id, (BLOCKS[: 2 * PER_CHUNK],), 0
    )
    wait_until(lambda: held(client)[:2] == (0, 0))
    for one in (request, repeat):
        engine.scheduler.finish(one.request_id)


def test_blocks_are_held_until_every_copy_is_acknowledged(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """A finished request's blocks are not the engine's while a store reads them."""
    engine = start().connect()
    request = request_of(2 * CHUNK)
    assert engine.match(request) == 0
    blocks = BLOCKS[: 2 * PER_CHUNK]
    engine.scheduler.update_after_alloc(request.request_id, (blocks,), 0)
    engine.step(ScheduledRequest(request.request_id, 0, 2 * CHUNK, (blocks,), True))
    engine.scheduler.finish(request.request_id)
    assert sorted(engine.pool.held) == blocks
    assert engine.scheduler.num_ops == 1
    engine.settle()
    assert not engine.pool.held
    assert engine.scheduler.num_ops == 0
    wait_until(lambda: held(client) == (0, 0, 0))


def test_copies_wait_for_the_engines_event(
    start: Start, request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each names the event of its step; one event is enough for all of a step."""
    engine = start(driver="server").connect()
    marks = iter((b"first", b"second"))
    engine.worker._registration = replace(
        engine.worker._registration, record_event=lambda: next(marks)
    )
    named = []
    for name in ("submit_store", "submit_retrieve"):
        submit = getattr(KVClient, name)

        def note(*args: Any, event: bytes, submit: Any = submit, **rest: Any) -> Any:
            named.append(event)
            return submit(*args, **rest)  # A server without a GPU waits for no event.

        monkeypatch.setattr(KVClient, name, note)
    request = request_of(2 * CHUNK)
    engine.compute(request, BLOCKS[: 2 * PER_CHUNK])
    engine.load(again(request), OTHERS[: 2 * PER_CHUNK])
    assert named == [b"first", b"second"]


def test_each_completion_is_reported_once(start: Start, request_of: RequestOf) -> None:
    """A load is reported once and an operation acknowledged once."""
    engine = start().connect()
    request = request_of(2 * CHUNK)
    engine.compute(request, BLOCKS[: 2 * PER_CHUNK])
    repeat = again(request)
    collected = engine.load(repeat, OTHERS[: 2 * PER_CHUNK])
    assert collected.loaded == {repeat.request_id}
    once_more = engine.collect()
    assert not once_more.loaded
    assert not once_more.acks
    # Naming what ended twice, as asynchronous scheduling does, changes nothing.
    engine.worker.forget([repeat.request_id, repeat.request_id])
    engine.scheduler.finish(repeat.request_id)
    engine.scheduler.finish(repeat.request_id)
    assert not engine.collect().loaded
    assert engine.scheduler.num_ops == 0


def test_an_op_waits_for_all_ranks(start: Start, request_of: RequestOf) -> None:
    """Blocks stay held until the last rank has acknowledged."""
    engine = start().connect()
    engine.scheduler._world_size = 2
    request = request_of(CHUNK)
    blocks = BLOCKS[:PER_CHUNK]
    engine.scheduler.get_num_matched_tokens(request, CHUNK)
    plan = engine.scheduler.step(
        [ScheduledRequest(request.request_id, 0, CHUNK, (blocks,), True)]
    )
    (store,) = plan.stores
    engine.scheduler.acknowledge({store.op: 1})
    assert sorted(engine.pool.held) == blocks
    engine.scheduler.acknowledge({store.op: 1})
    assert not engine.pool.held


def test_a_failed_load_is_reported_with_its_blocks(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """What was found and then dropped is computed, and not looked up again."""
    engine = start().connect()
    request = request_of(2 * CHUNK)
    engine.compute(request, BLOCKS[: 2 * PER_CHUNK])
    repeat, blocks = again(request), OTHERS[: 2 * PER_CHUNK]
    matched = engine.match(repeat)
    session = engine.scheduler._tracked[repeat.request_id].session
    with KVClient(client.address, engine_key=engine.engine.key) as own:
        own.free_lookup_locks(session, 0, 192)
    client.clear()
    engine.scheduler.update_after_alloc(repeat.request_id, (blocks,), matched)
    engine.step()
    collected = engine.settle()
    assert collected.loaded == collected.failed == {repeat.request_id}
    assert collected.failed_blocks == set(blocks)
    assert engine.match(repeat) == 0


def test_a_preempted_request_is_looked_up_again(
    start: Start, request_of: RequestOf
) -> None:
    """With the tokens that it has by then."""
    engine = start().connect()
    request = request_of(CHUNK)
    engine.compute(request, BLOCKS[:PER_CHUNK])
    request.tokens.extend(range(CHUNK))
    engine.step(
        ScheduledRequest(
            request.request_id,
            CHUNK,
            CHUNK,
            (BLOCKS[PER_CHUNK : 2 * PER_CHUNK],),
            False,
        )
    )
    engine.settle()
    assert engine.match(request) == 2 * CHUNK


@pytest.mark.parametrize("num_known", [CHUNK, CHUNK + 3])
def test_draft_tokens_are_not_stored(
    start: Start, request_of: RequestOf, num_known: int
) -> None:
    """Drafts and placeholders count as computed before anybody knows them."""
    engine = start().connect()
    request = request_of(num_known)
    engine.scheduler.get_num_matched_tokens(request, num_known)
    plan = engine.scheduler.step(
        [ScheduledRequest(request.request_id, 0, 2 * CHUNK, (BLOCKS,), True)]
    )
    assert [(store.start, store.end) for store in plan.stores] == [(0, CHUNK)]


def test_blocks_outside_a_sliding_window_are_not_stored(
    start: Start, request_of: RequestOf
) -> None:
    """They may be another request's by now."""
    engine = start(windows=(None, CHUNK)).connect()
    request = request_of(3 * CHUNK)
    engine.scheduler.get_num_matched_tokens(request, 3 * CHUNK)
    ids = (BLOCKS, [0, *OTHERS[1:]])
    plan = engine.scheduler.step(
        [ScheduledRequest(request.request_id, 2 * CHUNK, CHUNK, ids, True)]
    )
    (store,) = plan.stores
    assert unpack_blocks(store.blocks[0]).tolist() == BLOCKS
    # Token 2 * CHUNK still looks back at CHUNK + 1: the block of that token stays.
    gone = [NULL_BLOCK] * PER_CHUNK
    assert unpack_blocks(store.blocks[1]).tolist() == gone + OTHERS[PER_CHUNK:]


def test_blocks_before_a_chunked_window_are_not_stored(
    start: Start, request_of: RequestOf
) -> None:
    """With attention in chunks all before the last one's begin is gone."""
    engine = start(windows=(None, CHUNK)).connect()
    half = engine.scheduler
    half._groups = (half._groups[0], replace(half._groups[1], is_chunked=True))
    request = request_of(3 * CHUNK)
    half.get_num_matched_tokens(request, 3 * CHUNK)
    last = 3 * CHUNK - 1
    plan = engine.step(
        ScheduledRequest(request.request_id, last, 1, (BLOCKS, OTHERS), True)
    )
    (store,) = plan.stores
    gone = [NULL_BLOCK] * (2 * PER_CHUNK)
    assert unpack_blocks(store.blocks[1]).tolist() == gone + OTHERS[2 * PER_CHUNK :]
    engine.settle()


def test_only_blocks_inside_a_window_are_loaded(
    start: Start, request_of: RequestOf
) -> None:
    """The null blocks of a window group are not written."""
    first = start(windows=(None, CHUNK)).connect()
    second = start(windows=(None, CHUNK)).connect()
    request = request_of(3 * CHUNK)
    first.fill(BLOCKS, seed=5)
    first.compute(request, BLOCKS)
    matched = second.match(request)
    window = [0] * (2 * PER_CHUNK) + OTHERS[2 * PER_CHUNK :]
    second.scheduler.update_after_alloc(request.request_id, (OTHERS, window), matched)
    second.step()
    assert not second.settle().failed
    assert (second.read(OTHERS, 0) == first.read(BLOCKS, 0)).all()
    last, source = OTHERS[2 * PER_CHUNK :], BLOCKS[2 * PER_CHUNK :]
    assert (second.read(last, 1) == first.read(source, 1)).all()
    assert not second.read([0], 1).any()


def test_extras_keep_requests_apart(start: Start, request_of: RequestOf) -> None:
    """A prompt is found with the same salt only."""
    engine = start().connect()
    request = request_of(2 * CHUNK)
    request.extras = (ExtraKey(0, b"salt"),)
    engine.compute(request, BLOCKS[: 2 * PER_CHUNK])
    other = Request("other", request.tokens, (ExtraKey(0, b"pepper"),))
    plain = Request("plain", request.tokens)
    late = Request("late", request.tokens, (ExtraKey(CHUNK, b"salt"),))
    assert [engine.match(one) for one in (other, plain, late)] == [0, 0, 0]
    assert engine.match(again(request)) == 2 * CHUNK


def test_after_a_reset_nothing_older_is_found(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """Not what anybody stored before; what is stored after it is this engine's own."""
    engine, other = start().connect(), start().connect()
    request, blocks = request_of(2 * CHUNK), BLOCKS[: 2 * PER_CHUNK]
    engine.compute(request, blocks)
    engine.scheduler.reset()
    repeat = again(request)
    engine.compute(repeat, blocks)
    assert engine.match(again(request, "third")) == 2 * CHUNK
    other.fill(OTHERS, seed=1)
    assert other.match(again(request, "theirs")) == 2 * CHUNK
    engine.scheduler.reset()
    assert engine.match(again(request, "fourth")) == 0


def test_a_request_from_before_a_reset_is_not_stored(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """Its first tokens were computed by other weights; its session ends."""
    before, engine = held(client), start().connect()
    request, blocks = request_of(2 * CHUNK), BLOCKS[: 2 * PER_CHUNK]
    assert engine.match(request) == 0
    engine.scheduler.update_after_alloc(request.request_id, (blocks,), 0)
    engine.step(ScheduledRequest(request.request_id, 0, CHUNK, (blocks,), True))
    engine.scheduler.reset()
    plan = engine.step(ScheduledRequest(request.request_id, CHUNK, CHUNK, None, False))
    assert not plan.stores
    engine.settle()
    wait_until(lambda: held(client) == before)
