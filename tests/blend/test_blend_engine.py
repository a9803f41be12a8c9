"""Events between the steps of a blend request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from msgspec.structs import replace

from kvcore.blend.blend_engine import slot_rows
from kvcore.blend.document_lookups import document_lease_owner
from kvcore.engine.registrations import Instance
from kvcore.errors import ChunksMissing, TokensNeeded
from kvcore.keys import ChunkHash, SessionKey
from kvcore.protocol import (
    CBLookupPreComputed,
    CBLookupReply,
    CBMatch,
    CBRetrievePreComputed,
    CBStoreFinal,
    CBStorePreComputed,
    EndSession,
    StoreReply,
)
from tests.blend.blend_fixture import MODEL, BlendFixture, Operation, packed
from tests.blend.blend_model import SIZE

KEY = SessionKey("e", "1")
ONE = (1, 1, 1, 1, 2, 2, 2, 2)
TWO = (3, 3, 3, 3)


@pytest.fixture
def build() -> Iterator[Callable[..., BlendFixture]]:
    """Make fixtures in which both documents are stored."""
    fixtures: list[BlendFixture] = []

    def one(**options: Any) -> BlendFixture:
        fixture = BlendFixture("anywhere", **{"num_pages": 40, **options})
        fixtures.append(fixture)
        put(fixture, ONE)
        put(fixture, TWO)
        return fixture

    yield one
    for fixture in fixtures:
        fixture.close()


def begin(fixture: BlendFixture, request: Any, client: str = "s") -> Operation:
    """Begin a request."""
    blend = fixture.blend
    handlers: dict[type, Any] = {
        CBStorePreComputed: blend.cb_store_pre_computed,
        CBStoreFinal: blend.cb_store_final,
        CBLookupPreComputed: blend.cb_lookup_pre_computed,
        CBRetrievePreComputed: blend.cb_retrieve_pre_computed,
    }
    instance = None if client == "s" else fixture.instance(0)
    operation = Operation("", client, None, request=request, instance=instance)
    fixture.begin(handlers[type(request)], operation)
    fixture.advance(operation)
    return operation


def put(fixture: BlendFixture, tokens: tuple[int, ...]) -> None:
    """Store a document."""
    request = CBStorePreComputed("i0", 0, packed(tokens))
    fixture.drive(begin(fixture, request, "w0"))


def look_up(fixture: BlendFixture, tokens: tuple[int, ...]) -> Operation:
    """Begin a document lookup and take its first step."""
    return begin(fixture, CBLookupPreComputed(KEY, MODEL, 1, packed(tokens)))


def found(fixture: BlendFixture, tokens: tuple[int, ...]) -> CBLookupReply:
    """Return the reply of a document lookup."""
    operation = look_up(fixture, tokens)
    fixture.drive(operation)
    reply: CBLookupReply = operation.reply
    return reply


def retrieve(fixture: BlendFixture, match: CBMatch, key: SessionKey = KEY) -> Operation:
    """Begin to retrieve a chunk."""
    return begin(fixture, CBRetrievePreComputed(key, "i0", 0, (), (match,)), "w0")


def leased(fixture: BlendFixture) -> int:
    """Return the number of document chunks leased to the session."""
    lease = fixture.engine.leases._leases.get(document_lease_owner(KEY))
    return sum(run.end - run.start for run in lease.runs) if lease else 0


def save(fixture: BlendFixture) -> None:
    """Write all chunks to the tiers and drop them from L1."""
    fixture.answer_tiers()
    fixture.l1.drop(fixture.l1.hashes())


def test_a_final_store_of_nothing_stores_nothing(
    build: Callable[..., BlendFixture],
) -> None:
    """An empty range gets the reply of a normal store."""
    fixture = build()
    operation = begin(fixture, CBStoreFinal(KEY, "i0", 0, 0, 0, packed(ONE)), "w0")
    fixture.drive(operation)
    assert (operation.reply, operation.error) == (StoreReply(0, 0, 0), None)


def test_a_late_read_of_an_earlier_lookup_leaves_the_later_lease(
    build: Callable[..., BlendFixture],
) -> None:
    """The later lease still waits for the rank, for the same chunk and for another."""
    fixture = build()
    [match, _] = found(fixture, ONE).matches
    for tokens, left in ((TWO, 1), (ONE, 2)):
        late = retrieve(fixture, match)
        reply = found(fixture, tokens)
        fixture.drive(late)
        assert leased(fixture) == left
    again = CBRetrievePreComputed(KEY, "i0", 0, (), reply.matches)
    fixture.drive(begin(fixture, again, "w0"))
    assert leased(fixture) == 0


def test_a_chunk_that_no_lookup_found_is_under_no_lease(
    build: Callable[..., BlendFixture],
) -> None:
    """A match with another chunk's position is refused, and no lease changes."""
    fixture = build()
    [other] = found(fixture, TWO).matches
    assert found(fixture, ONE).num_tokens == len(ONE)
    operation = retrieve(fixture, other)
    fixture.drive(operation)
    assert isinstance(operation.error, ChunksMissing)
    assert leased(fixture) == 2


