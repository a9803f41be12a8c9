"""Sessions: tokens in slices, clocks, bounds, and the end under running work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvcore.engine.keyspace import Keyspace
from kvcore.engine.sessions import Session, SessionTable
from kvcore.errors import BadRequest, TokensNeeded
from kvcore.keys import ExtraKey, HashChain, SessionKey, chain_seed, pack_tokens

CHUNK = 4
SPACE = Keyspace("m", 1, chain_seed("prefix", "m", 1, CHUNK))
TOKENS = list(range(10 * CHUNK))


@dataclass
class House:
    """A table of two sessions at most, its clock, and who ended."""

    now: float = 0.0
    ended: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = SessionTable(
            CHUNK,
            slice_chunks=2,
            idle_s=10,
            max_sessions=2,
            on_end=lambda session: self.ended.append(session.key.request_id),
            clock=lambda: self.now,
        )

    def open(self, name: str) -> Session:
        """Open a session."""
        return self.table.open(SessionKey("e", name), SPACE)

    def extend(
        self,
        session: Session,
        tokens: list[int],
        offset: int = 0,
        extras: tuple[ExtraKey, ...] = (),
        end: int = 0,
    ) -> int:
        """Take tokens in to the end; return the number of slices."""
        packed = memoryview(pack_tokens(tokens))
        slices = self.table.extend(session, packed, offset, extras, end)
        return sum(1 for _ in slices)


@pytest.fixture
def house() -> House:
    """An empty table."""
    return House()


def hashes(tokens: list[int], extras: tuple[ExtraKey, ...] = ()) -> list[bytes]:
    """The chain of a prompt, hashed at once."""
    chain = HashChain(SPACE.seed, CHUNK, extras)
    for _ in chain.extend(pack_tokens(tokens), 1000):
        pass
    return [*chain.hashes]


def test_pieces_make_the_same_chain_as_the_whole(house: House) -> None:
    """Wherever the pieces are cut, and with a pause after each slice."""
    session = house.open("a")
    assert house.extend(session, TOKENS[:23]) == 2
    house.extend(session, TOKENS[23:30], 23)
    house.extend(session, TOKENS[30:], 30)
    assert session.chain.hashes == hashes(TOKENS)


def test_hashing_that_stops_half_way_leaves_a_shorter_chain(house: House) -> None:
    """Its client died: the next one goes on from there, with the right tokens."""
    session = house.open("a")
    odd = TOKENS[: 9 * CHUNK + 3]
    slices = house.table.extend(session, memoryview(pack_tokens(odd)), 0, (), len(odd))
    next(slices)
    slices.close()
    assert session.chain.num_tokens == 2 * CHUNK
    with pytest.raises(TokensNeeded) as needed:
        house.extend(session, [], end=len(TOKENS))
    assert needed.value.details == {"have": 2 * CHUNK}
    house.extend(session, TOKENS[2 * CHUNK :], 2 * CHUNK, end=len(TOKENS))
    assert session.chain.hashes == hashes(TOKENS)


def test_two_extensions_take_turns(house: House) -> None:
    """The second waits for the first, and then finds its tokens there."""
    session = house.open("a")
    packed = memoryview(pack_tokens(TOKENS))
    first = house.table.extend(session, packed, 0, (), len(TOKENS))
    next(first)
    second = house.table.extend(session, memoryview(b""), 0, (), len(TOKENS))
    next(second)
    for _ in first:
        next(second)
    assert list(second) == []
    assert session.chain.hashes == hashes(TOKENS)


@pytest.mark.parametrize("offset", [0, CHUNK, 9 * CHUNK])
def test_tokens_sent_again_replace_what_followed(house: House, offset: int) -> None:
    """From a chunk's boundary on."""
    session = house.open("a")
    house.extend(session, TOKENS)
    other = [99] * (2 * CHUNK)
    house.extend(session, other, offset)
    assert session.chain.hashes == hashes([*TOKENS[:offset], *other])


def test_extras_belong_to_the_tokens_they_came_with(house: House) -> None:
    """Those of hashed tokens start the chain anew; a prompt from 0 on drops them."""
    session, salt = house.open("a"), (ExtraKey(0, b"s"),)
    house.extend(session, TOKENS)
    with pytest.raises(TokensNeeded) as needed:
        house.extend(session, [], 0, salt, len(TOKENS))
    assert needed.value.details == {"have": 0}
    house.extend(session, TOKENS, 0, salt)
    assert session.chain.hashes == hashes(TOKENS, salt)
    house.extend(session, [], end=len(TOKENS))
    assert session.chain.hashes == hashes(TOKENS, salt)
    house.extend(session, TOKENS)
    assert session.chain.hashes == hashes(TOKENS)


def test_an_unused_session_expires(house: House) -> None:
    """The oldest use first; one with running work is used."""
    running = house.open("running")
    house.table.enter(running)
    house.open("idle")
    house.now = 9
    house.table.expire()
    assert (len(house.table), house.ended) == (2, [])
    house.now = 10
    house.table.expire()
    assert house.ended == ["idle"]
    assert house.table.next_deadline() == 20
    house.table.leave(running)
    house.now = 20
    house.table.expire()
    assert house.ended == ["idle", "running"]
    assert house.table.next_deadline() is None


def test_beyond_the_bound_the_longest_unused_gives_way(house: House) -> None:
    """Never one with running work."""
    house.table.enter(house.open("a"))
    house.open("b")
    house.open("c")
    assert house.ended == ["b"]
    assert len(house.table) == 2


def test_the_end_waits_for_running_work(house: House) -> None:
    """Meanwhile the same id is another session, and stays when the first goes."""
    old = house.open("a")
    house.table.enter(old)
    house.table.end(old)
    assert house.ended == []
    new = house.open("a")
    assert new is not old
    house.table.leave(old)
    assert house.ended == ["a"]
    assert house.table.find(SessionKey("e", "a")) is new


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda house, s: house.extend(s, TOKENS, 4), TokensNeeded),
        (
            lambda house, s: list(house.table.extend(s, memoryview(b"abc"), 0, (), 0)),
            BadRequest,
        ),
        (
            lambda house, s: house.table.open(s.key, Keyspace("o", 1, SPACE.seed)),
            BadRequest,
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    house: House, act: Callable[[House, Session], object], error: type[Exception]
) -> None:
    """And the session is what it was."""
    session = house.open("a")
    with pytest.raises(error):
        act(house, session)
    assert session.chain.num_tokens == 0
    house.extend(session, TOKENS)
    assert session.chain.hashes == hashes(TOKENS)
