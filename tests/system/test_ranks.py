"""Several ranks, replicated caches, cache groups with windows, opaque pages."""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.errors import BadRequest, ChunksMissing, LayoutConflict, UnknownModel
from kvcore.keys import SessionKey
from tests.system.conftest import Prompt, both_drivers
from tests.system.server_fixture import CHUNK
from tests.system.worker_process import (
    BLOCK,
    MLA,
    PAGES,
    PLAIN,
    POISON,
    Group,
    Worker,
)

driver = both_drivers

PER_CHUNK = CHUNK // BLOCK
ONE = list(range(PER_CHUNK))
OTHER = list(range(PER_CHUNK, 2 * PER_CHUNK))
HYBRID = (Group(), Group(shape=(1, 2, 0, BLOCK, 48), window=CHUNK + 1))
"""The window reaches into two chunks."""


@pytest.fixture
def ranks(workers: list[Worker], model: str) -> list[Worker]:
    """Two ranks of a model, instances "rank0" and "rank1"."""
    for rank, worker in enumerate(workers):
        worker.call("register", f"rank{rank}", model, rank=rank, world_size=2)
        worker.call("fill", f"rank{rank}", list(range(64)), seed=rank)
    return workers


def test_only_what_every_rank_stored_is_found(
    ranks: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A chunk that one rank lacks ends the hit."""
    tokens = prompt(2 * CHUNK)
    assert client.lookup(session, model, 2, tokens).num_chunks == 0
    ranks[0].call("store", session, "rank0", 0, len(tokens), [ONE + OTHER])
    assert client.lookup(session, model, 2, tokens).num_chunks == 0
    ranks[1].call("store", session, "rank1", 0, CHUNK, [ONE])
    assert client.lookup(session, model, 2, tokens).num_chunks == 1


def test_each_rank_reads_its_own_bytes(
    ranks: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """The lease ends when both ranks have read."""
    tokens = prompt(CHUNK)
    for rank, worker in enumerate(ranks):
        worker.call("store", session, f"rank{rank}", 0, CHUNK, [ONE], tokens)
    client.lookup(session, model, 2, tokens)
    for rank, worker in enumerate(ranks):
        waiting = client.status().leases[0].waiting_readers
        assert waiting == tuple(range(rank, 2))
        worker.call("retrieve", session, f"rank{rank}", 0, CHUNK, [OTHER])
        one, other = (worker.call("read", f"rank{rank}", b) for b in (ONE, OTHER))
        assert np.array_equal(one, other)
    assert client.status().num_leases == 0


def test_a_model_lacks_the_ranks_that_are_not_registered(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """An error and not a miss: before any, with one of two, after the last."""
    tokens = prompt(CHUNK)

    def fails(says: str) -> None:
        with pytest.raises(UnknownModel, match=says):
            client.lookup(session, model, 2, tokens)

    fails("no instance of model")
    workers[0].call("register", "r0", model, rank=0, world_size=2)
    fails("no instance of rank 1")
    workers[1].call("register", "r1", model, rank=1, world_size=2)
    assert client.lookup(session, model, 2, tokens).num_chunks == 0
    workers[0].call("unregister_kv_cache", "r0")
    fails("no instance of rank 0")
    workers[1].call("unregister_kv_cache", "r1")
    fails("no instance of model")
    with pytest.raises(UnknownModel):
        client.lookup(session, model, 1, tokens)


@pytest.mark.parametrize("writer", [0, 1])
def test_a_replicated_part_is_stored_once_for_all(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
    writer: int,
) -> None:
    """Any rank may store; all read it, and the lease ends with the last."""
    tokens = prompt(CHUNK)
    for rank, worker in enumerate(workers):
        name = f"mla{rank}"
        worker.call("register", name, model, MLA, rank=rank, world_size=2)
        worker.call("fill", name, ONE, seed=rank)
        worker.call("poison", name, OTHER)
    order = [writer, 1 - writer]
    stored = [
        workers[rank].call("store", session, f"mla{rank}", 0, CHUNK, [ONE], tokens)
        for rank in order
    ]
    assert [(s.num_stored, s.num_present) for s in stored] == [(1, 0), (0, 1)]
    expected = workers[writer].call("read", f"mla{writer}", ONE)
    assert client.lookup(session, model, 2, tokens).num_chunks == 1
    for rank in order:
        assert client.status().num_leases == 1
        workers[rank].call("retrieve", session, f"mla{rank}", 0, CHUNK, [OTHER])
        assert np.array_equal(workers[rank].call("read", f"mla{rank}", OTHER), expected)
    assert client.status().num_leases == 0


def store_hybrid(
    worker: Worker, session: SessionKey, tokens: list[int], windows: list[bool]
) -> None:
    """Store chunks; those of the window group only where given."""
    blocks = list(range(len(windows) * PER_CHUNK))
    there = [b if windows[b // PER_CHUNK] else -1 for b in blocks]
    stored = worker.call("store", session, "h", 0, len(tokens), [blocks, there], tokens)
    assert stored.num_stored == len(windows) + sum(windows)
    assert stored.num_dropped == len(windows) - sum(windows)


@pytest.mark.parametrize(
    ("windows", "hit"),
    [
        ([True, True, True, True], 4),
        ([False, False, True, True], 4),  # older window parts are never read
        ([True, True, False, True], 2),  # the last window has a hole
        ([True, False, True, False], 1),  # one chunk needs only itself
        ([False, True, False, True], 0),
    ],
)
def test_a_hit_needs_the_window_before_its_end(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
    windows: list[bool],
    hit: int,
) -> None:
    """It needs all full-attention parts; older window parts may be missing."""
    worker, tokens = workers[0], prompt(4 * CHUNK)
    worker.call("register", "h", model, HYBRID)
    store_hybrid(worker, session, tokens, windows)
    assert client.lookup(session, model, 1, tokens).num_chunks == hit


def test_blocks_out_of_the_window_are_not_written(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """They are null blocks, and their parts may be missing."""
    worker, tokens = workers[0], prompt(3 * CHUNK)
    source = list(range(12))
    target = list(range(20, 32))
    worker.call("register", "h", model, HYBRID)
    worker.call("fill", "h", source)
    worker.call("poison", "h", target)
    store_hybrid(worker, session, tokens, [False, True, True])
    assert client.lookup(session, model, 1, tokens).num_chunks == 3
    # Seven blocks, inside the second chunk: a part is read where its window begins.
    inside = [-1] * 7 + target[7:]
    worker.call("retrieve", session, "h", 0, len(tokens), [target, inside])
    full, window = (worker.call("read", "h", source, group) for group in (0, 1))
    assert np.array_equal(worker.call("read", "h", target, 0), full)
    found = worker.call("read", "h", target, 1)
    assert (found[:7] == POISON).all()
    assert np.array_equal(found[7:], window[7:])
    with pytest.raises(ChunksMissing):
        worker.call("retrieve", session, "h", 0, len(tokens), [target, target])
    with pytest.raises(BadRequest, match=r"blocks\[0\]: a null block"):
        worker.call("retrieve", session, "h", 0, len(tokens), [inside, inside])


@pytest.fixture
def paged(workers: list[Worker], model: str) -> Worker:
    """A worker with opaque pages, instance "p", its first blocks filled."""
    worker = workers[0]
    worker.call("register", "p", model, PAGES)
    worker.call("fill", "p", ONE + OTHER)
    worker.call("poison", "p", list(range(20, 28)))
    return worker


@pytest.mark.parametrize(("skip", "end"), [(5, 2 * CHUNK), (0, CHUNK + 5)])
def test_pages_are_not_cut(
    paged: Worker, session: SessionKey, prompt: Prompt, skip: int, end: int
) -> None:
    """Skip and end must be multiples of the block; the error says so."""
    tokens = prompt(2 * CHUNK)
    paged.call("store", session, "p", 0, len(tokens), [ONE + OTHER], tokens)
    with pytest.raises(BadRequest, match="whole blocks of 16 tokens only"):
        paged.call(
            "retrieve",
            session,
            "p",
            0,
            end,
            [list(range(20, 28))],
            skip_first_n_tokens=skip,
        )
    assert (paged.call("read", "p", list(range(20, 28))) == POISON).all()


def test_the_last_chunk_of_pages_is_written_in_part(
    paged: Worker, session: SessionKey, prompt: Prompt
) -> None:
    """Five blocks of eight, the first of them skipped."""
    tokens = prompt(2 * CHUNK)
    paged.call("store", session, "p", 0, len(tokens), [ONE + OTHER], tokens)
    target, end = list(range(20, 25)), CHUNK + BLOCK
    written = paged.call(
        "retrieve", session, "p", 0, end, [target], skip_first_n_tokens=BLOCK
    )
    assert written.num_tokens == CHUNK
    found = paged.call("read", "p", list(range(20, 28)))
    assert (found[[0, 5, 6, 7]] == POISON).all()
    assert np.array_equal(found[1:5], paged.call("read", "p", [1, 2, 3, 4]))


def test_groups_must_be_the_same_on_every_rank(
    workers: list[Worker], model: str
) -> None:
    """A rank with other cache groups than the live ones is refused."""
    workers[0].call("register", "g0", model, HYBRID, rank=0, world_size=2)
    with pytest.raises(LayoutConflict, match="rank 1 would lay out"):
        workers[1].call("register", "g1", model, PLAIN, rank=1, world_size=2)
