"""Lookups: find leading chunks, have tiers load what is missing, lease what is there.

One path for all: what L1 has is held at once; where tiers may have more, the answer
waits for a prefetch job, and then counts and leases what L1 has by then.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from time import monotonic_ns

from msgspec.structs import replace

from kvcore.engine.counters import EngineCounters
from kvcore.engine.leases import LeaseTable
from kvcore.engine.miss_history import MissHistory
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.sessions import Session
from kvcore.engine.tiering import PrefetchTask, Tiering
from kvcore.keys import ChunkHash, SessionKey
from kvcore.protocol import LookupReply
from kvcore.storage.l1 import L1, Chunk
from kvcore.storage.required_parts import RequiredParts, count_hits, num_window_chunks

ACQUIRE_CHUNKS = 256
"""Chunks found and held in one step of a lookup, about 50 us."""
ANSWER_S = 0.02
"""What a late answer has to get to its client before the client gives up."""


@dataclass(slots=True, eq=False)
class _PrefetchWait:
    """A session's prefetch, and whether somebody still wants it."""

    job: PrefetchTask
    client: Hashable
    cancelled: bool = False


class Lookups:
    """Counts and leases leading chunks. Loop thread only."""

    def __init__(
        self,
        l1: L1,
        leases: LeaseTable,
        counters: EngineCounters,
        chunk_size: int,
        tiering: Tiering,
        history: MissHistory,
        deadline_s: float,
    ) -> None:
        self._l1 = l1
        self._leases = leases
        self._counters = counters
        self._chunk_size = chunk_size
        self._tiering = tiering
        self._history = history
        self._deadline_s = deadline_s
        self._tasks: dict[SessionKey, _PrefetchWait] = {}

    def find(
        self,
        session: Session,
        needs: RequiredParts,
        hashes: Sequence[ChunkHash],
        caller: RequestContext,
        *,
        wait: bool,
    ) -> Generator[None, None, LookupReply | DeferredReply]:
        """Answer a lookup of chunks `hashes`, in steps.

        The caller keeps the session in use until the reply. A lookup that
        is overtaken by the session's next lookup finds nothing.
        """
        if not session.ended:
            self.cancel(session.key)
        session.num_lookups += 1
        number = session.num_lookups
        chunks = yield from self.acquire(hashes, needs)
        if session.num_lookups != number:
            self._l1.release(chunks)
            return self._reply(hashes, 0)
        hit = self.count(chunks, needs)
        if not self._tiering.has_tiers or hit == len(hashes) or session.ended:
            return self._answer(session, needs, hashes, chunks, caller, "")
        first = hit - max(
            (num_window_chunks(w.window, self._chunk_size) for w in needs.windows),
            default=0,
        )
        job = self._tiering.prefetch(
            hashes[max(first, 0) :],
            needs,
            chunk_size=self._chunk_size,
            deadline=self.deadline(caller),
            owner=session.owner,
            wait=wait,
        )
        task = self._tasks[session.key] = _PrefetchWait(job, caller.client)
        if not wait:
            return self._answer(session, needs, hashes, chunks, caller, "")

        def finish() -> LookupReply:
            self._complete(task, hashes, chunks, needs, caller)
            if task.cancelled:
                # The session's lease, if there is one, is a later lookup's.
                return self._reply(hashes, 0)
            reply = self._answer(session, needs, hashes, chunks, caller, job.outcome)
            loaded = max(0, reply.num_chunks - hit)
            return replace(reply, num_from_tiers=loaded)

        return DeferredReply(job.future, finish)

    def acquire(
        self, hashes: Sequence[ChunkHash], needs: RequiredParts
    ) -> Generator[None, None, list[Chunk]]:
        """Hold and return the leading chunks with all full-attention parts, in steps.

        `count_hits` of their `ready` masks says how many of them are a hit.
        """
        chunks: list[Chunk] = []
        try:
            for first in range(0, len(hashes), ACQUIRE_CHUNKS):
                if first:
                    yield
                step = hashes[first : first + ACQUIRE_CHUNKS]
                found = self._l1.acquire_leading(step, needs.full)
                chunks += found
                if len(found) < len(step):
                    break
        except GeneratorExit:
            self._l1.release(chunks)
            raise
        return chunks

    def count(self, chunks: Sequence[Chunk], needs: RequiredParts) -> int:
        """Return how many of the leading chunks are a hit, windows minded."""
        if not needs.windows:
            return len(chunks)
        masks = [chunk.ready for chunk in chunks]
        return count_hits(masks, needs, self._chunk_size)

    def deadline(self, caller: RequestContext) -> float:
        """Return when to answer at the latest: ours, or just before the caller's."""
        now = monotonic_ns()
        due = now + int(self._deadline_s * 1e9)
        if caller.deadline_ns:
            due = min(due, caller.deadline_ns - int(ANSWER_S * 1e9))
        return due / 1e9

    def _complete(
        self,
        task: _PrefetchWait,
        hashes: Sequence[ChunkHash],
        chunks: list[Chunk],
        needs: RequiredParts,
        caller: RequestContext,
    ) -> None:
        """Hold what has come, too, and end the job's holds.

        What was cancelled, or is too late for its client, finds nothing.
        """
        wanted = not (task.cancelled or 0 < caller.deadline_ns < monotonic_ns())
        if wanted:
            chunks += self._l1.acquire_leading(hashes[len(chunks) :], needs.full)
        else:
            self._l1.release(chunks)
            chunks.clear()
        task.job.settle()

    def _answer(
        self,
        session: Session,
        needs: RequiredParts,
        hashes: Sequence[ChunkHash],
        chunks: list[Chunk],
        caller: RequestContext,
        tiers: str,
    ) -> LookupReply:
        """Lease what makes a hit of the held chunks; remember why the rest does not.

        `tiers` says why they did not help, where they were asked. A session that has
        ended meanwhile gets no lease, and leaves alone what the next of its id has.
        """
        hit = self.count(chunks, needs)
        self._l1.release(chunks[hit:])
        del chunks[hit:]
        if hit < len(hashes):
            [first] = self._l1.peek([hashes[hit]])
            self._history.note_miss(session.key, hashes, hit, first, needs, tiers)
        if session.ended:
            self._l1.release(chunks)
        elif not chunks:
            self._leases.end(session.key)
        else:
            space = session.space
            readers = (1 << space.world_size) - 1
            self._leases.grant(session.key, space.model, chunks, readers, caller.client)
        self._tiering.used(chunks)
        return self._reply(hashes, hit)

    def _reply(self, hashes: Sequence[ChunkHash], hit: int) -> LookupReply:
        self._counters.lookups += 1
        self._counters.lookup_chunks += len(hashes)
        self._counters.lookup_chunks_hit += hit
        return LookupReply(hit, hit * self._chunk_size)

    def cancel(self, key: SessionKey) -> None:
        """Load nothing more for a session; a lookup that waits is answered with none.

        For an ended session, and for one that looks up again.
        """
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancelled = True
            task.job.cancel()

    def cancel_client(self, client: Hashable) -> None:
        """Load nothing more for a client that is gone."""
        tasks = self._tasks.items()
        for key in [key for key, task in tasks if task.client == client]:
            self.cancel(key)
