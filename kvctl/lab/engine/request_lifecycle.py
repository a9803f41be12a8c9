"""One request's life in a played engine: look up, load, compute, store, end."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import msgspec

from kvcore.errors import Closed, KVError, Unavailable
from kvcore.keys import ChunkHash, HashChain, SessionKey, pack_tokens
from kvcore.protocol import LookupReply
from kvctl.lab.engine import continuous_batch as batch
from kvctl.lab.engine.batch_clock import BatchClock, BatchProgress
from kvctl.lab.engine.engine_statistics import HEAD_BYTES
from kvctl.lab.engine.request_log import Outcome, RequestEntry
from kvctl.lab.engine.request_pacer import PacedRequest
from kvctl.lab.process_messages import (
    RequestDone,
    RunDocuments,
    RunRequest,
    Tally,
    send,
)
from kvctl.lab.rank.rank_cache import Indices
from kvctl.lab.systems.system_interface import ExternalClient, taken_s
from kvctl.lab.workload.access_generators import Tokens

if TYPE_CHECKING:
    from kvctl.lab.engine.simulated_scheduler import SimulatedScheduler

HASH_SLICE = 1 << 20
"""Chunks hashed at once: nobody else is served by this thread."""
NONE = float("nan")

_played = msgspec.msgpack.Decoder(RequestDone)


class AbortedRequest(Enum):
    """Where a request is given up."""

    LOOKED_UP = 0
    """What was found is never read: the lease ends with the session."""
    COMPUTING = 1
    DECODING = 2
    """Half its answer is there, and its store may be under way."""


@dataclass(slots=True)
class RequestProgress:
    """One request under way."""

    taken: PacedRequest
    session: SessionKey
    abort: AbortedRequest | None
    durations: dict[str, float] = field(default_factory=dict)
    hashes: list[ChunkHash] = field(default_factory=list)
    hit: LookupReply | None = None
    """Of the first lookup, where a preemption made it look up again."""
    waited_s: float = 0.0
    """In calls, until the first token."""
    ttft_s: float = NONE
    produced: int = 0
    preemptions: int = 0
    ended_s: float = 0.0
    released: bool = False
    """Its session's next request may begin."""

    @property
    def tokens(self) -> Tokens:
        """The prompt."""
        return self.taken.tokens


