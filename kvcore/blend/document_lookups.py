"""Lookups of documents: match, hold, have tiers load what is missing, lease.

Holding and loading are the engine's own. Where tiers may have more, the loads of all
runs are begun before any is waited for, and the answer comes when the last has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
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
from kvcore.keys import ChunkHash, SaltedKey, SessionKey
from kvcore.protocol import CBMatch, CBRange
from kvcore.storage.l1 import Chunk
from kvcore.storage.required_parts import RequiredParts


class SessionDocuments(SessionKey, frozen=True, array_like=True):
    """Owner of a session's lease on documents, beside the one on its prefix."""


def documents_of(key: SessionKey) -> SessionDocuments:
    """Return the owner of a session's lease on documents."""
    return SessionDocuments(key.engine_id, key.request_id)


@dataclass(frozen=True, slots=True)
class FoundDocuments:
    """What a session's last lookup found."""

    ranges: tuple[CBRange, ...] = ()
    matches: tuple[CBMatch, ...] = ()
    numbers: dict[int, int] = field(default_factory=dict)
    """By a match's place in the prompt, its place in `matches` and in the lease."""


@dataclass(slots=True)
class _HeldMatches:
    """A run, and its leading chunks that are held."""

    run: TokenRun
    chunks: list[Chunk]


@dataclass(slots=True, eq=False)
class _DocumentWait:
    """A session's lookup and its loads, and whether somebody still wants them."""

    client: Hashable
    jobs: list[PrefetchTask] = field(default_factory=list)
    cancelled: bool = False


Answer = Callable[[FoundDocuments], msgspec.Struct]


