"""The lifecycle of a request: look up, retrieve, compute, store, end the session."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

import msgspec

from kvcore.errors import Closed, KVError, Unavailable
from kvcore.keys import ChunkHash, HashChain, SessionKey, pack_tokens
from kvcore.protocol import LookupReply
from kvctl.lab.config.model_geometry import Indices
from kvctl.lab.engine.continuous_batch import BatchClock, BatchSequence
from kvctl.lab.engine.engine_state import EngineState
from kvctl.lab.engine.engine_statistics import HEAD_BYTES, Outcome, RequestEntry
from kvctl.lab.engine.request_pacer import PacedRequest
from kvctl.lab.process_messages import (
    RequestDone,
    RunDocuments,
    RunRequest,
    Tally,
    send,
)
from kvctl.lab.systems.system_interface import ExternalClient, call_duration_s
from kvctl.lab.traces.trace_rows import Tokens

HASH_SLICE = 1 << 20
"""Chunks hashed per step: this thread has nothing else to do."""
NAN = float("nan")
P = ParamSpec("P")
R = TypeVar("R")

_reply_decoder = msgspec.msgpack.Decoder(RequestDone)


class AbortPoint(Enum):
    """Where a request is aborted."""

    LOOKED_UP = 0
    """Found chunks are never retrieved: the lease ends with the session."""
    PREFILL = 1
    DECODE = 2
    """Half of the output has been produced, and a store may be in progress."""


@dataclass(slots=True)
class RequestProgress:
    """One request in progress."""

    paced: PacedRequest
    session: SessionKey
    abort: AbortPoint | None
    durations: dict[str, float] = field(default_factory=dict)
    hashes: list[ChunkHash] = field(default_factory=list)
    hit: LookupReply | None = None
    """Reply of the first lookup; a preempted request makes another one."""
    waited_s: float = 0.0
    """In calls, until the first token."""
    submitted_s: float = 0.0
    ttft_s: float = NAN
    num_produced: int = 0
    preemptions: int = 0
    ended_s: float = 0.0
    released: bool = False
    """The session's next request may begin."""

    @property
    def tokens(self) -> Tokens:
        """The prompt."""
        return self.paced.tokens


