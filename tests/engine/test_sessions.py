"""Sessions: tokens in slices, expiry, the limit, and ends during running work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvcore.engine import sessions
from kvcore.engine.keyspace import Keyspace
from kvcore.engine.sessions import Session, SessionTable
from kvcore.errors import BadRequest, TokensNeeded
from kvcore.keys import ExtraKey, HashChain, SessionKey, chain_seed, pack_tokens

CHUNK = 4
SPACE = Keyspace("m", 1, chain_seed("prefix", "m", 1, CHUNK))
TOKENS = list(range(10 * CHUNK))


@dataclass
class SessionFixture:
    """A table of at most two sessions, its clock, and the ended sessions."""

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
        return self.table.open(SessionKey("e", name), SPACE, "client")

    def extend(
        self,
        session: Session,
        tokens: list[int],
        offset: int = 0,
        extras: tuple[ExtraKey, ...] = (),
        end: int = 0,
    ) -> int:
        """Extend a session to the end; return the number of slices."""
        packed = memoryview(pack_tokens(tokens))
        slices = self.table.extend(session, packed, offset, extras, end)
        return sum(1 for _ in slices)


@pytest.fixture
def fixture() -> SessionFixture:
    """An empty table."""
    return SessionFixture()


def hashes(tokens: list[int], extras: tuple[ExtraKey, ...] = ()) -> list[bytes]:
    """Return the hashes of a prompt, computed at once."""
    chain = HashChain(SPACE.seed, CHUNK, extras)
    for _ in chain.extend(pack_tokens(tokens), 1000):
        pass
    return [*chain.hashes]


def test_pieces_make_the_same_chain_as_the_whole(fixture: SessionFixture) -> None:
    """For any split of the tokens, with a pause after each slice."""
    session = fixture.open("a")
    assert fixture.extend(session, TOKENS[:23]) == 2
    fixture.extend(session, TOKENS[23:30], 23)
    fixture.extend(session, TOKENS[30:], 30)
    assert session.chain.hashes == hashes(TOKENS)


def test_hashing_that_stops_half_way_leaves_a_shorter_chain(
    fixture: SessionFixture,
) -> None:
    """Its client ended: the next request continues with the right tokens."""
    session = fixture.open("a")
    odd = TOKENS[: 9 * CHUNK + 3]
    slices = fixture.table.extend(
        session, memoryview(pack_tokens(odd)), 0, (), len(odd)
    )
    next(slices)
    slices.close()
    assert session.chain.num_tokens == 2 * CHUNK
    with pytest.raises(TokensNeeded) as needed:
        fixture.extend(session, [], end=len(TOKENS))
    assert needed.value.details == {"have": 2 * CHUNK}
    fixture.extend(session, TOKENS[2 * CHUNK :], 2 * CHUNK, end=len(TOKENS))
    assert session.chain.hashes == hashes(TOKENS)


def test_two_extensions_take_turns(fixture: SessionFixture) -> None:
    """The second request waits for the first and then needs no tokens."""
    session = fixture.open("a")
    packed = memoryview(pack_tokens(TOKENS))
    first = fixture.table.extend(session, packed, 0, (), len(TOKENS))
    next(first)
    second = fixture.table.extend(session, memoryview(b""), 0, (), len(TOKENS))
    next(second)
    for _ in first:
        next(second)
    assert list(second) == []
    assert session.chain.hashes == hashes(TOKENS)


@pytest.mark.parametrize("offset", [0, CHUNK, 9 * CHUNK])
def test_tokens_sent_again_replace_what_followed(
    fixture: SessionFixture, offset: int
) -> None:
    """Tokens from a chunk boundary replace all that followed it."""
    session = fixture.open("a")
    fixture.extend(session, TOKENS)
    other = [99] * (2 * CHUNK)
    fixture.extend(session, other, offset)
    assert session.chain.hashes == hashes([*TOKENS[:offset], *other])


def test_extras_belong_to_the_tokens_they_came_with(fixture: SessionFixture) -> None:
    """Extras of hashed tokens restart the chain; a prompt from token 0 drops them."""
    session, salt = fixture.open("a"), (ExtraKey(0, b"s"),)
    fixture.extend(session, TOKENS)
    with pytest.raises(TokensNeeded) as needed:
        fixture.extend(session, [], 0, salt, len(TOKENS))
    assert needed.value.details == {"have": 0}
    fixture.extend(session, TOKENS, 0, salt)
    assert session.chain.hashes == hashes(TOKENS, salt)
    fixture.extend(session, [], end=len(TOKENS))
    assert session.chain.hashes == hashes(TOKENS, salt)
    fixture.extend(session, TOKENS)
    assert session.chain.hashes == hashes(TOKENS)


def test_an_unused_session_expires(fixture: SessionFixture) -> None:
    """The least recently used first; running work counts as use."""
    with fixture.table.use(fixture.open("running")):
        fixture.open("idle")
        fixture.now = 9
        fixture.table.expire()
        assert (len(fixture.table), fixture.ended) == (2, [])
        fixture.now = 10
        fixture.table.expire()
        assert fixture.ended == ["idle"]
        assert fixture.table.next_deadline() == 20
    fixture.now = 20
    fixture.table.expire()
    assert fixture.ended == ["idle", "running"]
    assert fixture.table.next_deadline() is None


def test_beyond_the_bound_the_longest_unused_gives_way(fixture: SessionFixture) -> None:
    """A session with running work is never ended by the limit."""
    with fixture.table.use(fixture.open("a")):
        fixture.open("b")
        fixture.open("c")
        assert fixture.ended == ["b"]
        assert len(fixture.table) == 2


def test_the_end_waits_for_running_work(fixture: SessionFixture) -> None:
    """Meanwhile the same id names another session, which stays."""
    old = fixture.open("a")
    with fixture.table.use(old):
        fixture.table.end(old)
        assert fixture.ended == []
        new = fixture.open("a")
        assert new is not old
    assert fixture.ended == ["a"]
    assert fixture.table.find(SessionKey("e", "a")) is new


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda fixture, s: fixture.extend(s, TOKENS, 4), TokensNeeded),
        (
            lambda fixture, s: list(
                fixture.table.extend(s, memoryview(b"abc"), 0, (), 0)
            ),
            BadRequest,
        ),
        (
            lambda fixture, s: fixture.table.open(
                s.key, Keyspace("o", 1, SPACE.seed), "client"
            ),
            BadRequest,
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    fixture: SessionFixture,
    act: Callable[[SessionFixture, Session], object],
    error: type[Exception],
) -> None:
    """The session is unchanged."""
    session = fixture.open("a")
    with pytest.raises(error):
        act(fixture, session)
    assert session.chain.num_tokens == 0
    fixture.extend(session, TOKENS)
    assert session.chain.hashes == hashes(TOKENS)


def test_sessions_end_when_all_need_too_much_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The longest idle first; extras count, and have a limit of their own."""
    monkeypatch.setattr(sessions, "MAX_BYTES", 1000)
    bench = SessionFixture()
    for name in ("first", "second"):
        session = bench.open(name)
        extras = (ExtraKey(0, bytes(600)),)
        for _ in bench.table.extend(session, memoryview(b""), 0, extras, 0):
            pass
    assert bench.ended == ["first"]
    assert bench.table._num_bytes == 600
    bench.table.end(session)
    assert bench.table._num_bytes == 0
    huge = (ExtraKey(0, bytes(sessions.MAX_EXTRA_BYTES + 1)),)
    with pytest.raises(BadRequest, match="more than 1048576"):
        next(bench.table.extend(bench.open("third"), memoryview(b""), 0, huge, 0))
