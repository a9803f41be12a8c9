"""Document lookups: match, hold, prefetch from tiers, lease.

Holds and prefetches are the engine's. The prefetches of all runs start before the
lookup waits for any, and the reply comes when the last one has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, islice
from time import monotonic_ns

import msgspec

from kvcore.blend.document_index import DocumentIndex
from kvcore.blend.matchers import DocumentSpace, Matcher, TokenRun
from kvcore.blend.rolling_hash import Tokens
from kvcore.engine.engine import Engine
from kvcore.engine.leases import LeaseNumber
from kvcore.engine.lookups import ACQUIRE_CHUNKS
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.sessions import Session
from kvcore.engine.tiering import PrefetchTask
from kvcore.errors import ChunksMissing
from kvcore.keys import ChunkHash, SaltedKey, ScopedKey, SessionKey, scope_of
from kvcore.protocol import CBMatch, CBRange
from kvcore.storage.l1 import Chunk
from kvcore.storage.required_parts import RequiredParts


class DocumentLeaseOwner(ScopedKey, frozen=True, array_like=True):
    """Owner of a session's lease on documents, beside the lease on its prefix."""


def document_lease_owner(key: SessionKey) -> DocumentLeaseOwner:
    """Return the owner of a session's lease on documents."""
    return DocumentLeaseOwner(key.engine_id, key.request_id, scope_of(key))


@dataclass(frozen=True, slots=True)
class FoundDocuments:
    """Result of a session's last lookup."""

    ranges: tuple[CBRange, ...] = ()
    matches: tuple[CBMatch, ...] = ()
    numbers: dict[int, int] = field(default_factory=dict)
    """By a match's position in the prompt, its index in `matches` and in the lease."""

    def select(
        self, ranges: Sequence[CBRange], matches: Sequence[CBMatch], chunk_size: int
    ) -> list[int]:
        """Return the indexes of requested matches, and of all matches of ranges.

        Raises:
            ChunksMissing: the lookup did not find one of them.
        """
        numbers = []
        for match in matches:
            number = self.numbers.get(match.start)
            if number is None or self.matches[number] != match:
                raise ChunksMissing(
                    f"the session's lookup found no such chunk at token {match.start}"
                )
            numbers.append(number)
        for each in ranges:
            for start in range(each.start, each.end, chunk_size):
                number = self.numbers.get(start)
                if number is None or start + chunk_size > each.end:
                    raise ChunksMissing(
                        f"no chunk was found at token {start} of range "
                        f"{each.start} to {each.end}"
                    )
                numbers.append(number)
        return numbers


@dataclass(slots=True)
class _HeldRun:
    """A run and its leading chunks, which are held."""

    run: TokenRun
    chunks: list[Chunk]

    @property
    def missing(self) -> list[ChunkHash]:
        return self.run.hashes[len(self.chunks) :]


@dataclass(slots=True, eq=False)
class _PendingLookup:
    """A session's lookup under way, and its prefetches."""

    client: Hashable
    jobs: list[PrefetchTask] = field(default_factory=list)
    cancelled: bool = False


MakeReply = Callable[[FoundDocuments], msgspec.Struct]


