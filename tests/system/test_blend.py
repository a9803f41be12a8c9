"""Documents between processes: stored once, found and read at any position."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvcore.blend.blend_client import BlendClient
from kvcore.client import KVClient
from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    DeadlineExceeded,
    HandleError,
    LayoutConflict,
    LayoutError,
    TokensNeeded,
    UnknownInstance,
    UnknownModel,
    UnknownRequest,
)
from kvcore.keys import ExtraKey, SessionKey
from kvcore.protocol import (
    CBLookupReply,
    CBMatch,
    CBRange,
    CBRegisterKVCache,
    CBUnregisterKVCache,
    Private,
)
from kvcore.rope import Rope
from tests.system.blend_worker import SHAPE, BlendWorkerCommands
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK, Server, connect, wait_until
from tests.system.worker_process import BLOCK, PAGES, PLAIN, POISON, Worker

ROOT = Path(__file__).resolve().parents[2]
SLOTS = SHAPE[2]
Values = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server that finds documents anywhere."""
    server = serve("--engine", "blend")
    yield server
    server.close()


@pytest.fixture(scope="module")
def blend(client: KVClient) -> BlendClient:
    """The test's blend client, which acts as the scheduler."""
    return BlendClient(client)


@pytest.fixture(scope="module")
def workers(server: Server) -> Iterator[list[Worker]]:
    """Two workers with buffers."""
    both = [Worker(server.address, BlendWorkerCommands) for _ in range(2)]
    for worker in both:
        worker.receive()
    yield both
    for worker in both:
        worker.close()


@pytest.fixture
def pair(workers: list[Worker], model: str) -> Iterator[tuple[Worker, Worker]]:
    """Two workers with a buffer each of one model, instances "a" and "b"."""
    first, second = workers
    first.call("register_buffer", "a", model)
    second.call("register_buffer", "b", model)
    yield first, second
    first.call("blend", "unregister", "a")
    second.call("blend", "unregister", "b")


def fresh(num_tokens: int, seed: int) -> Values:
    """Make the KV of some tokens, `[K, L, tokens, D]`."""
    shape = (*SHAPE[:2], num_tokens, SHAPE[3])
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def put(worker: Worker, tokens: list[int], seed: int, offset: int = 0) -> Values:
    """Compute a document's KV in buffer "a" and store it; return the KV."""
    values = fresh(len(tokens), seed)
    worker.call("write", "a", offset, values)
    worker.call("blend", "store_pre_computed", "a", offset, tokens)
    return values


def where(found: CBLookupReply) -> list[tuple[int, int]]:
    """Return the ranges."""
    return [(found.start, found.end) for found in found.ranges]


# -- start-up and control -------------------------------------------------------------


def test_it_serves_what_a_normal_server_does(client: KVClient) -> None:
    """Control requests work as on any server, and counters include documents."""
    assert client.get_chunk_size() == CHUNK
    assert client.ping().monotonic_ns > 0
    assert client.clear().num_kept == 0
    assert "document_chunks" in client.status().counters


def test_a_prefix_server_names_the_flag(serve: Callable[..., Server]) -> None:
    """A blend request to a server without documents says how to start one."""
    server = serve()
    with (
        connect(server.address) as client,
        pytest.raises(
            UnknownRequest, match=r"CB_UNREGISTER_KV_CACHE: .* --engine blend"
        ),
    ):
        client.call(CBUnregisterKVCache("x"))
    server.close()


# -- registration ---------------------------------------------------------------------


def test_a_buffer_is_registered_and_forgotten(
    workers: list[Worker], client: KVClient, model: str
) -> None:
    """It is listed with its layout until it is unregistered."""
    reply = workers[0].call("register_buffer", "a", model)
    assert reply.chunk_bytes == math.prod(SHAPE) // SLOTS * CHUNK
    (listed,) = client.status().instances
    assert (listed.instance_id, listed.model, listed.rank) == ("a", model, 0)
    assert listed.group_fingerprints == reply.fingerprints
    workers[0].call("blend", "unregister", "a")
    assert client.status().instances == ()