def test_a_session_without_a_lookup_retrieves_nothing(
    build: Callable[..., BlendFixture],
) -> None:
    """Knowledge of a chunk hash does not grant access to the chunk."""
    fixture = build()
    [match] = found(fixture, TWO).matches
    operation = retrieve(fixture, match, SessionKey("e", "other"))
    fixture.drive(operation)
    assert isinstance(operation.error, TokensNeeded)


def test_a_chunk_of_another_model_is_not_read_in_its_place(
    build: Callable[..., BlendFixture],
) -> None:
    """The chunk is replaced between the request's check and its copy."""
    fixture = build()
    [match] = found(fixture, TWO).matches
    retrieve(fixture, match)
    fixture.engine.end_session(EndSession(KEY), fixture.caller("s"))
    key = ChunkHash(match.hash)
    assert fixture.l1.drop([key]) == 1
    other = Instance(
        fixture.caller("w0"),
        replace(fixture.instance(0).request, model="other"),
        fixture.engine.registry.space("other", 1),
        fixture.instance(0).layouts,
        Future(),
    )
    transfers = fixture.engine.transfers
    transfers.commit(transfers.reserve(other, [key], (slot_rows([0], SIZE),), 0), ())
    _, call, (*args, named) = fixture.instance(0).retrieve_lane.queue.pop()
    with pytest.raises(ChunksMissing, match="another model"):
        call(*args, **named)
    assert fixture.l1.stats().num_held == 0


def test_an_ended_sessions_lookup_leaves_its_successor_alone(
    build: Callable[..., BlendFixture],
) -> None:
    """A session that reuses a request id has its own lease."""
    fixture = build()
    old = look_up(fixture, ONE)
    fixture.engine.end_session(EndSession(KEY), fixture.caller("s"))
    assert found(fixture, TWO).num_tokens == len(TWO)
    fixture.drive(old)
    assert old.reply == CBLookupReply((), (), 0)
    assert leased(fixture) == 1


def test_of_two_lookups_of_a_session_the_later_counts(
    build: Callable[..., BlendFixture],
) -> None:
    """In any order of their steps, also while tiers load."""
    fixture = build(num_tiers=1)
    save(fixture)
    old, new = look_up(fixture, ONE), look_up(fixture, TWO)
    fixture.drive(new)
    fixture.drive(old)
    assert (old.reply.num_tokens, new.reply.num_tokens) == (0, len(TWO))
    assert leased(fixture) == 1


def test_a_dead_client_gets_no_lease_for_any_of_its_lookups(
    build: Callable[..., BlendFixture],
) -> None:
    """Two lookups of one session are pending."""
    fixture = build(num_tiers=1)
    save(fixture)
    both = [look_up(fixture, ONE), look_up(fixture, TWO)]
    while any(operation.steps for operation in both):
        for operation in reversed([operation for operation in both if operation.steps]):
            fixture.advance(operation)
    fixture.engine.end_client("s")
    fixture.finish_all()
    assert leased(fixture) == 0
    assert fixture.l1.stats().num_held == 0


def test_what_l1_has_is_known_however_much_tiers_have(
    build: Callable[..., BlendFixture],
) -> None:
    """The limit on chunks in tiers does not apply to chunks in L1."""
    fixture = build(num_tiers=1, max_tier_chunks=2)
    found_before = found(fixture, ONE)
    assert found_before.num_tokens == len(ONE)
    fixture.engine.end_session(EndSession(KEY), fixture.caller("s"))
    save(fixture)
    put(fixture, ONE)
    for tokens in ((4,) * 4, (5,) * 4):
        put(fixture, tokens)
        fixture.answer_tiers()
        kept = fixture.hashes(tokens, "", is_document=True)
        fixture.l1.drop(kept)
    assert found(fixture, ONE) == found_before
