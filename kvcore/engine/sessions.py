"""Sessions: the tokens of one request of one engine, hashed once, shared by clients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from kvcore.engine.keyspace import Keyspace
from kvcore.errors import BadRequest, TokensNeeded
from kvcore.keys import ExtraKey, HashChain, SaltedKey, SessionKey, cache_salt

Slices = Generator[None, None, None]

MAX_EXTRA_BYTES = 1 << 20
"""Most bytes of one session's extra keys."""
MAX_BYTES = 256 << 20
"""Memory of all sessions; above it, the longest idle ones end."""
HASH_BYTES = 80
"""Memory of one chunk hash in a session's list."""


@dataclass(slots=True)
class Session:
    """State of one request of one engine. Loop thread only."""

    key: SessionKey
    space: Keyspace
    chain: HashChain
    last_used: float
    num_running: int = 0
    extending: bool = False
    ended: bool = False
    clients: set[Hashable] = field(default_factory=set)
    """Who has used it: the session ends with the last of them."""
    num_bytes: int = 0
    """Memory of its hashes, tail and extras, as last counted by the table."""
    owner: SaltedKey = field(init=False)
    """The key with the salt of its extras: the owner of what it stores and loads."""

    def __post_init__(self) -> None:
        self.adopt_salt()

    def adopt_salt(self) -> None:
        """Follow a change of the extras."""
        salt = cache_salt(self.chain.extras)
        self.owner = SaltedKey(self.key.engine_id, self.key.request_id, salt)