def test_several_buffers_of_several_workers(
    pair: tuple[Worker, Worker], client: KVClient, model: str
) -> None:
    """Instances are separate; an id belongs to its worker while that lives."""
    first, second = pair
    first.call("register_buffer", "c", model, shape=(2, 2, CHUNK, 32))
    assert {i.instance_id for i in client.status().instances} == {"a", "b", "c"}
    with pytest.raises(UnknownInstance, match="'c'"):
        second.call("blend", "unregister", "c")
    first.call("blend", "unregister", "c")
    first.call("register_buffer", "a", model)
    assert {i.instance_id for i in client.status().instances} == {"a", "b"}


def test_an_unknown_instance_is_a_clear_answer(
    pair: tuple[Worker, Worker], prompt: Prompt
) -> None:
    """Each request's error names the instance; other instances work."""
    first, _ = pair
    key = SessionKey("e", "unknown")
    for method, *arguments in (
        ("unregister", "nobody"),
        ("store_pre_computed", "nobody", 0, [1]),
        ("retrieve_pre_computed", key, "nobody", 0),
        ("store_final", key, "nobody", 0, 0, 0),
    ):
        with pytest.raises(UnknownInstance, match="'nobody'"):
            first.call("blend", method, *arguments)
    put(first, prompt(CHUNK), 1)


def test_a_paged_cache_is_no_buffer(pair: tuple[Worker, Worker], model: str) -> None:
    """The error of a blend request names it; the cache stays registered."""
    first, _ = pair
    first.call("register", "paged", model)
    with pytest.raises(UnknownInstance, match="'paged' is a paged cache"):
        first.call("blend", "unregister", "paged")
    with pytest.raises(UnknownInstance, match="'paged' is a paged cache"):
        first.call("blend", "store_pre_computed", "paged", 0, [1])
    first.call("unregister_kv_cache", "paged")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"shape": (2, 2, 64)}, LayoutError, r"a blend buffer is \[2, L, T, D\]"),
        ({"shape": (3, 2, 64, 8)}, LayoutError, "a blend buffer is"),
        ({"dtype": "complex64"}, LayoutError, "dtype 'complex64'"),
        ({"rank": 1}, BadRequest, "rank 1 of a world size of 1"),
        ({"rope": Rope(1e4, 8, 8)}, LayoutError, "keys of uint8 cannot be rotated"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused(
    workers: list[Worker], model: str, options: dict, error: type, says: str
) -> None:
    """Each wrong field is named, and nothing is registered."""
    with pytest.raises(error, match=says):
        workers[0].call("register_buffer", "wrong", model, **options)
    with pytest.raises(UnknownInstance):
        workers[0].call("blend", "unregister", "wrong")


def test_a_buffer_that_its_worker_keeps_to_itself_is_refused(
    blend: BlendClient, model: str
) -> None:
    """The server copies for these requests, so it must reach the memory."""
    handle = Private(math.prod(SHAPE))
    request = CBRegisterKVCache("kept", "e", model, 1, 0, handle, SHAPE, "uint8")
    with pytest.raises(HandleError, match="the server must be able to open"):
        blend.register(request)


def test_a_buffer_larger_than_its_memory_is_refused(
    pair: tuple[Worker, Worker], model: str
) -> None:
    """The shape is checked against the size of the handle."""
    first, _ = pair
    with pytest.raises(LayoutError, match="ends at byte"):
        first.call("register_buffer", "short", model, missing=1)


def test_opaque_pages_and_a_buffer_of_one_model_are_refused(
    pair: tuple[Worker, Worker], model: str
) -> None:
    """Their parts have another layout: the error names both."""
    first, _ = pair
    with pytest.raises(LayoutConflict, match=r"page .* token "):
        first.call("register", "pages", model, PAGES)


# -- stores ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [(3 * CHUNK, 3), (2 * CHUNK + 1, 2), (CHUNK - 1, 0), (0, 0)],
)
def test_whole_chunks_are_stored(
    pair: tuple[Worker, Worker], prompt: Prompt, num_tokens: int, chunks: int
) -> None:
    """A partial tail, or a document shorter than a chunk, is left out."""
    first, _ = pair
    tokens = prompt(num_tokens)
    stored = first.call("blend", "store_pre_computed", "a", 5, tokens)
    assert (stored.num_stored, stored.num_dropped) == (chunks, 0)


