"""What comes between the steps of a blend request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvcore.blend.document_lookups import documents_of
from kvcore.keys import SessionKey
from kvcore.protocol import (
    CBLookupPreComputed,
    CBLookupReply,
    CBRetrievePreComputed,
    CBStoreFinal,
    CBStorePreComputed,
    EndSession,
    StoreReply,
)
from tests.blend.blend_fixture import MODEL, Asked, BlendFixture, packed

KEY = SessionKey("e", "1")
ONE = (1, 1, 1, 1, 2, 2, 2, 2)
TWO = (3, 3, 3, 3)


@pytest.fixture
def build() -> Iterator[Callable[..., BlendFixture]]:
    """Make houses in which both documents are stored."""
    houses: list[BlendFixture] = []

    def one(**options: Any) -> BlendFixture:
        house = BlendFixture("anywhere", **{"num_pages": 40, **options})
        houses.append(house)
        put(house, ONE)
        put(house, TWO)
        return house

    yield one
    for house in houses:
        house.close()


def ask(house: BlendFixture, request: Any, client: str = "s") -> Asked:
    """Begin a request."""
    blend = house.blend
    handlers: dict[type, Any] = {
        CBStorePreComputed: blend.cb_store_pre_computed,
        CBStoreFinal: blend.cb_store_final,
        CBLookupPreComputed: blend.cb_lookup_pre_computed,
        CBRetrievePreComputed: blend.cb_retrieve_pre_computed,
    }
    instance = None if client == "s" else house.instance(0)
    asked = Asked("", client, None, request=request, instance=instance)
    house.ask(handlers[type(request)], asked)
    house.advance(asked)
    return asked


def put(house: BlendFixture, tokens: tuple[int, ...]) -> None:
    """Store a document."""
    request = CBStorePreComputed("i0", 0, packed(tokens))
    house.drive(ask(house, request, "w0"))


def look_up(house: BlendFixture, tokens: tuple[int, ...]) -> Asked:
    """Begin a lookup of documents, and leave it in its midst."""
    return ask(house, CBLookupPreComputed(KEY, MODEL, 1, packed(tokens)))


def found(house: BlendFixture, tokens: tuple[int, ...]) -> CBLookupReply:
    """Look documents up."""
    asked = look_up(house, tokens)
    house.drive(asked)
    reply: CBLookupReply = asked.reply
    return reply


def leased(house: BlendFixture) -> int:
    """Count the chunks of documents that the session holds."""
    lease = house.engine.leases._leases.get(documents_of(KEY))
    return sum(run.end - run.start for run in lease.runs) if lease else 0


def save(house: BlendFixture) -> None:
    """Have tiers write all, and L1 forget it."""
    house.answer_tiers()
    house.l1.drop(house.l1.hashes())


def test_a_final_store_of_nothing_stores_nothing(
    build: Callable[..., BlendFixture],
) -> None:
    """An empty range is answered as by a normal store."""
    house = build()
    asked = ask(house, CBStoreFinal(KEY, "i0", 0, 0, 0, packed(ONE)), "w0")
    house.drive(asked)
    assert (asked.reply, asked.error) == (StoreReply(0, 0, 0), None)


def test_a_late_read_of_an_earlier_lookup_leaves_the_later_lease(
    build: Callable[..., BlendFixture],
) -> None:
    """The same chunk or another: its reader has yet to come."""
    house = build()
    [match, _] = found(house, ONE).matches
    for tokens, left in ((TWO, 1), (ONE, 2)):
        late = ask(house, CBRetrievePreComputed(KEY, "i0", 0, (), (match,)), "w0")
        told = found(house, tokens)
        house.drive(late)
        assert leased(house) == left
    again = CBRetrievePreComputed(KEY, "i0", 0, (), told.matches)
    house.drive(ask(house, again, "w0"))
    assert leased(house) == 0


def test_a_chunk_that_was_not_told_is_under_no_lease(
    build: Callable[..., BlendFixture],
) -> None:
    """A worker names it for a place where another was found."""
    house = build()
    [other] = found(house, TWO).matches
    assert found(house, ONE).num_tokens == len(ONE)
    house.drive(ask(house, CBRetrievePreComputed(KEY, "i0", 0, (), (other,)), "w0"))
    assert leased(house) == 2


def test_an_ended_sessions_lookup_leaves_its_successor_alone(
    build: Callable[..., BlendFixture],
) -> None:
    """A request id that is used again has a lease of its own."""
    house = build()
    old = look_up(house, ONE)
    house.engine.end_session(EndSession(KEY), house.caller("s"))
    assert found(house, TWO).num_tokens == len(TWO)
    house.drive(old)
    assert old.reply == CBLookupReply((), (), 0)
    assert leased(house) == 1


def test_of_two_lookups_of_a_session_the_later_counts(
    build: Callable[..., BlendFixture],
) -> None:
    """However their steps fall, also while tiers load."""
    house = build(num_tiers=1)
    save(house)
    old, new = look_up(house, ONE), look_up(house, TWO)
    house.drive(new)
    house.drive(old)
    assert (old.reply.num_tokens, new.reply.num_tokens) == (0, len(TWO))
    assert leased(house) == 1


def test_a_dead_client_gets_no_lease_for_any_of_its_lookups(
    build: Callable[..., BlendFixture],
) -> None:
    """Two of a session were under way."""
    house = build(num_tiers=1)
    save(house)
    both = [look_up(house, ONE), look_up(house, TWO)]
    while any(asked.steps for asked in both):
        for asked in reversed([asked for asked in both if asked.steps]):
            house.advance(asked)
    house.engine.client_gone("s")
    house.finish_all()
    assert leased(house) == 0
    assert house.l1.stats().num_held == 0


def test_what_l1_has_is_known_however_much_tiers_have(
    build: Callable[..., BlendFixture],
) -> None:
    """The bound on chunks in tiers is for those beyond L1."""
    house = build(num_tiers=1, max_tier_chunks=2)
    found_before = found(house, ONE)
    assert found_before.num_tokens == len(ONE)
    house.engine.end_session(EndSession(KEY), house.caller("s"))
    save(house)
    put(house, ONE)
    for tokens in ((4,) * 4, (5,) * 4):
        put(house, tokens)
        house.answer_tiers()
        kept = house.hashes(tokens, "", is_document=True)
        house.l1.drop(kept)
    assert found(house, ONE) == found_before
