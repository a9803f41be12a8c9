"""Lookups: hold leading chunks, prefetch missing ones from tiers, lease the hits.

Chunks in L1 are held at once. Where tiers may have more, the reply waits until the
prefetches have ended; then the chunks that L1 has by then are leased. The prefix of a
prompt is one run of chunks; a lookup of documents has several.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain, count
from time import monotonic_ns

import msgspec

from kvcore.engine.leases import LeaseNumber, LeaseTable
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.sessions import Session, SessionTable
from kvcore.engine.tiering import PrefetchTask, Tiering
from kvcore.keys import ChunkHash, SessionKey
from kvcore.storage.l1 import L1, Chunk
from kvcore.storage.quotas import owner_salt
from kvcore.storage.required_parts import RequiredParts, count_hits, num_window_chunks

ACQUIRE_CHUNKS = 256
"""Chunks found and held in one step of a lookup, about 50 us."""
ANSWER_S = 0.02
"""Time for a late reply to reach its client before the client gives up."""


@dataclass(slots=True, eq=False)
class PendingLookup:
    """What one lookup wants, and what it has found so far."""

    session: Session
    lease_owner: SessionKey
    """At most one lookup of an owner is pending, and at most one lease is live."""
    quota_owner: SessionKey
    """Owner of the chunks that tiers load."""
    needs: RequiredParts
    context: RequestContext
    loads: bool = True
    """Whether to load missing chunks from tiers."""
    runs: Sequence[Sequence[ChunkHash]] = ()
    """Hashes of the wanted chunks. Of each run only leading chunks can be a hit."""
    held: list[list[Chunk]] = field(default_factory=list)
    """Leading chunks of each run: held, and in the end those that are a hit, leased."""
    tasks: list[PrefetchTask] = field(default_factory=list)
    num_in_l1: int = 0
    """Hits before the prefetches, if there are any."""
    lease: LeaseNumber | None = None
    cancelled: bool = False
    """The session ended or looked up again, or the client ended: nothing is found."""


MakeReply = Callable[[PendingLookup], msgspec.Struct]


class Lookups:
    """Runs lookups and grants their leases. Loop thread only."""

    def __init__(
        self,
        l1: L1,
        leases: LeaseTable,
        sessions: SessionTable,
        tiering: Tiering,
        chunk_size: int,
        deadline_s: float,
    ) -> None:
        self._l1 = l1
        self._leases = leases
        self._sessions = sessions
        self._tiering = tiering
        self._chunk_size = chunk_size
        self._deadline_s = deadline_s
        self._pending: dict[SessionKey, PendingLookup] = {}
        """By lease owner. A lookup with prefetches stays here after its reply: they
        continue after their deadline, until they are cancelled."""

    def run(
        self, lookup: PendingLookup, make_reply: MakeReply, search: Iterable[None] = ()
    ) -> Generator[None, None, msgspec.Struct | DeferredReply]:
        """Answer a lookup, in steps; keep its session in use while tiers load.

        `search` sets `lookup.runs`, in steps. `make_reply` is called once, after the
        lease was granted.
        """
        # What is pending under the owner of an ended session is its successor's.
        if not lookup.session.ended:
            self._cancel(lookup.lease_owner)
            self._pending[lookup.lease_owner] = lookup

        def finish() -> msgspec.Struct:
            self._complete(lookup)
            reply = make_reply(lookup)
            lookup.runs, lookup.held = (), []
            return reply

        try:
            yield from search
            yield from self._hold(lookup)
        except BaseException:
            self._release(lookup)
            self._discard(lookup)
            raise
        if self._tiering.has_tiers:
            self._prefetch(lookup)
        if not lookup.tasks:
            return finish()
        reply = DeferredReply(_all_done(lookup.tasks), finish)
        reply.resources.enter_context(self._sessions.use(lookup.session))
        return reply

    def count_present(self, hashes: Sequence[ChunkHash], needs: RequiredParts) -> int:
        """Return how many leading chunks L1 has, windows not considered."""
        return len(self._l1.present(hashes, needs.full))

    def note_read(
        self, owner: SessionKey, lease: LeaseNumber | None, chunks: range, rank: int
    ) -> None:
        """Remove a rank from the readers of chunks, if the lease is still this one."""
        if lease is not None and lease == self._leases.number(owner):
            self._leases.read(owner, chunks.start, chunks.stop, rank)

    def end(self, owner: SessionKey, used: Sequence[ChunkHash] = ()) -> None:
        """End an owner's lease and pending lookup; note the use of chunks in L1."""
        self._cancel(owner)
        self._leases.end(owner)
        if used:
            self._l1.touch(used)

    def cancel_client(self, client: Hashable) -> None:
        """Cancel the pending lookups of a client that ended."""
        pending = self._pending.items()
        for owner in [o for o, each in pending if each.context.client == client]:
            self._cancel(owner)

    # -- steps ------------------------------------------------------------------------

    def _hold(self, lookup: PendingLookup) -> Generator[None, None, None]:
        """Hold the leading chunks with all full-attention parts, of every run."""
        acquire, full = self._l1.acquire_leading, lookup.needs.full
        left = ACQUIRE_CHUNKS
        for run in lookup.runs:
            chunks: list[Chunk] = []
            lookup.held.append(chunks)
            while len(chunks) < len(run):
                if left <= 0:
                    yield
                    left = ACQUIRE_CHUNKS
                step = run[len(chunks) : len(chunks) + left]
                found = acquire(step, full)
                chunks += found
                left -= len(step)
                if len(found) < len(step):
                    break

    def _prefetch(self, lookup: PendingLookup) -> None:
        """Start to load what L1 lacks, of all runs."""
        if lookup.cancelled or lookup.session.ended or not lookup.loads:
            return
        needs = lookup.needs
        windows = [num_window_chunks(w.window, self._chunk_size) for w in needs.windows]
        for run, chunks in zip(lookup.runs, lookup.held, strict=True):
            hit = self._count(chunks, needs)
            lookup.num_in_l1 += hit
            if hit < len(run):
                first = max(hit - max(windows, default=0), 0)
                task = self._tiering.prefetch(
                    run[first:],
                    needs,
                    chunk_size=self._chunk_size,
                    deadline=self._deadline(lookup.context),
                    owner=lookup.quota_owner,
                )
                lookup.tasks.append(task)

    def _complete(self, lookup: PendingLookup) -> None:
        """Hold what was loaded, settle the prefetches, lease the hits.

        A lookup that was cancelled, or is too late for its client, finds nothing.
        """
        is_late = bool(lookup.tasks) and 0 < lookup.context.deadline_ns < monotonic_ns()
        if lookup.cancelled or is_late:
            self._release(lookup)
        elif lookup.tasks:
            for run, chunks in zip(lookup.runs, lookup.held, strict=True):
                rest = run[len(chunks) :]
                chunks += self._l1.acquire_leading(rest, lookup.needs.full)
        for task in lookup.tasks:
            task.settle()
        if not lookup.tasks:
            self._discard(lookup)
        if not lookup.cancelled:
            # Otherwise the session's lease, if it has one, is a later lookup's.
            self._grant(lookup)

    def _grant(self, lookup: PendingLookup) -> None:
        """Lease the held chunks that are a hit; release the others.

        A session that has ended meanwhile gets no lease: one that exists belongs to a
        later session of its key.
        """
        needs, session = lookup.needs, lookup.session
        salt = owner_salt(lookup.quota_owner)
        allowed = num_held = sum(map(len, lookup.held))
        if not session.ended:
            size = needs.chunk_bytes
            allowed = self._leases.fit(lookup.lease_owner, salt, size, allowed)
        cut = needs.windows or allowed < num_held
        for chunks in lookup.held if cut else ():
            hit = self._count(chunks[:allowed], needs)
            self._l1.release(chunks[hit:])
            del chunks[hit:]
            allowed -= hit
        hits = [*chain.from_iterable(lookup.held)]
        if session.ended:
            self._l1.release(hits)
        elif hits:
            space, client = session.space, lookup.context.client
            lookup.lease = self._leases.grant(
                lookup.lease_owner,
                space.model,
                hits,
                (1 << space.world_size) - 1,
                client,
                salt,
                needs.chunk_bytes,
            )
        self._tiering.used(hits)

    def _count(self, chunks: Sequence[Chunk], needs: RequiredParts) -> int:
        """Return how many leading chunks are a hit, their windows considered."""
        if not needs.windows:
            return len(chunks)
        masks = [chunk.ready for chunk in chunks]
        return count_hits(masks, needs, self._chunk_size)

    def _deadline(self, context: RequestContext) -> float:
        """Return the latest time of the reply: ours, or just before the client's."""
        due = monotonic_ns() + int(self._deadline_s * 1e9)
        if context.deadline_ns:
            due = min(due, context.deadline_ns - int(ANSWER_S * 1e9))
        return due / 1e9

    def _release(self, lookup: PendingLookup) -> None:
        for chunks in lookup.held:
            self._l1.release(chunks)
            chunks.clear()

    def _discard(self, lookup: PendingLookup) -> None:
        """Forget a lookup that is over; its owner may have a later one."""
        if self._pending.get(lookup.lease_owner) is lookup:
            del self._pending[lookup.lease_owner]

    def _cancel(self, owner: SessionKey) -> None:
        lookup = self._pending.pop(owner, None)
        if lookup is not None:
            lookup.cancelled = True
            for task in lookup.tasks:
                task.cancel()


def _all_done(tasks: Sequence[PrefetchTask]) -> Future[None]:
    """Return a future that is done when all tasks are, however they ended."""
    if len(tasks) == 1:
        return tasks[0].future
    everything: Future[None] = Future()
    left = count(len(tasks) - 1, -1)

    def done(_: Future[None]) -> None:
        # One step of a C iterator is atomic: each call gets its own number.
        if next(left) == 0:
            everything.set_result(None)

    for task in tasks:
        task.future.add_done_callback(done)
    return everything