def test_storing_twice_changes_nothing(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """The first bytes are kept, and the index does not grow."""
    first, second = pair
    tokens = prompt(2 * CHUNK)
    values = put(first, tokens, 1)
    chunks = client.status().counters["document_chunks"]
    first.call("write", "a", 0, fresh(2 * CHUNK, 2))
    stored = first.call("blend", "store_pre_computed", "a", 0, tokens)
    assert (stored.num_stored, stored.num_present) == (0, 2)
    assert client.status().counters["document_chunks"] == chunks
    found = blend.lookup_pre_computed(session, model, 1, tokens)
    second.call(
        "blend", "retrieve_pre_computed", session, "b", 0, matches=found.matches
    )
    assert np.array_equal(second.call("read_slots", "b", 0, 2 * CHUNK), values)


def test_slots_that_the_buffer_lacks_are_refused(
    pair: tuple[Worker, Worker], session: SessionKey, prompt: Prompt
) -> None:
    """A store, a final store and a retrieve beyond the end are refused."""
    first, _ = pair
    tokens = prompt(2 * CHUNK)
    match = CBMatch(0, CHUNK, bytes(32))
    offset = SLOTS - 2 * CHUNK + 1
    for method, *arguments in (
        ("store_pre_computed", "a", offset, tokens),
        ("store_final", session, "a", offset, 0, 2 * CHUNK, tokens),
    ):
        with pytest.raises(BadRequest, match=f"the buffer has {SLOTS}"):
            first.call("blend", method, *arguments)
    with pytest.raises(BadRequest, match=f"the buffer has {SLOTS}"):
        first.call(
            "blend", "retrieve_pre_computed", session, "a", offset, matches=[match]
        )


# -- lookups --------------------------------------------------------------------------


def test_documents_are_found_in_any_order_between_glue(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Ranges are in the prompt's order, with old and new positions."""
    first, _ = pair
    one, two = prompt(2 * CHUNK + 3), prompt(3 * CHUNK)
    put(first, one, 1)
    put(first, two, 2, offset=77)
    text = [*prompt(10), *two, *prompt(33), *one, *prompt(5)]
    found = blend.lookup_pre_computed(session, model, 1, text)
    at_one = 10 + 3 * CHUNK + 33
    assert where(found) == [(10, 10 + 3 * CHUNK), (at_one, at_one + 2 * CHUNK)]
    assert found.num_tokens == 5 * CHUNK
    assert [(m.old_start, m.start) for m in found.matches] == [
        *((i * CHUNK, 10 + i * CHUNK) for i in range(3)),
        *((i * CHUNK, at_one + i * CHUNK) for i in range(2)),
    ]


def test_a_part_of_a_document_is_found(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Whole chunks of its middle are found by their tokens."""
    first, _ = pair
    tokens = prompt(4 * CHUNK)
    put(first, tokens, 1)
    text = [*prompt(7), *tokens[CHUNK - 5 : 3 * CHUNK + 5], *prompt(7)]
    found = blend.lookup_pre_computed(session, model, 1, text)
    assert where(found) == [(12, 12 + 2 * CHUNK)]
    assert [match.old_start for match in found.matches] == [CHUNK, 2 * CHUNK]


def test_the_longest_of_documents_with_a_common_chunk_wins(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """If a chunk is in several documents, the longest match is returned."""
    first, _ = pair
    head, shared, tail = prompt(CHUNK), prompt(CHUNK), prompt(CHUNK)
    put(first, [*shared], 1)
    put(first, [*head, *shared, *tail], 2)
    put(first, [*tail, *shared], 3)
    text = [*prompt(9), *shared, *tail]
    found = blend.lookup_pre_computed(session, model, 1, text)
    assert [match.old_start for match in found.matches] == [CHUNK, 2 * CHUNK]


@pytest.mark.parametrize("num_tokens", [0, 5, CHUNK - 1, 4 * CHUNK])
def test_nothing_is_found_where_nothing_is(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
    num_tokens: int,
) -> None:
    """An empty, a short or a foreign prompt has no ranges and gets no lease."""
    put(pair[0], prompt(2 * CHUNK), 1)
    found = blend.lookup_pre_computed(session, model, 1, prompt(num_tokens))
    assert found == CBLookupReply((), (), 0)
    assert client.status().num_leases == 0


def test_a_model_that_nobody_registered_is_an_error(
    pair: tuple[Worker, Worker], blend: BlendClient, model: str, session: SessionKey
) -> None:
    """Another model, or another world size of this one."""
    for name, world_size in (("nobody's", 1), (model, 2)):
        with pytest.raises(UnknownModel, match=f"{name}.*world size {world_size}"):
            blend.lookup_pre_computed(session, name, world_size, [1, 2, 3])


def test_documents_and_prefixes_are_apart(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A normal lookup finds no document, and a blend lookup no prefix."""
    first, _ = pair
    document, text = prompt(2 * CHUNK), prompt(2 * CHUNK)
    put(first, document, 1)
    assert client.lookup(session, model, 1, document).num_chunks == 0
    other = SessionKey("e", "apart")
    first.call("blend", "store_final", other, "a", 0, 0, len(text), text)
    assert blend.lookup_pre_computed(session, model, 1, text).num_tokens == 0
    client.end_session(other)
    found = client.lookup(session, model, 1, text)
    assert found.num_chunks == 2
    client.end_session(session)
    assert blend.lookup_pre_computed(session, model, 1, document).num_tokens


SALTS = tuple((ExtraKey(0, b'["salt", "%s"]' % name),) for name in (b"a", b"b"))


def test_tenants_never_see_each_others_documents(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Equal tokens under another salt, or none, are other documents with other KV."""
    first, second = pair
    tokens = prompt(2 * CHUNK)
    text = [*prompt(9), *tokens]
    truth: dict[tuple[ExtraKey, ...], Values] = {}
    for seed, extras in enumerate(((), *SALTS)):
        found = blend.lookup_pre_computed(session, model, 1, text, extras=extras)
        assert found == CBLookupReply((), (), 0)
        truth[extras] = values = fresh(2 * CHUNK, seed)
        first.call("write", "a", 0, values)
        first.call("blend", "store_pre_computed", "a", 0, tokens, extras=extras)
    for extras, values in truth.items():
        found = blend.lookup_pre_computed(session, model, 1, text, extras=extras)
        assert where(found) == [(9, 9 + 2 * CHUNK)]
        second.call(
            "blend", "retrieve_pre_computed", session, "b", 0, ranges=found.ranges
        )
        read = second.call("read_slots", "b", 9, 9 + 2 * CHUNK)
        assert np.array_equal(read, values)
        client.end_session(session)
        second.call(  # Found again, from the prompt and its extras.
            *("blend", "retrieve_pre_computed", session, "b", 50),
            ranges=found.ranges,
            tokens=text,
            extras=extras,
        )
        read = second.call("read_slots", "b", 59, 59 + 2 * CHUNK)
        assert np.array_equal(read, values)
        client.end_session(session)


def test_material_in_the_middle_ends_what_is_stored_and_found(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """An image at a later token ends a document, and no match follows it."""
    first, _ = pair
    tokens = prompt(3 * CHUNK)
    image = (ExtraKey(2 * CHUNK + 5, b"image"),)
    stored = first.call(
        "blend", "store_pre_computed", "a", 0, tokens, extras=(*SALTS[0], *image)
    )
    assert stored.num_stored == 2
    assert not blend.lookup_pre_computed(session, model, 1, tokens).matches
    text = [*tokens[: 2 * CHUNK], *prompt(9), *tokens[: 2 * CHUNK]]
    extras = (*SALTS[0], ExtraKey(2 * CHUNK + 9, b"image"))
    found = blend.lookup_pre_computed(session, model, 1, text, extras=extras)
    assert where(found) == [(0, 2 * CHUNK)]
    found = blend.lookup_pre_computed(session, model, 1, text, extras=SALTS[0])
    assert len(found.ranges) == 2


def test_a_hash_of_another_model_reaches_nothing(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A chunk of a session's lookup is retrieved in no other session."""
    first, second = pair
    first.call("register_buffer", "c", f"{model}-other")
    tokens = prompt(CHUNK)
    first.call("blend", "store_pre_computed", "c", 0, tokens)
    found = blend.lookup_pre_computed(session, f"{model}-other", 1, tokens)
    other = SessionKey("e", "other")
    put(first, tokens, 1)
    assert blend.lookup_pre_computed(other, model, 1, tokens).num_tokens == CHUNK
    with pytest.raises(ChunksMissing, match="found no such chunk at token 0"):
        second.call(
            "blend", "retrieve_pre_computed", other, "b", 0, matches=found.matches
        )
    assert (second.call("read_slots", "b", 0, SLOTS) == POISON).all()
    blend.client.end_session(other)
    first.call("blend", "unregister", "c")


def test_every_rank_must_have_stored(
    workers: list[Worker],
    blend: BlendClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """With two ranks a chunk is found when both have stored it."""
    for rank, (worker, name) in enumerate(zip(workers, "ab", strict=True)):
        worker.call("register_buffer", name, model, rank=rank, world_size=2)
    tokens = prompt(2 * CHUNK)
    workers[0].call("blend", "store_pre_computed", "a", 0, tokens)
    assert not blend.lookup_pre_computed(session, model, 2, tokens).matches
    workers[1].call("blend", "store_pre_computed", "b", 0, tokens[:CHUNK])
    found = blend.lookup_pre_computed(session, model, 2, tokens)
    assert where(found) == [(0, CHUNK)]
    for worker, name in zip(workers, "ab", strict=True):
        worker.call(
            "blend", "retrieve_pre_computed", session, name, 0, ranges=found.ranges
        )
    assert blend.client.status().num_leases == 0
    for worker, name in zip(workers, "ab", strict=True):
        worker.call("blend", "unregister", name)


def test_a_chunk_that_was_dropped_is_no_longer_found(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A clear shrinks the index, which accepts the document again."""
    first, _ = pair
    tokens = prompt(3 * CHUNK)
    put(first, tokens, 1)
    client.clear()
    assert not blend.lookup_pre_computed(session, model, 1, tokens).matches
    assert client.status().counters["document_chunks"] == 0
    put(first, tokens, 1)
    assert len(blend.lookup_pre_computed(session, model, 1, tokens).matches) == 3


def test_eviction_takes_documents_out_of_the_index(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """When L1 is full the oldest are removed; found ones are held until the end."""
    first, _ = pair
    held, old = prompt(2 * CHUNK), prompt(2 * CHUNK)
    put(first, held, 1)
    put(first, old, 2)
    found = blend.lookup_pre_computed(session, model, 1, held)
    evicted = client.status().counters["chunks_evicted"]
    size = 15 * CHUNK
    for _ in range((8 << 20) // (size * 128) + 2):
        first.call("blend", "store_pre_computed", "a", 0, prompt(size))
    status = client.status()
    assert status.counters["chunks_evicted"] > evicted
    assert status.counters["document_chunks"] <= status.l1.num_chunks
    other = SessionKey("e", "evicted")
    assert not blend.lookup_pre_computed(other, model, 1, old).matches
    assert blend.lookup_pre_computed(other, model, 1, held).matches == found.matches
    client.end_session(other)


# -- retrieves ------------------------------------------------------------------------


def test_ranges_land_at_their_places_and_nothing_else_changes(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Bytes of two documents are right at an offset; other slots are unchanged."""
    first, second = pair
    one, two = prompt(2 * CHUNK), prompt(CHUNK)
    of_one, of_two = put(first, one, 1), put(first, two, 2)
    text = [*prompt(11), *two, *prompt(3), *one]
    found = blend.lookup_pre_computed(session, model, 1, text)
    expected = np.full((*SHAPE[:2], SLOTS, SHAPE[3]), POISON, np.uint8)
    offset, after = 100, 100 + 11 + CHUNK + 3
    expected[:, :, offset + 11 : offset + 11 + CHUNK] = of_two
    expected[:, :, after : after + 2 * CHUNK] = of_one
    for what in ({"ranges": found.ranges}, {"matches": found.matches[::-1]}):
        second.call("poison_all", "b")
        retrieved = second.call(
            "blend", "retrieve_pre_computed", session, "b", offset, **what
        )
        assert retrieved.num_tokens == 3 * CHUNK
        assert np.array_equal(second.call("read_slots", "b", 0, SLOTS), expected)


def test_a_retrieve_ends_the_lease_when_all_was_read(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """In several retrieves, beside the session's lease on its prefix."""
    first, second = pair
    one, two = prompt(CHUNK), prompt(CHUNK)
    put(first, one, 1)
    put(first, two, 2)
    text = [*one, *prompt(3), *two]
    writer = SessionKey("e", "writer")
    first.call("blend", "store_final", writer, "a", 0, 0, len(text), text)
    client.end_session(writer)
    assert client.lookup(session, model, 1, text).num_chunks == 2
    found = blend.lookup_pre_computed(session, model, 1, text)
    assert client.status().num_leases == 2
    for left, wanted in zip((2, 1), found.ranges, strict=True):
        second.call("blend", "retrieve_pre_computed", session, "b", 0, ranges=[wanted])
        assert client.status().num_leases == left
    client.end_session(session)
    assert client.status().num_leases == 0


def test_one_missing_chunk_fails_the_whole_retrieve(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Nothing is written or held, and the lease is unchanged."""
    first, second = pair
    tokens = prompt(2 * CHUNK)
    put(first, tokens, 1)
    found = blend.lookup_pre_computed(session, model, 1, tokens)
    held = client.status().l1.num_leased
    missing = CBMatch(0, 5 * CHUNK, b"m" * 32)
    with pytest.raises(ChunksMissing):
        second.call(
            "blend",
            "retrieve_pre_computed",
            session,
            "b",
            0,
            matches=[*found.matches, missing],
        )
    ranges = [CBRange(0, 3 * CHUNK)]
    with pytest.raises(ChunksMissing, match=f"at token {2 * CHUNK} of range 0"):
        second.call("blend", "retrieve_pre_computed", session, "b", 0, ranges=ranges)
    assert (second.call("read_slots", "b", 0, SLOTS) == POISON).all()
    assert client.status().l1.num_leased == held


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (
            {"matches": [CBMatch(0, 0, bytes(32)), CBMatch(0, 9, bytes(32))]},
            "the same slots",
        ),
        (
            {"matches": [CBMatch(0, 0, bytes(32))], "ranges": [CBRange(0, CHUNK)]},
            "ranges or matches, not both",
        ),
        ({"matches": [CBMatch(0, 0, bytes(32))], "rotate_keys": True}, "without rope"),
        ({"matches": [CBMatch(0, 2**63, bytes(32))]}, "the buffer has"),
        ({"matches": [CBMatch(0, 2**64 - 1, bytes(32))]}, "the buffer has"),
    ],
)
def test_a_retrieve_that_cannot_be_is_refused(
    pair: tuple[Worker, Worker], session: SessionKey, what: dict, says: str
) -> None:
    """The error says what is invalid; nothing is written."""
    with pytest.raises(BadRequest, match=says):
        pair[0].call("blend", "retrieve_pre_computed", session, "a", 0, **what)


def test_ranges_of_a_forgotten_lookup_need_the_prompt(
    pair: tuple[Worker, Worker],
    client: KVClient,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """The server says so; a client that has the prompt sends it automatically."""
    first, second = pair
    tokens = prompt(2 * CHUNK)
    values = put(first, tokens, 1)
    text = [*prompt(4), *tokens]
    ranges = [CBRange(4, 4 + 2 * CHUNK)]
    with pytest.raises(TokensNeeded):
        second.call("blend", "retrieve_pre_computed", session, "b", 0, ranges=ranges)
    second.call(
        "blend", "retrieve_pre_computed", session, "b", 0, ranges=ranges, tokens=text
    )
    assert np.array_equal(second.call("read_slots", "b", 4, 4 + 2 * CHUNK), values)
    client.end_session(session)


def test_nothing_is_a_retrieve_of_nothing(
    pair: tuple[Worker, Worker], session: SessionKey
) -> None:
    """No ranges and no matches: nothing is written."""
    reply = pair[0].call("blend", "retrieve_pre_computed", session, "a", 0)
    assert reply.num_tokens == 0


def test_what_comes_too_late_does_nothing(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    server: Server,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A retrieve and a store past their deadline at a stopped server."""
    first, second = pair
    tokens = prompt(CHUNK)
    put(first, tokens, 1)
    found = blend.lookup_pre_computed(session, model, 1, tokens)
    server.pause()
    other = prompt(CHUNK)
    second.send(
        "blend",
        "retrieve_pre_computed",
        session,
        "b",
        0,
        matches=found.matches,
        timeout_s=0.05,
    )
    with pytest.raises(DeadlineExceeded):
        first.call("blend", "store_pre_computed", "a", 0, other, timeout_s=0.05)
    server.resume()
    with pytest.raises(DeadlineExceeded):
        second.receive()
    assert (second.call("read_slots", "b", 0, SLOTS) == POISON).all()
    late = SessionKey("e", "late")
    assert not blend.lookup_pre_computed(late, model, 1, other).matches


def test_a_killed_worker_leaves_nothing(
    pair: tuple[Worker, Worker],
    blend: BlendClient,
    client: KVClient,
    server: Server,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Its buffer and its pending reads are removed; documents stay."""
    third = Worker(server.address, BlendWorkerCommands)
    third.receive()
    third.call("register_buffer", "killed", model)
    tokens = prompt(CHUNK)
    put(pair[0], tokens, 1)
    blend.lookup_pre_computed(session, model, 1, tokens)
    third.kill()
    wait_until(lambda: client.status().num_leases == 0)
    assert {i.instance_id for i in client.status().instances} == {"a", "b"}
    assert blend.lookup_pre_computed(session, model, 1, tokens).matches
    third.close()


# -- keys -----------------------------------------------------------------------------


def test_keys_turn_when_asked_to(
    workers: list[Worker],
    blend: BlendClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """K moves to its new positions, V and other slots stay; off by default."""
    worker = workers[0]
    rope = Rope(theta=1e4, head_dim=8, rotary_dim=8)
    shape = (2, 2, 4 * CHUNK, 16)
    worker.call("register_buffer", "a", model, shape=shape, dtype="float32", rope=rope)
    rng = np.random.default_rng(3)
    values = rng.normal(size=(2, 2, 2 * CHUNK, 16)).astype(np.float32)
    tokens = prompt(2 * CHUNK)
    worker.call("write", "a", 0, values)
    worker.call("blend", "store_pre_computed", "a", 0, tokens)
    text = [*prompt(21), *tokens]
    found = blend.lookup_pre_computed(session, model, 1, text)
    for rotate_keys in (False, True):
        worker.call("poison_all", "a")
        worker.call(
            "blend",
            "retrieve_pre_computed",
            session,
            "a",
            30,
            ranges=found.ranges,
            rotate_keys=rotate_keys,
        )
        expected = turned(values, rope, 21) if rotate_keys else values
        actual = worker.call("read_slots", "a", 51, 51 + 2 * CHUNK)
        assert np.allclose(actual[0], expected[0], rtol=0, atol=1e-6)
        assert np.array_equal(actual[1], values[1])
        rest = worker.call("read_slots", "a", 0, 51)
        assert (rest.view(np.uint8) == POISON).all()
    worker.call("blend", "unregister", "a")


def turned(values: npt.NDArray[np.float32], rope: Rope, distance: int) -> npt.NDArray:
    """Rotate K, `[K, L, tokens, heads x D]`, in double precision."""
    heads = values.astype(np.float64).reshape(*values.shape[:3], -1, 2, 4)
    angle = distance * rope.frequencies()
    real = heads[..., 0, :] * np.cos(angle) - heads[..., 1, :] * np.sin(angle)
    imaginary = heads[..., 0, :] * np.sin(angle) + heads[..., 1, :] * np.cos(angle)
    return np.stack((real, imaginary), axis=-2).reshape(values.shape)


# -- final stores ---------------------------------------------------------------------


def test_a_final_store_is_seen_by_normal_lookups(
    pair: tuple[Worker, Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A normal worker looks it up and reads it into its paged cache."""
    first, second = pair
    tokens = prompt(2 * CHUNK + 5)
    values = fresh(2 * CHUNK, 9)
    first.call("write", "a", 40, values)
    writer = SessionKey("e", "final")
    stored = first.call("blend", "store_final", writer, "a", 40, 0, CHUNK, tokens)
    assert (stored.num_stored, stored.num_dropped) == (1, 0)
    stored = first.call(
        "blend", "store_final", writer, "a", 40, CHUNK, len(tokens), tokens
    )
    assert stored.num_stored == 1
    client.end_session(writer)
    second.call("register", "paged", model, PLAIN)
    assert client.lookup(session, model, 1, tokens).num_chunks == 2
    blocks = list(range(20, 20 + 2 * CHUNK // BLOCK))
    second.call("retrieve", session, "paged", 0, 2 * CHUNK, [blocks])
    read = second.call("read", "paged", blocks)  # [blocks, L, K, S, D]
    layers = np.moveaxis(read, 0, 2).reshape(2, 2, 2 * CHUNK, 32)
    assert np.array_equal(layers.swapaxes(0, 1), values)
    second.call("unregister_kv_cache", "paged")


def test_the_example_of_the_documents_runs(server: Server) -> None:
    """The code of docs/blend.md runs against a server with small chunks."""
    text = (ROOT / "docs" / "blend.md").read_text()
    _, code, _ = re.split(
        "```(?:python)?\\n", text[text.index("```python") :], maxsplit=2
    )
    code = code.replace("tcp://127.0.0.1:5555", server.address)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stored, found, final, prefix = done.stdout.splitlines()
    assert stored == "StoreReply(num_stored=9, num_present=0, num_dropped=0)"
    assert found == "(CBRange(start=100, end=676),) 576"
    assert final == "StoreReply(num_stored=11, num_present=0, num_dropped=0)"
    assert prefix.startswith("LookupReply(num_chunks=11, num_tokens=704")


# -- the other matcher ----------------------------------------------------------------

START, END = 7, 8


@pytest.fixture(scope="module")
def separated(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server that looks up paragraphs."""
    server = serve(
        *("--engine", "blend", "--set", "blend.matcher=separated"),
        *("--set", f"blend.start=[[{START}]]", "--set", f"blend.end=[[{END}]]"),
    )
    yield server
    server.close()


def test_paragraphs_are_looked_up_each_on_its_own(
    separated: Server, prompt: Prompt
) -> None:
    """Of many paragraphs, the stored leading chunks are found, in order."""
    worker = Worker(separated.address, BlendWorkerCommands)
    worker.receive()
    worker.call("register_buffer", "a", "m")
    documents = [prompt(size) for size in (2 * CHUNK, CHUNK + 9, CHUNK - 1, 3 * CHUNK)]
    values = [put(worker, tokens, seed) for seed, tokens in enumerate(documents)]
    text, starts = prompt(13), []
    order = [3, 0, 2, 1, 0]
    for number in order:
        starts.append(len(text) + 1)
        text += [START, *documents[number], END, *prompt(number)]
    text += documents[0]  # In no paragraph.
    with connect(separated.address) as client:
        session = SessionKey("e", "separated")
        found = BlendClient(client).lookup_pre_computed(session, "m", 1, text)
        chunks = [len(document) // CHUNK for document in documents]
        expected = [
            (start, start + chunks[number] * CHUNK)
            for start, number in zip(starts, order, strict=True)
            if chunks[number]
        ]
        assert where(found) == expected
        worker.call("poison_all", "a")
        worker.call(
            "blend", "retrieve_pre_computed", session, "a", 0, ranges=found.ranges
        )
        for start, number in zip(starts, order, strict=True):
            end = start + chunks[number] * CHUNK
            read = worker.call("read_slots", "a", start, end)
            assert np.array_equal(read, values[number][:, :, : end - start])
        assert client.status().num_leases == 0
        client.end_session(session)
    worker.close()
