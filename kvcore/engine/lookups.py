"""Lookups: hold the leading chunks, prefetch missing ones from tiers, lease the hit.

Chunks in L1 are held at once. Where tiers may have more, the reply waits for a prefetch
and then counts and leases the chunks that L1 has by then.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from time import monotonic_ns

from msgspec.structs import replace

from kvcore.engine.counters import EngineCounters
from kvcore.engine.explain import MissHistory
from kvcore.engine.leases import LeaseTable
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
"""Time for a late reply to reach its client before the client gives up."""


@dataclass(slots=True, eq=False)
class _PrefetchWait:
    """A session's prefetch, and whether its lookup was cancelled."""

    job: PrefetchTask
    client: Hashable
    cancelled: bool = False


class Lookups:
    """Finds and leases leading chunks. Loop thread only."""

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
        context: RequestContext,
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
            return self._answer(session, needs, hashes, chunks, context, "")
        first = hit - max(
            (num_window_chunks(w.window, self._chunk_size) for w in needs.windows),
            default=0,
        )
        job = self._tiering.prefetch(
            hashes[max(first, 0) :],
            needs,
            chunk_size=self._chunk_size,
            deadline=self.deadline(context),
            owner=session.owner,
        )
        task = self._tasks[session.key] = _PrefetchWait(job, context.client)

        def finish() -> LookupReply:
            self._complete(task, hashes, chunks, needs, context)
            if task.cancelled:
                # The session's lease, if there is one, is a later lookup's.
                return self._reply(hashes, 0)
            reply = self._answer(session, needs, hashes, chunks, context, job.outcome)
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
        """Return how many leading chunks are a hit, their windows considered."""
        if not needs.windows:
            return len(chunks)
        masks = [chunk.ready for chunk in chunks]
        return count_hits(masks, needs, self._chunk_size)

    def deadline(self, context: RequestContext) -> float:
        """Return the latest time of the reply: ours, or just before the client's."""
        now = monotonic_ns()
        due = now + int(self._deadline_s * 1e9)
        if context.deadline_ns:
            due = min(due, context.deadline_ns - int(ANSWER_S * 1e9))
        return due / 1e9

    def _complete(
        self,
        task: _PrefetchWait,
        hashes: Sequence[ChunkHash],
        chunks: list[Chunk],
        needs: RequiredParts,
        context: RequestContext,
    ) -> None:
        """Hold the chunks that were loaded, and settle the prefetch.

        A lookup that was cancelled, or is too late for its client, holds nothing.
        """
        is_pending = not (task.cancelled or 0 < context.deadline_ns < monotonic_ns())
        if is_pending:
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
        context: RequestContext,
        tiers: str,
    ) -> LookupReply:
        """Lease the held chunks that are a hit; record the first miss.

        `tiers` is the prefetch's outcome, empty without one. A session that has ended
        meanwhile gets no lease: one that exists belongs to a later session of its id.
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
            self._leases.grant(
                session.key, space.model, chunks, readers, context.client
            )
        self._tiering.used(chunks)
        return self._reply(hashes, hit)

    def _reply(self, hashes: Sequence[ChunkHash], hit: int) -> LookupReply:
        self._counters.lookups += 1
        self._counters.lookup_chunks += len(hashes)
        self._counters.lookup_chunks_hit += hit
        return LookupReply(hit, hit * self._chunk_size)

    def cancel(self, key: SessionKey) -> None:
        """Cancel a session's prefetch; its waiting lookup finds nothing.

        Called when the session ends or looks up again.
        """
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancelled = True
            task.job.cancel()

    def cancel_client(self, client: Hashable) -> None:
        """Cancel the prefetches of a client that ended."""
        tasks = self._tasks.items()
        for key in [key for key, task in tasks if task.client == client]:
            self.cancel(key)