class SessionTable:
    """Sessions by key, oldest use first."""

    def __init__(
        self,
        chunk_size: int,
        slice_chunks: int,
        idle_s: float,
        max_sessions: int,
        on_end: Callable[[Session], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._chunk_size = chunk_size
        self._slice_chunks = slice_chunks
        self._idle_s = idle_s
        self._max_sessions = max_sessions
        self._on_end = on_end
        self._clock = clock
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, key: SessionKey, space: Keyspace, client: Hashable) -> Session:
        """Return a session, which ends with the last of its clients.

        So a killed engine leaves no tokens behind, which its successor would store
        another prompt's KV under when it uses the request id again.

        Raises:
            BadRequest: it is known for another model or world size.
        """
        now = self._clock()
        session = self._sessions.get(key)
        if session is None or session.ended:
            if session is not None:  # Running work of it goes on, uncounted.
                self._num_bytes -= session.num_bytes
                del self._sessions[key]
            self._make_room()
            chain = HashChain(space.seed, self._chunk_size)
            session = Session(key, space, chain, now)
            self._sessions[key] = session
        elif session.space is not space:
            raise BadRequest(
                f"session {f'{key.engine_id}/{key.request_id}'!r} is about model "
                f"{session.space.model!r} with world size {session.space.world_size}, "
                f"not {space.model!r} with {space.world_size}"
            )
        session.clients.add(client)
        session.last_used = now
        self._sessions.move_to_end(key)
        return session

    def extend(
        self,
        session: Session,
        tokens: memoryview,
        offset: int,
        extras: tuple[ExtraKey, ...],
        end: int,
    ) -> Slices:
        """Hash the tokens of a request, in slices.

        Tokens may be appended where the session ends, or sent again from any chunk
        boundary before that: then all that follow are hashed again, so that a reused
        request id never reaches another prompt's chunks.

        Raises:
            TokensNeeded: they leave a gap, or the session still ends before `end`.
            BadRequest: not whole tokens, or more than 1 MiB of extras.
        """
        if extras and _num_bytes(extras) > MAX_EXTRA_BYTES:
            raise BadRequest(f"extras: more than {MAX_EXTRA_BYTES} bytes")
        while session.extending:
            yield
        chain = session.chain
        # Tokens from the first one on bring all the extras that there are.
        begins_anew = offset == 0 and len(tokens) > 0
        if (extras or begins_anew) and extras != chain.extras:
            chain = self._change_extras(session, extras)
        if len(tokens):
            if len(tokens) % 4:
                raise BadRequest(f"tokens: {len(tokens)} bytes are not whole uint32")
            self._join(session, offset)
            session.extending = True
            try:
                yield from chain.extend(tokens, self._slice_chunks)
            finally:
                session.extending = False
                self._count_bytes(session)
        if chain.num_tokens < end:
            raise TokensNeeded(
                f"the session has {chain.num_tokens} tokens, the request needs {end}",
                have=chain.num_tokens,
            )

    def _join(self, session: Session, offset: int) -> None:
        chain = session.chain
        if offset == chain.num_tokens:
            return
        have = min(offset, chain.num_tokens)
        if offset > chain.num_tokens or offset % self._chunk_size:
            raise TokensNeeded(
                f"tokens from {offset} do not join the session's {chain.num_tokens}",
                have=have - have % self._chunk_size
                if offset < chain.num_tokens
                else have,
            )
        chain.rewind(offset // self._chunk_size)

    def _change_extras(
        self, session: Session, extras: tuple[ExtraKey, ...]
    ) -> HashChain:
        """Adopt extras of tokens that are not hashed yet, else start a new chain."""
        chain = session.chain
        hashed = len(chain.hashes) * self._chunk_size
        known = chain.extras
        adds = extras[: len(known)] == known and all(
            extra.start >= hashed for extra in extras[len(known) :]
        )
        if adds:
            chain.extras = extras
        else:
            session.chain = HashChain(session.space.seed, self._chunk_size, extras)
        self._count_bytes(session)
        session.adopt_salt()
        return session.chain

    def find(self, key: SessionKey) -> Session | None:
        """Return a session, None if it is not known."""
        return self._sessions.get(key)

    def end(self, session: Session) -> None:
        """End a session now, or when its running work has ended."""
        session.ended = True
        if not session.num_running:
            self._drop(session)

    @contextmanager
    def use(self, session: Session) -> Iterator[None]:
        """Keep a session while work needs it; one that has ended is dropped after."""
        session.num_running += 1
        try:
            yield
        finally:
            session.num_running -= 1
            if session.ended and not session.num_running:
                self._drop(session)

    def remove_client(self, client: Hashable) -> list[SessionKey]:
        """Remove a client that is gone; return the sessions that have no other."""
        left = []
        for key, session in self._sessions.items():
            if client in session.clients:
                session.clients.discard(client)
                if not session.clients:
                    left.append(key)
        return left

    def expire(self) -> None:
        """End the sessions that no request has used for `idle_s`."""
        horizon = self._clock() - self._idle_s
        while self._sessions:
            session = next(iter(self._sessions.values()))
            if session.last_used > horizon:
                return
            if session.num_running:
                session.last_used = self._clock()
                self._sessions.move_to_end(session.key)
            else:
                self._drop(session)

    def next_deadline(self) -> float | None:
        """Return when the least recently used session expires."""
        for session in self._sessions.values():
            return session.last_used + self._idle_s
        return None

    def _count_bytes(self, session: Session) -> None:
        """Count a session's memory; end idle sessions while all have too much."""
        chain = session.chain
        num_bytes = HASH_BYTES * len(chain.hashes) + len(chain.tail)
        if chain.extras:
            num_bytes += _num_bytes(chain.extras)
        if self._sessions.get(session.key) is session:
            self._num_bytes += num_bytes - session.num_bytes
            session.num_bytes = num_bytes
        while self._num_bytes > MAX_BYTES and self._drop_idle():
            pass

    def _make_room(self) -> None:
        """At the limit, end the least recently used session without running work."""
        if len(self._sessions) >= self._max_sessions:
            self._drop_idle()

    def _drop_idle(self) -> bool:
        """End the least recently used session without running work, if there is one."""
        for session in self._sessions.values():
            if not session.num_running:
                self._drop(session)
                return True
        return False

    def _drop(self, session: Session) -> None:
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
            self._num_bytes -= session.num_bytes
        self._on_end(session)


def _num_bytes(extras: tuple[ExtraKey, ...]) -> int:
    return sum(len(extra.material) for extra in extras)