class RequestLifecycle:
    """Plays requests one after another, with a connection to each rank."""

    def __init__(self, engine: SimulatedScheduler, ranks: Sequence[Connection]) -> None:
        self._engine = engine
        self._ranks = ranks
        self._clock = engine.clock

    def play(self, taken: PacedRequest) -> None:
        """Play one request; what the server refuses is counted as an error.

        Raises:
            Unavailable, Closed, SetupError: nothing can be played any more; not the
                first two where the scenario has faults.
        """
        key = SessionKey(self._engine.plan.engine_id, taken.access.request_id)
        life = RequestProgress(taken, key, self._abort_of(taken))
        outcome = Outcome.FAILED
        try:
            outcome = self._live(life)
        except (Unavailable, Closed) as error:
            if not self._engine.plan.scenario.faults:
                raise
            self._engine.tell_error(f"request: {error.code}: {error.message}", taken)
        finally:
            self._release(life)
            self._note(life, outcome)

    def _abort_of(self, taken: PacedRequest) -> AbortedRequest | None:
        """Draw by the request's name, so that a repetition gives up the same ones."""
        plan = self._engine.plan
        model, name = plan.scenario.engine, f"{plan.seed} {taken.access.request_id}"
        drawn = int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
        if model is None or drawn >= model.abort_share * 2**64:
            return None
        return AbortedRequest(drawn % len(AbortedRequest))

    def _live(self, life: RequestProgress) -> Outcome:
        stepper = self._engine.stepper
        if stepper is None:
            return self._live_without_model(life)
        while True:
            found = self._lookup(life)
            if found is None:
                return Outcome.FAILED
            if life.abort is AbortedRequest.LOOKED_UP:
                return self._end(life, Outcome.ABORTED)
            outcome = self._load_and_compute(life, found, stepper)
            if outcome is not None:
                return self._end(life, outcome)
            life.preemptions += 1

    def _live_without_model(self, life: RequestProgress) -> Outcome:
        found = self._lookup(life)
        if found is None:
            return Outcome.FAILED
        if life.hashes:
            blocks = self._engine.allocate(len(life.hashes))
            try:
                self._tell(self._task(life, found.num_tokens, blocks))
                self._hear(life)
            finally:
                self._engine.pool.free(blocks)
        return self._end(life, Outcome.DONE)

    # -- calls ----------------------------------------------------------------------

    def _lookup(self, life: RequestProgress) -> LookupReply | None:
        """Look up; what the server refuses is counted, and nothing is found."""
        engine, tokens = self._engine, life.tokens
        begun = self._clock.now()
        try:
            found = engine.client.lookup(
                life.session, engine.plan.model, engine.plan.scenario.ranks, tokens
            )
        except (Unavailable, Closed):
            raise
        except KVError as error:
            engine.tell_error(f"lookup: {error.code}: {error.message}", life.taken)
            return None
        lookup_s = taken_s(engine.client, self._clock.now() - begun)
        life.waited_s += lookup_s
        if life.hit is None:
            life.hit = found
            life.durations["lookup"] = lookup_s
            life.hashes = self._hashes(tokens)
        return found

    def _hashes(self, tokens: Tokens) -> list[ChunkHash]:
        chain = HashChain(self._engine.seed, self._engine.chunk_size)
        for _ in chain.extend(pack_tokens(tokens), HASH_SLICE):
            pass
        return chain.hashes

    def _end(self, life: RequestProgress, outcome: Outcome) -> Outcome:
        begun = self._clock.now()
        self._engine.client.end_session(life.session)
        ended = self._clock.now()
        client = self._engine.client
        if not isinstance(client, ExternalClient) or client.knows_sessions:
            life.durations["end_session"] = taken_s(client, ended - begun)
        life.ended_s = life.ended_s or ended
        return outcome

    # -- ranks ----------------------------------------------------------------------

    def _task(
        self,
        life: RequestProgress,
        hit_tokens: int,
        blocks: Indices,
        *,
        retrieve: bool = True,
        store: bool = True,
    ) -> RunRequest:
        engine = self._engine
        end = len(life.hashes) * engine.chunk_size if store else hit_tokens
        ids = tuple(of_group.tobytes() for of_group in engine.pool.of_groups(blocks))
        hashes = b"".join(life.hashes)
        asks = not engine.plan.system.is_ours
        tokens = bytes(pack_tokens(life.tokens)) if asks else b""
        return RunRequest(life.session, hit_tokens, end, hashes, ids, retrieve, tokens)

    def _tell(self, task: RunRequest | RunDocuments) -> None:
        for rank in self._ranks:
            send(rank, task)

    def _hear(self, life: RequestProgress) -> bool:
        """Wait for all ranks; say whether all went well."""
        unavailable, well, slowest = None, True, 0.0
        for rank in self._ranks:
            played = _played.decode(rank.recv_bytes())
            self._engine.score.add(
                played.tally,
                played.durations,
                errors=played.errors,
                warm_up=life.taken.warm_up,
            )
            unavailable = unavailable or played.unavailable
            well = well and not played.errors
            slowest = max(slowest, played.durations.get("retrieve", 0.0))
        life.waited_s += slowest
        if unavailable:
            raise Unavailable(unavailable)
        return well

    # -- the engine's time model ------------------------------------------------------

    def _load_and_compute(
        self, life: RequestProgress, found: LookupReply, stepper: BatchClock
    ) -> Outcome | None:
        """Play on from a lookup; None when it was preempted and has to begin again."""
        blocks = self._engine.allocate(len(life.hashes))
        storing = False
        try:
            hit = found.num_tokens
            if hit:
                self._tell(self._task(life, hit, blocks, store=False))
                hit = hit if self._hear(life) else 0
            progress = self._submit(life, hit, stepper)
            if life.abort is AbortedRequest.COMPUTING:
                stepper.abort(progress)
                return Outcome.ABORTED
            stepper.await_first_token(progress)
            if progress.preempted:
                return None
            self._first_token(life, progress)
            if hit < len(life.hashes) * self._engine.chunk_size:
                self._tell(self._task(life, hit, blocks, retrieve=False))
                storing = True
            return self._decode(life, progress, stepper)
        finally:
            try:
                if storing:
                    self._hear(life)
            finally:
                self._engine.pool.free(blocks)

    def _submit(
        self, life: RequestProgress, hit: int, stepper: BatchClock
    ) -> BatchProgress:
        """Queue what is to compute: at least the last token, for its answer."""
        prompt = len(life.tokens) + life.produced
        output = life.taken.access.output_length - life.produced
        self._submitted_s = self._clock.now()
        return stepper.submit(
            batch.Sequence(prompt, min(hit, prompt - 1), max(1, output))
        )

    def _first_token(self, life: RequestProgress, progress: BatchProgress) -> None:
        """Take the time to the first token: waits, calls, and what was computed.

        Bytes are checked between the calls, which no engine does: that time is left
        out.
        """
        if life.produced or progress.first_token_s is None:
            return
        queued = life.taken.begun_s - life.taken.due_s
        computed = progress.first_token_s - self._submitted_s
        life.ttft_s = queued + life.waited_s + computed
        life.durations["ttft"] = life.ttft_s

    def _decode(
        self, life: RequestProgress, progress: BatchProgress, stepper: BatchClock
    ) -> Outcome | None:
        if life.abort is AbortedRequest.DECODING:
            half = progress.sequence.output_tokens // 2
            stepper.await_end(progress, half)
            stepper.abort(progress)
            return Outcome.ABORTED
        stepper.await_end(progress)
        life.produced += progress.sequence.produced_tokens
        if progress.preempted:
            return None
        life.ended_s = progress.finished_s or self._clock.now()
        if self._engine.overlap_stores:
            self._release(life)
        return Outcome.DONE

    # -- what is told -----------------------------------------------------------------

    def _release(self, life: RequestProgress) -> None:
        if not life.released:
            life.released = True
            self._engine.pacer.done(life.taken)

    def _note(self, life: RequestProgress, outcome: Outcome) -> None:
        taken, hit, engine = life.taken, life.hit, self._engine.plan.engine
        chunk_size = self._engine.chunk_size
        ended_s = life.ended_s or self._clock.now()
        if outcome is Outcome.DONE:
            life.durations["request"] = ended_s - taken.due_s
        tally = Tally(
            requests=1,
            aborted=int(outcome is Outcome.ABORTED),
            preemptions=life.preemptions,
            tokens=len(life.tokens) if hit else 0,
            tokens_hit=hit.num_tokens if hit else 0,
            tokens_from_tiers=hit.num_from_tiers * chunk_size if hit else 0,
            chunks=len(life.hashes),
            chunks_hit=hit.num_chunks if hit else 0,
        )
        heads = [head[:HEAD_BYTES] for head in life.hashes]
        warm_up = taken.warm_up
        self._engine.score.add(tally, life.durations, heads, warm_up=warm_up)
        self._engine.score.note(
            RequestEntry(
                due_s=taken.due_s,
                begun_s=taken.begun_s,
                ended_s=ended_s,
                lag_s=taken.lag_s,
                ttft_s=life.ttft_s,
                tokens=tally.tokens,
                tokens_hit=tally.tokens_hit,
                session=zlib.crc32(f"{engine} {taken.access.session}".encode()),
                engine=engine,
                step=taken.step,
                preemptions=life.preemptions,
                outcome=outcome,
                warm_up=warm_up,
            )
        )