class RequestLifecycle:
    """Executes requests one after another, with a connection to each rank."""

    def __init__(self, engine: EngineState, ranks: Sequence[Connection]) -> None:
        self._engine = engine
        self._ranks = ranks
        self._clock = engine.clock

    def execute(self, paced: PacedRequest) -> None:
        """Execute one request; errors of the server are counted.

        Raises:
            SetupError: the cache is too small.
            Unavailable, Closed: the server cannot be reached, and the scenario has no
                faults.
        """
        key = SessionKey(self._engine.plan.engine_id, paced.access.request_id)
        request = RequestProgress(paced, key, self._abort_point(paced))
        outcome = Outcome.FAILED
        try:
            outcome = self._execute(request)
        except (Unavailable, Closed) as error:
            if not self._engine.plan.scenario.faults:
                raise
            message = f"request: {error.code}: {error.message}"
            self._engine.count_error(message, paced)
        finally:
            self._release(request)
            self._record(request, outcome)

    def _abort_point(self, paced: PacedRequest) -> AbortPoint | None:
        """Return a pseudo-random choice that depends on seed and request id alone."""
        plan = self._engine.plan
        model, name = plan.scenario.engine, f"{plan.seed} {paced.access.request_id}"
        drawn = int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
        if model is None or drawn >= model.abort_share * 2**64:
            return None
        return AbortPoint(drawn % len(AbortPoint))

    def _execute(self, request: RequestProgress) -> Outcome:
        batch_clock = self._engine.batch_clock
        if batch_clock is None:
            return self._execute_without_model(request)
        while True:
            found = self._lookup(request)
            if found is None:
                return Outcome.FAILED
            if request.abort is AbortPoint.LOOKED_UP:
                return self._end(request, Outcome.ABORTED)
            outcome = self._retrieve_and_compute(request, found, batch_clock)
            if outcome is not None:
                return self._end(request, outcome)
            request.preemptions += 1

    def _execute_without_model(self, request: RequestProgress) -> Outcome:
        found = self._lookup(request)
        if found is None:
            return Outcome.FAILED
        if request.hashes:
            blocks = self._engine.allocate(len(request.hashes))
            try:
                self._send(self._task(request, found.num_tokens, blocks))
                self._receive(request)
            finally:
                self._engine.pool.free(blocks)
        return self._end(request, Outcome.DONE)

    # -- calls ----------------------------------------------------------------------

    def _timed_call(
        self,
        request: RequestProgress,
        name: str,
        call: Callable[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R | None:
        """Call the server; count an error of the server and return None.

        The first call of a name is the one whose duration is recorded: a preempted
        request makes another lookup.
        """
        begun = self._clock.now()
        try:
            reply = call(*args, **kwargs)
        except (Unavailable, Closed):
            raise
        except KVError as error:
            message = f"{name}: {error.code}: {error.message}"
            self._engine.count_error(message, request.paced)
            return None
        duration_s = call_duration_s(self._engine.client, self._clock.now() - begun)
        request.waited_s += duration_s
        request.durations.setdefault(name, duration_s)
        return reply

    def _lookup(self, request: RequestProgress) -> LookupReply | None:
        """Look up; None after an error of the server."""
        plan, key = self._engine.plan, request.session
        arguments = (key, plan.model, plan.scenario.ranks, request.tokens)
        lookup = self._engine.client.lookup
        found = self._timed_call(request, "lookup", lookup, *arguments)
        if found is not None and request.hit is None:
            request.hit = found
            request.hashes = self._hash(self._engine.seed, request.tokens)
        return found

    def _hash(self, seed: ChunkHash, tokens: Tokens) -> list[ChunkHash]:
        chain = HashChain(seed, self._engine.chunk_size)
        for _ in chain.extend(pack_tokens(tokens), HASH_SLICE):
            pass
        return chain.hashes

    def _end(self, request: RequestProgress, outcome: Outcome) -> Outcome:
        client = self._engine.client
        begun = self._clock.now()
        client.end_session(request.session)
        ended = self._clock.now()
        if not isinstance(client, ExternalClient) or client.has_sessions:
            request.durations["end_session"] = call_duration_s(client, ended - begun)
        request.ended_s = request.ended_s or ended
        return outcome

    # -- ranks ----------------------------------------------------------------------

    def _task(
        self,
        request: RequestProgress,
        hit_tokens: int,
        blocks: Indices,
        *,
        retrieve: bool = True,
        store: bool = True,
    ) -> RunRequest:
        engine = self._engine
        end = len(request.hashes) * engine.chunk_size if store else hit_tokens
        ids = tuple(ids.tobytes() for ids in engine.pool.ids_by_group(blocks))
        hashes = b"".join(request.hashes)
        external = not engine.plan.system.is_ours
        tokens = bytes(pack_tokens(request.tokens)) if external else b""
        return RunRequest(
            request.session, hit_tokens, end, hashes, ids, retrieve, tokens
        )

    def _send(self, task: RunRequest | RunDocuments) -> None:
        for rank in self._ranks:
            send(rank, task)

    def _receive(self, request: RequestProgress) -> bool:
        """Wait for all ranks; return whether none had an error.

        Raises:
            Unavailable: a rank could not reach the server.
        """
        unavailable, succeeded, slowest_s = None, True, 0.0
        for rank in self._ranks:
            reply = _reply_decoder.decode(rank.recv_bytes())
            self._engine.statistics.add(
                reply.tally,
                reply.durations,
                errors=reply.errors,
                warm_up=request.paced.warm_up,
            )
            unavailable = unavailable or reply.unavailable
            succeeded = succeeded and not reply.errors
            slowest_s = max(slowest_s, reply.durations.get("retrieve", 0.0))
        request.waited_s += slowest_s
        if unavailable:
            raise Unavailable(unavailable)
        return succeeded

    # -- the engine's time model ------------------------------------------------------

    def _retrieve_and_compute(
        self, request: RequestProgress, found: LookupReply, batch_clock: BatchClock
    ) -> Outcome | None:
        """Continue after a lookup; None if the request was preempted."""
        blocks = self._engine.allocate(len(request.hashes))
        storing = False
        try:
            hit = found.num_tokens
            if hit:
                self._send(self._task(request, hit, blocks, store=False))
                hit = hit if self._receive(request) else 0
            sequence = self._submit(request, hit, batch_clock)
            if request.abort is AbortPoint.PREFILL:
                batch_clock.abort(sequence)
                return Outcome.ABORTED
            batch_clock.await_first_token(sequence)
            if sequence.preempted:
                return None
            self._record_first_token(request, sequence)
            if hit < len(request.hashes) * self._engine.chunk_size:
                self._send(self._task(request, hit, blocks, retrieve=False))
                storing = True
            return self._decode(request, sequence, batch_clock)
        finally:
            try:
                if storing:
                    self._receive(request)
            finally:
                self._engine.pool.free(blocks)

    def _submit(
        self, request: RequestProgress, hit: int, batch_clock: BatchClock
    ) -> BatchSequence:
        """Queue the missing tokens: at least the last one, whose logits are needed."""
        prompt = len(request.tokens) + request.num_produced
        output = request.paced.access.output_length - request.num_produced
        request.submitted_s = self._clock.now()
        sequence = BatchSequence(prompt, min(hit, prompt - 1), max(1, output))
        batch_clock.submit(sequence)
        return sequence

    def _record_first_token(
        self, request: RequestProgress, sequence: BatchSequence
    ) -> None:
        """Record the time to the first token: queueing, calls, and computation.

        The time in which bytes are checked is excluded: engines do not check bytes.
        """
        if request.num_produced or sequence.first_token_s is None:
            return
        queued_s = request.paced.begun_s - request.paced.due_s
        computed_s = sequence.first_token_s - request.submitted_s
        request.ttft_s = queued_s + request.waited_s + computed_s
        request.durations["ttft"] = request.ttft_s

    def _decode(
        self, request: RequestProgress, sequence: BatchSequence, batch_clock: BatchClock
    ) -> Outcome | None:
        if request.abort is AbortPoint.DECODE:
            half = sequence.output_tokens // 2
            batch_clock.await_end(sequence, half)
            batch_clock.abort(sequence)
            return Outcome.ABORTED
        batch_clock.await_end(sequence)
        request.num_produced += sequence.produced_tokens
        if sequence.preempted:
            return None
        request.ended_s = sequence.finished_s or self._clock.now()
        model = self._engine.plan.scenario.engine
        if model is not None and model.overlap_stores:
            self._release(request)
        return Outcome.DONE

    # -- statistics -------------------------------------------------------------------

    def _release(self, request: RequestProgress) -> None:
        """Allow the session's next request to begin."""
        if not request.released:
            request.released = True
            self._engine.pacer.done(request.paced)

    def _record(self, request: RequestProgress, outcome: Outcome) -> None:
        paced, hit, engine = request.paced, request.hit, self._engine.plan.engine
        chunk_size = self._engine.chunk_size
        ended_s = request.ended_s or self._clock.now()
        if outcome is Outcome.DONE:
            request.durations["request"] = ended_s - paced.due_s
        tally = Tally(
            requests=1,
            aborted=int(outcome is Outcome.ABORTED),
            preemptions=request.preemptions,
            tokens=len(request.tokens) if hit else 0,
            tokens_hit=hit.num_tokens if hit else 0,
            tokens_from_tiers=hit.num_from_tiers * chunk_size if hit else 0,
            chunks=len(request.hashes),
            chunks_hit=hit.num_chunks if hit else 0,
        )
        heads = [chunk_hash[:HEAD_BYTES] for chunk_hash in request.hashes]
        warm_up = paced.warm_up
        statistics = self._engine.statistics
        statistics.add(tally, request.durations, heads, warm_up=warm_up)
        statistics.add_entry(
            RequestEntry(
                due_s=paced.due_s,
                begun_s=paced.begun_s,
                ended_s=ended_s,
                lag_s=paced.lag_s,
                ttft_s=request.ttft_s,
                tokens=tally.tokens,
                tokens_hit=tally.tokens_hit,
                session=zlib.crc32(f"{engine} {paced.access.session}".encode()),
                engine=engine,
                step=paced.step,
                preemptions=request.preemptions,
                outcome=outcome,
                warm_up=warm_up,
            )
        )