class DocumentLookups:
    """Finds and leases documents, and remembers what a session was told."""

    def __init__(self, engine: Engine, matcher: Matcher, index: DocumentIndex) -> None:
        self._engine = engine
        self._matcher = matcher
        self._index = index
        self._found: dict[SessionKey, FoundDocuments] = {}
        self._waits: dict[SessionKey, _DocumentWait] = {}
        engine.hooks.session_end.append(self._end_session)
        engine.hooks.client_end.append(self._cancel_client)

    def found(self, key: SessionKey) -> FoundDocuments | None:
        """Return what the session's last lookup found, if that is known."""
        return self._found.get(key)

    def find(
        self,
        session: Session,
        tokens: Tokens,
        space: DocumentSpace,
        caller: RequestContext,
        answer: Answer,
    ) -> Generator[None, None, msgspec.Struct | DeferredReply]:
        """Answer a lookup, in steps, once all that can be had is in L1.

        One that is overtaken, by its session's end or next lookup, finds nothing.
        """
        needs = self._needs(session)
        self._cancel(session.key)
        wait = self._waits[session.key] = _DocumentWait(caller.client)

        def finish() -> msgspec.Struct:
            self._complete(wait, held, needs, caller)
            self._end_wait(session, wait)
            if wait.cancelled:
                # The session's lease, if there is one, is a later lookup's.
                return answer(FoundDocuments())
            return answer(self._grant(session, held, caller))

        with ExitStack() as session_use:
            session_use.enter_context(self._engine.sessions.use(session))
            try:
                held = yield from self._hold(tokens, space, needs)
            except BaseException:
                self._end_wait(session, wait)
                raise
            if not wait.cancelled:
                self._load(wait, space.owner(session.key), held, needs, caller)
            if not wait.jobs:
                return finish()
            done = _all_done([job.future for job in wait.jobs])
            return DeferredReply(done, finish, session_use.pop_all())

    def find_now(
        self,
        session: Session,
        tokens: Tokens,
        space: DocumentSpace,
        caller: RequestContext,
    ) -> Generator[None, None, FoundDocuments]:
        """Find and lease what is in L1 already."""
        self._cancel(session.key)
        with self._engine.sessions.use(session):
            held = yield from self._hold(tokens, space, self._needs(session))
            return self._grant(session, held, caller)

    def _needs(self, session: Session) -> RequiredParts:
        space = session.space
        return self._engine.registry.lookup(space.model, space.world_size)[1]

    def _hold(
        self, tokens: Tokens, space: DocumentSpace, needs: RequiredParts
    ) -> Generator[None, None, list[_HeldMatches]]:
        """Match, and hold the leading chunks of every run."""
        runs = yield from self._matcher.find(
            tokens, space, partial(self._count_ready, needs.full)
        )
        held = self._hold_at_once(runs, needs.full)
        try:
            for run in runs[len(held) :]:
                chunks = yield from self._engine.lookups.acquire(run.hashes, needs)
                held.append(_HeldMatches(run, chunks))
        except BaseException:
            self._release(held)
            raise
        return held

    def _hold_at_once(self, runs: Sequence[TokenRun], full: int) -> list[_HeldMatches]:
        """Hold all chunks of all runs, which are mostly there; or else none."""
        hashes = [key for run in runs for key in run.hashes]
        if len(hashes) > ACQUIRE_CHUNKS:
            return []
        chunks = iter(self._engine.l1.acquire(hashes, [full] * len(hashes)) or ())
        held = [
            _HeldMatches(
                run, [c for c in islice(chunks, len(run.hashes)) if c is not None]
            )
            for run in runs
        ]
        return [each for each in held if each.chunks]

    def _count_ready(self, full: int, hashes: list[ChunkHash]) -> int:
        return len(self._engine.l1.present(hashes, full))

    def _release(self, held: Sequence[_HeldMatches]) -> None:
        for each in held:
            self._engine.l1.release(each.chunks)
            each.chunks.clear()

    # -- tiers --------------------------------------------------------------------

    def _load(
        self,
        wait: _DocumentWait,
        owner: SaltedKey,
        held: Sequence[_HeldMatches],
        needs: RequiredParts,
        caller: RequestContext,
    ) -> None:
        """Begin to load what is missing, of all runs."""
        if not self._engine.tiering.has_tiers:
            return
        wait.jobs = [
            self._engine.tiering.prefetch(
                each.run.hashes[len(each.chunks) :],
                needs,
                chunk_size=self._engine.chunk_size,
                deadline=self._engine.lookups.deadline(caller),
                owner=owner,
            )
            for each in held
            if len(each.chunks) < len(each.run.hashes)
        ]

    def _complete(
        self,
        wait: _DocumentWait,
        held: Sequence[_HeldMatches],
        needs: RequiredParts,
        caller: RequestContext,
    ) -> None:
        """Hold what has come, too, and end the jobs' own holds."""
        is_late = bool(wait.jobs) and 0 < caller.deadline_ns < monotonic_ns()
        if wait.cancelled or is_late:
            self._release(held)
        elif wait.jobs:
            for each in held:
                missing = each.run.hashes[len(each.chunks) :]
                each.chunks += self._engine.l1.acquire_leading(missing, needs.full)
        for job in wait.jobs:
            self._forget_missing(job)
            job.settle()

    def _forget_missing(self, job: PrefetchTask) -> None:
        """Forget what every tier said it lacks."""
        for key in job.missing:
            if self._engine.l1.peek([key]) == [None]:
                self._index.forget(key)

    def _end_wait(self, session: Session, wait: _DocumentWait) -> None:
        """Forget a lookup that is over; the session may have a later one."""
        if self._waits.get(session.key) is wait:
            del self._waits[session.key]

    def _cancel(self, key: SessionKey) -> None:
        """Load nothing more for a session; a lookup under way finds nothing."""
        wait = self._waits.pop(key, None)
        if wait is None:
            return
        wait.cancelled = True
        for job in wait.jobs:
            job.cancel()

    def _cancel_client(self, client: Hashable) -> None:
        waits = self._waits.items()
        for key in [key for key, wait in waits if wait.client == client]:
            self._cancel(key)

    # -- leases -------------------------------------------------------------------

    def _grant(
        self, session: Session, held: Sequence[_HeldMatches], caller: RequestContext
    ) -> FoundDocuments:
        """Lease what is held; remember it for as long as the session lasts."""
        found = self._told(held)
        chunks = [chunk for each in held for chunk in each.chunks]
        owner = documents_of(session.key)
        if session.ended:
            # Its lease ended then; one that there is now is its successor's.
            self._release(held)
        elif not chunks:
            self._engine.leases.end(owner)
        else:
            space = session.space
            readers = (1 << space.world_size) - 1
            self._engine.leases.grant(
                owner, space.model, chunks, readers, caller.client
            )
        if not session.ended:
            self._found[session.key] = found
        if self._index.num_in_tier:
            for chunk in chunks:
                self._index.touch(chunk.hash)
        self._engine.tiering.used(chunks)
        return found

    def _told(self, held: Sequence[_HeldMatches]) -> FoundDocuments:
        """Put what is held as ranges and matches, in the prompt's order."""
        size = self._engine.chunk_size
        ranges: list[CBRange] = []
        matches: list[CBMatch] = []
        for each in held:
            old_start, start = each.run.old_start, each.run.start
            for chunk in each.chunks:
                matches.append(CBMatch(old_start, start, chunk.hash))
                old_start, start = old_start + size, start + size
            if each.run.goes_on and ranges and ranges[-1].end == each.run.start:
                ranges[-1] = CBRange(ranges[-1].start, start)
            elif each.chunks:
                ranges.append(CBRange(each.run.start, start))
        numbers = {match.start: number for number, match in enumerate(matches)}
        return FoundDocuments(tuple(ranges), tuple(matches), numbers)

    def lease_of(self, session: Session) -> LeaseNumber | None:
        """Return the lease that a read is under from here on, if there is one."""
        owner = documents_of(session.key)
        return None if session.ended else self._engine.leases.number(owner)

    def read(
        self,
        key: SessionKey,
        matches: Sequence[CBMatch],
        rank: int,
        lease: LeaseNumber | None,
    ) -> None:
        """Note that a rank has read these matches, under a lease and no later one."""
        found, owner = self._found.get(key), documents_of(key)
        if found is None or lease is None or lease != self._engine.leases.number(owner):
            return
        for match in matches:
            number = found.numbers.get(match.start)
            # A caller may name another chunk for this place than it was told of.
            if number is not None and found.matches[number].hash == match.hash:
                self._engine.leases.read(owner, number, number + 1, rank)

    def _end_session(self, key: SessionKey) -> None:
        self._cancel(key)
        self._engine.leases.end(documents_of(key))
        found = self._found.pop(key, None)
        if found is not None:
            self._engine.l1.touch([ChunkHash(match.hash) for match in found.matches])


def _all_done(futures: Sequence[Future[None]]) -> Future[None]:
    """Return a future that is done when all are, however they ended."""
    everything: Future[None] = Future()
    left = count(len(futures) - 1, -1)

    def done(_: Future[None]) -> None:
        # One step of a C iterator: no two callers get the same number.
        if next(left) == 0:
            everything.set_result(None)

    for future in futures:
        future.add_done_callback(done)
    return everything