class DocumentLookups:
    """Finds and leases documents, and remembers each session's last result."""

    def __init__(self, engine: Engine, matcher: Matcher, index: DocumentIndex) -> None:
        self._engine = engine
        self._l1 = engine.l1
        self._matcher = matcher
        self._index = index
        self._found: dict[SessionKey, FoundDocuments] = {}
        self._pending: dict[SessionKey, _PendingLookup] = {}
        engine.hooks.session_end.append(self._end_session)
        engine.hooks.client_end.append(self._cancel_client)

    def found(self, key: SessionKey) -> FoundDocuments | None:
        """Return the result of the session's last lookup, if that is known."""
        return self._found.get(key)

    def find(
        self,
        session: Session,
        tokens: Tokens,
        space: DocumentSpace,
        context: RequestContext,
        make_reply: MakeReply,
    ) -> Generator[None, None, msgspec.Struct | DeferredReply]:
        """Answer a lookup, in steps, once L1 has all that can be loaded.

        A lookup that is cancelled by its session's end or next lookup finds nothing.
        """
        needs = self._required_parts(session)
        self._cancel(session.key)
        lookup = self._pending[session.key] = _PendingLookup(context.client)

        def finish() -> msgspec.Struct:
            self._complete(lookup, held, needs, context)
            self._discard(session, lookup)
            if lookup.cancelled:
                # The session's lease, if there is one, is a later lookup's.
                return make_reply(FoundDocuments())
            return make_reply(self._grant(session, held, context))

        with ExitStack() as session_use:
            session_use.enter_context(self._engine.sessions.use(session))
            try:
                held = yield from self._hold(tokens, space, needs)
            except BaseException:
                self._discard(session, lookup)
                raise
            if self._engine.tiering.has_tiers and not lookup.cancelled:
                owner = space.owner(session.key)
                lookup.jobs = self._prefetch(held, needs, owner, context)
            if not lookup.jobs:
                return finish()
            done = _all_done([job.future for job in lookup.jobs])
            return DeferredReply(done, finish, session_use.pop_all())

    def find_in_l1(
        self,
        session: Session,
        tokens: Tokens,
        space: DocumentSpace,
        context: RequestContext,
    ) -> Generator[None, None, FoundDocuments]:
        """Find and lease what L1 has now, for a read whose lookup is forgotten."""
        self._cancel(session.key)
        with self._engine.sessions.use(session):
            held = yield from self._hold(tokens, space, self._required_parts(session))
            return self._grant(session, held, context)

    def _required_parts(self, session: Session) -> RequiredParts:
        space, scope = session.space, scope_of(session.key)
        return self._engine.registry.lookup(space.model, space.world_size, scope)[1]

    def _hold(
        self, tokens: Tokens, space: DocumentSpace, needs: RequiredParts
    ) -> Generator[None, None, list[_HeldRun]]:
        """Match, and hold the leading chunks of every run."""

        def count_ready(hashes: list[ChunkHash]) -> int:
            return len(self._l1.present(hashes, needs.full))

        runs = yield from self._matcher.find(tokens, space, count_ready)
        held = self._hold_at_once(runs, needs.full)
        try:
            for run in runs[len(held) :]:
                chunks = yield from self._engine.lookups.acquire(run.hashes, needs)
                held.append(_HeldRun(run, chunks))
        except BaseException:
            self._release(held)
            raise
        return held

    def _hold_at_once(self, runs: Sequence[TokenRun], full: int) -> list[_HeldRun]:
        """Hold all chunks of all runs in one step, the usual case; otherwise none."""
        hashes = [key for run in runs for key in run.hashes]
        if len(hashes) > ACQUIRE_CHUNKS:
            return []
        chunks = self._l1.acquire(hashes, [full] * len(hashes)) or ()
        present = iter([chunk for chunk in chunks if chunk is not None])
        held = [_HeldRun(run, [*islice(present, len(run.hashes))]) for run in runs]
        return [each for each in held if each.chunks]

    def _release(self, held: Sequence[_HeldRun]) -> None:
        for each in held:
            self._l1.release(each.chunks)
            each.chunks.clear()

    def _prefetch(
        self,
        held: Sequence[_HeldRun],
        needs: RequiredParts,
        owner: SaltedKey,
        context: RequestContext,
    ) -> list[PrefetchTask]:
        """Start to load what L1 lacks, of all runs."""
        return [
            self._engine.tiering.prefetch(
                each.missing,
                needs,
                chunk_size=self._engine.chunk_size,
                deadline=self._engine.lookups.deadline(context),
                owner=owner,
            )
            for each in held
            if each.missing
        ]

    def _complete(
        self,
        lookup: _PendingLookup,
        held: Sequence[_HeldRun],
        needs: RequiredParts,
        context: RequestContext,
    ) -> None:
        """Hold what was loaded too, and settle the prefetches."""
        is_late = bool(lookup.jobs) and 0 < context.deadline_ns < monotonic_ns()
        if lookup.cancelled or is_late:
            self._release(held)
        elif lookup.jobs:
            for each in held:
                each.chunks += self._l1.acquire_leading(each.missing, needs.full)
        for job in lookup.jobs:
            for key in job.missing:
                if self._l1.peek([key]) == [None]:
                    self._index.remove(key)
            job.settle()

    def _discard(self, session: Session, lookup: _PendingLookup) -> None:
        """Discard a lookup that is over; the session may have a later one."""
        if self._pending.get(session.key) is lookup:
            del self._pending[session.key]

    def _cancel(self, key: SessionKey) -> None:
        """Load nothing more for a session; a pending lookup finds nothing."""
        lookup = self._pending.pop(key, None)
        if lookup is not None:
            lookup.cancelled = True
            for job in lookup.jobs:
                job.cancel()

    def _cancel_client(self, client: Hashable) -> None:
        pending = self._pending.items()
        for key in [key for key, lookup in pending if lookup.client == client]:
            self._cancel(key)

    # -- leases -------------------------------------------------------------------

    def _grant(
        self, session: Session, held: Sequence[_HeldRun], context: RequestContext
    ) -> FoundDocuments:
        """Lease what is held; remember the result until the session ends."""
        found = self._result(held)
        chunks = [chunk for each in held for chunk in each.chunks]
        owner = document_lease_owner(session.key)
        if session.ended:
            # Its lease ended with it; a lease that exists now is its successor's.
            self._release(held)
        else:
            self._found[session.key] = found
            if chunks:
                readers = (1 << session.space.world_size) - 1
                self._engine.leases.grant(
                    owner, session.space.model, chunks, readers, context.client
                )
            else:
                self._engine.leases.end(owner)
        if self._index.num_in_tier:
            for chunk in chunks:
                self._index.touch(chunk.hash)
        self._engine.tiering.used(chunks)
        return found

    def _result(self, held: Sequence[_HeldRun]) -> FoundDocuments:
        """Return the held chunks as ranges and matches, in the prompt's order."""
        size = self._engine.chunk_size
        ranges: list[CBRange] = []
        matches: list[CBMatch] = []
        for each in held:
            old_start, start = each.run.old_start, each.run.start
            for chunk in each.chunks:
                matches.append(CBMatch(old_start, start, chunk.hash))
                old_start, start = old_start + size, start + size
            if each.run.continues and ranges and ranges[-1].end == each.run.start:
                ranges[-1] = CBRange(ranges[-1].start, start)
            elif each.chunks:
                ranges.append(CBRange(each.run.start, start))
        numbers = {match.start: number for number, match in enumerate(matches)}
        return FoundDocuments(tuple(ranges), tuple(matches), numbers)

    def lease_number(self, session: Session) -> LeaseNumber | None:
        """Return the session's lease on documents, under which a read starts."""
        owner = document_lease_owner(session.key)
        return None if session.ended else self._engine.leases.number(owner)

    def note_read(
        self,
        key: SessionKey,
        numbers: Sequence[int],
        rank: int,
        lease: LeaseNumber | None,
    ) -> None:
        """Remove a rank from the readers of matches, if the lease is still this one."""
        owner = document_lease_owner(key)
        if lease is None or lease != self._engine.leases.number(owner):
            return
        for number in numbers:
            self._engine.leases.read(owner, number, number + 1, rank)

    def _end_session(self, key: SessionKey) -> None:
        self._cancel(key)
        self._engine.leases.end(document_lease_owner(key))
        found = self._found.pop(key, None)
        if found is not None:
            self._l1.touch([ChunkHash(match.hash) for match in found.matches])


def _all_done(futures: Sequence[Future[None]]) -> Future[None]:
    """Return a future that is done when all are, however they ended."""
    everything: Future[None] = Future()
    left = count(len(futures) - 1, -1)

    def done(_: Future[None]) -> None:
        # One step of a C iterator is atomic: each call gets its own number.
        if next(left) == 0:
            everything.set_result(None)

    for future in futures:
        future.add_done_callback(done)
    return everything
