"""Stores, lookups and retrieves between processes, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.errors import BadRequest, ChunksMissing
from kvcore.keys import SessionKey
from tests.system.conftest import Prompt, both_drivers
from tests.system.server_fixture import CHUNK
from tests.system.worker_process import BLOCK, POISON, Worker

driver = both_drivers

PER_CHUNK = CHUNK // BLOCK


@pytest.fixture
def pair(workers: list[Worker], model: str) -> tuple[Worker, Worker]:
    """Two workers with a cache each of one model, instances "a" and "b"."""
    first, second = workers
    first.call("register", "a", model)
    second.call("register", "b", model)
    first.call("fill", "a", list(range(64)))
    second.call("poison", "b", list(range(64)))
    return first, second


def test_bytes_reach_another_process_in_other_blocks(
    pair: tuple[Worker, Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A worker reads another's chunks into other blocks."""
    first, second = pair
    tokens = prompt(3 * CHUNK)
    source = [5, 3, 9, 1, 20, 21, 22, 23, 40, 2, 41, 4]
    target = [63, 0, 62, 1, 10, 12, 11, 13, 30, 31, 32, 33]
    assert client.lookup(session, model, 1, tokens).num_chunks == 0
    stored = first.call("store", session, "a", 0, len(tokens), [source])
    assert (stored.num_stored, stored.num_present, stored.num_dropped) == (3, 0, 0)
    reader = SessionKey("other", "reader")
    assert client.lookup(reader, model, 1, tokens).num_tokens == len(tokens)
    written = second.call("retrieve", reader, "b", 0, len(tokens), [target])
    assert written.num_tokens == len(tokens)
    expected = first.call("read", "a", source)
    assert np.array_equal(second.call("read", "b", target), expected)
    rest = [b for b in range(64) if b not in target]
    assert (second.call("read", "b", rest) == POISON).all()
    client.end_session(reader)


def test_a_store_again_finds_its_chunks_present(
    pair: tuple[Worker, Worker], model: str, session: SessionKey, prompt: Prompt
) -> None:
    """The first bytes are kept; nothing is copied twice."""
    first, second = pair
    tokens, blocks = prompt(2 * CHUNK), list(range(8))
    first.call("store", session, "a", 0, len(tokens), [blocks], tokens)
    again = second.call("store", session, "b", 0, len(tokens), [blocks], tokens)
    assert (again.num_stored, again.num_present) == (0, 2)


def test_the_end_of_a_store_that_fills_no_chunk_is_left_out(
    pair: tuple[Worker, Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Only the whole chunk is stored and found."""
    first, _ = pair
    tokens = prompt(CHUNK + 40)
    blocks = list(range(7))
    stored = first.call("store", session, "a", 0, len(tokens), [blocks], tokens)
    assert stored.num_stored == 1
    assert client.lookup(session, model, 1, tokens).num_tokens == CHUNK
    short = first.call("store", session, "a", CHUNK, CHUNK + 40, [[4, 5, 6]])
    assert (short.num_stored, short.num_present, short.num_dropped) == (0, 0, 0)


@pytest.mark.parametrize("method", ["store", "retrieve"])
def test_what_cannot_be_copied_is_refused_by_name(
    pair: tuple[Worker, Worker], method: str, session: SessionKey, prompt: Prompt
) -> None:
    """A start inside a chunk, too few blocks, an id that does not exist."""
    first, _ = pair
    tokens, blocks = prompt(2 * CHUNK), list(range(8))

    def ask(start: int, blocks: list[list[int]]) -> None:
        first.call(method, session, "a", start, len(tokens), blocks, tokens)

    with pytest.raises(BadRequest, match="multiple of the chunk size"):
        ask(16, [blocks])
    with pytest.raises(BadRequest, match=r"blocks\[0\]: 28 bytes.* 8 int32 ids"):
        ask(0, [blocks[:7]])
    with pytest.raises(BadRequest, match="block 64: the cache has blocks 0 to 63"):
        ask(0, [[*blocks[:7], 64]])
    with pytest.raises(BadRequest, match="block -2"):
        ask(0, [[*blocks[:7], -2]])
    with pytest.raises(BadRequest, match="2 lists for 1 cache groups"):
        ask(0, [blocks, blocks])


def test_a_null_block_leaves_its_chunk_out_of_a_store(
    pair: tuple[Worker, Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Its chunk is dropped, the other one stored."""
    first, _ = pair
    tokens = prompt(2 * CHUNK)
    blocks = [0, 1, 2, 3, 4, -1, 6, 7]
    stored = first.call("store", session, "a", 0, len(tokens), [blocks], tokens)
    assert (stored.num_stored, stored.num_dropped) == (1, 1)
    assert client.lookup(session, model, 1, tokens).num_chunks == 1


@pytest.mark.parametrize("skip", [1, 17, CHUNK, CHUNK + 5])
def test_skipped_tokens_stay_as_they_are(
    pair: tuple[Worker, Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
    skip: int,
) -> None:
    """skip_first_n_tokens counts tokens, not blocks."""
    first, second = pair
    tokens, blocks = prompt(2 * CHUNK), list(range(8))
    first.call("store", session, "a", 0, len(tokens), [blocks], tokens)
    client.lookup(session, model, 1, tokens)
    written = second.call(
        "retrieve",
        session,
        "b",
        0,
        len(tokens),
        [blocks],
        skip_first_n_tokens=skip,
    )
    assert written.num_tokens == len(tokens) - skip
    # [blocks, L, K, slots, D] as [tokens, L, K, D]
    expected, found = (
        np.moveaxis(worker.call("read", name, blocks), 3, 1).reshape(-1, 2, 2, 32)
        for worker, name in ((first, "a"), (second, "b"))
    )
    assert (found[:skip] == POISON).all()
    assert np.array_equal(found[skip:], expected[skip:])
    assert client.status().num_leases == 0


def test_a_retrieve_that_lacks_a_chunk_writes_nothing(
    pair: tuple[Worker, Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A missing chunk in the middle fails the whole call; nothing stays held."""
    first, second = pair
    tokens, blocks = prompt(3 * CHUNK), list(range(12))
    first.call("store", session, "a", 0, CHUNK, [blocks[:4]], tokens)
    last = first.call("store", session, "a", 2 * CHUNK, 3 * CHUNK, [blocks[8:]], tokens)
    assert last.num_stored == 1
    assert client.lookup(session, model, 1, tokens).num_chunks == 1
    with pytest.raises(ChunksMissing):
        second.call("retrieve", session, "b", 0, 3 * CHUNK, [blocks], tokens)
    assert (second.call("read", "b", list(range(64))) == POISON).all()
    client.end_session(session)
    status = client.status()
    assert (status.num_leases, status.l1.num_leased) == (0, 0)


def test_one_worker_holds_several_instances(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A store of one is read by the other of the same process."""
    worker = workers[0]
    tokens, blocks = prompt(CHUNK), list(range(4))
    for name in ("one", "two"):
        worker.call("register", name, model)
        worker.call("fill", name, blocks, seed=ord(name[0]))
    worker.call("store", session, "one", 0, CHUNK, [blocks], tokens)
    client.lookup(session, model, 1, tokens)
    worker.call("retrieve", session, "two", 0, CHUNK, [blocks])
    one, two = (worker.call("read", name, blocks) for name in ("one", "two"))
    assert np.array_equal(one, two)
