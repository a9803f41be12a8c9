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
    """Return another request with the same prompt."""
    return Request(f"{name}-{request.request_id}", request.tokens, request.extras)


def held(client: KVClient) -> tuple[int, int, int]:
    """Return the numbers of leases, leased chunks and sessions."""
    status = client.status()
    return status.num_leases, status.l1.num_leased, status.num_sessions


def test_another_engine_loads_what_one_stored(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """All bytes of whole chunks are loaded, and nothing stays leased."""
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
    """The result is None until the reply; repeated calls send no request."""
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
    """Blocks before the first loaded token are not written; their lease ends."""
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
    """The lease ends if the engine has computed all tokens."""
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
    """The blocks of a finished request stay held while a store reads them."""
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
    """Each copy names its step's event; a step records one event per direction."""
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
            return submit(*args, **rest)  # A server without a GPU rejects events.

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
    # Asynchronous scheduling may report an end twice, which has no effect.
    engine.worker.forget([repeat.request_id, repeat.request_id])
    engine.scheduler.finish(repeat.request_id)
    engine.scheduler.finish(repeat.request_id)
    assert not engine.collect().loaded
    assert engine.scheduler.num_ops == 0


def test_an_operation_waits_for_all_ranks(start: Start, request_of: RequestOf) -> None:
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
    """A chunk that was dropped after the lookup is recomputed without a new lookup."""
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
    """The lookup covers the tokens generated before the preemption."""
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
    """The engine counts drafts and placeholders as computed."""
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
    """The engine may have reused them for another request."""
    engine = start(windows=(None, CHUNK)).connect()
    request = request_of(3 * CHUNK)
    engine.scheduler.get_num_matched_tokens(request, 3 * CHUNK)
    ids = (BLOCKS, [0, *OTHERS[1:]])
    plan = engine.scheduler.step(
        [ScheduledRequest(request.request_id, 2 * CHUNK, CHUNK, ids, True)]
    )
    (store,) = plan.stores
    assert unpack_blocks(store.blocks[0]).tolist() == BLOCKS
    # The window of token 2 * CHUNK starts at CHUNK + 1, whose block is kept.
    gone = [NULL_BLOCK] * PER_CHUNK
    assert unpack_blocks(store.blocks[1]).tolist() == gone + OTHERS[PER_CHUNK:]


def test_blocks_before_a_chunked_window_are_not_stored(
    start: Start, request_of: RequestOf
) -> None:
    """Chunked attention keeps only blocks of the current chunk of attention."""
    engine = start(windows=(None, CHUNK)).connect()
    scheduler = engine.scheduler
    scheduler._groups = (
        scheduler._groups[0],
        replace(scheduler._groups[1], is_chunked=True),
    )
    request = request_of(3 * CHUNK)
    scheduler.get_num_matched_tokens(request, 3 * CHUNK)
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


def test_requests_with_other_extra_keys_do_not_match(
    start: Start, request_of: RequestOf
) -> None:
    """A prompt is found only with the same salt."""
    engine = start().connect()
    request = request_of(2 * CHUNK)
    request.extras = (ExtraKey(0, b"salt"),)
    engine.compute(request, BLOCKS[: 2 * PER_CHUNK])
    other = Request("other", request.tokens, (ExtraKey(0, b"pepper"),))
    plain = Request("plain", request.tokens)
    late = Request("late", request.tokens, (ExtraKey(CHUNK, b"salt"),))
    assert [engine.match(one) for one in (other, plain, late)] == [0, 0, 0]
    assert engine.match(again(request)) == 2 * CHUNK


def test_a_reset_hides_older_chunks(
    start: Start, request_of: RequestOf, client: KVClient
) -> None:
    """Chunks stored after the reset are found only by this engine."""
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
    """Its first tokens were computed with other weights; its session ends."""
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
