"""A time model of an engine's continuous batch: chunked prefill, decode, preemption.

In each step the running requests decode one token each, and the rest of the step's
token budget prefills the requests at the head of the queue. A step takes a fixed time,
plus a time per prefilled token, plus a time per decoding request. `ContinuousBatch` has
no clock; `BatchClock` runs it in real time.

Source: Agrawal et al., Sarathi-Serve, OSDI 2024.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvctl.lab.config.scenario import EngineModel
from kvctl.lab.engine.request_pacer import Clock


@dataclass(slots=True, eq=False)
class BatchSequence:
    """One request in the engine, since its last submission. Times are of the clock."""

    prompt_tokens: int
    computed_tokens: int
    """Prompt tokens whose KV exists, retrieved or computed."""
    output_tokens: int
    """Tokens to produce; the prefill produces the first."""
    produced_tokens: int = 0
    first_token_s: float | None = None
    finished_s: float | None = None
    preempted: bool = False
    """Its blocks were freed: it has to begin again, with its output as prompt."""

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt is computed: the request decodes."""
        return self.computed_tokens >= self.prompt_tokens


@dataclass(slots=True)
class _BatchStep:
    end_s: float
    prefills: dict[BatchSequence, int] = field(default_factory=dict)
    decodes: list[BatchSequence] = field(default_factory=list)


class ContinuousBatch:
    """The queued and running requests of one engine. Not thread-safe."""

    def __init__(self, model: EngineModel, num_blocks: int, block_size: int) -> None:
        self._model = model
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._waiting: deque[BatchSequence] = deque()
        self._running: list[BatchSequence] = []
        self._step: _BatchStep | None = None
        self.num_preempted = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, sequence: BatchSequence) -> None:
        """Queue a request whose found chunks have been retrieved."""
        self._waiting.append(sequence)

    def remove(self, sequence: BatchSequence) -> None:
        """Remove a queued or running request, which was aborted."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        if self._step is not None:
            self._step.prefills.pop(sequence, None)
            if sequence in self._step.decodes:
                self._step.decodes.remove(sequence)

    def advance(self, now_s: float) -> bool:
        """Complete the steps that have ended.

        Return whether a request has its first or its last token, or was preempted.
        Call it after `add` and at `next_s`. Steps follow each other without a gap,
        also if the call is late.
        """
        changed = False
        while self._step is None or self._step.end_s <= now_s:
            begin_s = now_s if self._step is None else self._step.end_s
            if self._step is not None:
                changed |= self._end(self._step)
            changed |= self._preempt()
            self._step = self._begin(begin_s)
            if self._step is None:
                break
        return changed

    @property
    def next_s(self) -> float | None:
        """End of the current step; None without requests."""
        return self._step.end_s if self._step else None

    def _begin(self, now_s: float) -> _BatchStep | None:
        step = _BatchStep(now_s)
        step.decodes = [one for one in self._running if one.prefilled]
        budget = self._model.max_batched_tokens - len(step.decodes)
        for sequence in self._running:
            budget = self._prefill(step, sequence, budget)
        while self._waiting and budget > 0 and self._admits(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            budget = self._prefill(step, sequence, budget)
        if not step.decodes and not step.prefills:
            return None
        step.end_s = now_s + self._duration_s(step)
        return step

    def _prefill(self, step: _BatchStep, sequence: BatchSequence, budget: int) -> int:
        """Schedule a request's missing tokens; return the remaining budget."""
        missing = sequence.prompt_tokens - sequence.computed_tokens
        num_tokens = max(0, min(missing, budget))
        if num_tokens:
            step.prefills[sequence] = num_tokens
        return budget - num_tokens

    def _duration_s(self, step: _BatchStep) -> float:
        model = self._model
        return (
            model.step_s
            + sum(step.prefills.values()) / model.prefill_tokens_per_s
            + len(step.decodes) * model.decode_s
        )

    def _admits(self, sequence: BatchSequence) -> bool:
        """Return whether a request fits; a single one always does."""
        if not self._running:
            return True
        fits = (
            self._used_blocks() + self._blocks(sequence.prompt_tokens)
            <= self._num_blocks
        )
        return fits and len(self._running) < self._model.max_batch

    def _preempt(self) -> bool:
        """Remove the youngest requests until each other one can grow by a token.

        Return whether there was one.
        """
        before = self.num_preempted
        while len(self._running) > 1 and self._used_blocks(1) > self._num_blocks:
            self._running.pop().preempted = True
            self.num_preempted += 1
        return self.num_preempted > before

    def _used_blocks(self, more: int = 0) -> int:
        """Return the blocks of running requests; a prompt's are allocated at once."""
        return sum(
            self._blocks(one.prompt_tokens + one.produced_tokens + more)
            for one in self._running
        )

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _end(self, step: _BatchStep) -> bool:
        producing = list(step.decodes)
        for sequence, num_tokens in step.prefills.items():
            sequence.computed_tokens += num_tokens
            if sequence.prefilled:
                producing.append(sequence)
        changes = [self._produce(one, step.end_s) for one in producing]
        return any(changes)

    def _produce(self, sequence: BatchSequence, now_s: float) -> bool:
        """Add an output token; return whether it is the first or the last."""
        sequence.produced_tokens += 1
        if sequence.produced_tokens == 1:
            sequence.first_token_s = now_s
        if sequence.produced_tokens >= sequence.output_tokens:
            self._running.remove(sequence)
            sequence.finished_s = now_s
        return sequence.produced_tokens == 1 or sequence.finished_s is not None


class BatchClock:
    """Runs a batch in real time. Any thread may submit and wait.

    There is no extra thread: one of the waiting threads, the leader, sleeps until the
    end of the step and advances the batch.
    """

    def __init__(self, batch: ContinuousBatch, clock: Clock | None = None) -> None:
        self._batch = batch
        self._clock = clock or Clock()
        self._changed = threading.Condition()
        self._has_leader = False
        self._stopped = False

    def submit(self, sequence: BatchSequence) -> None:
        """Queue a request."""
        with self._changed:
            # Steps that have ended by now did not include it.
            self._advance()
            self._batch.add(sequence)
            self._advance()
            self._changed.notify_all()

    def await_first_token(self, sequence: BatchSequence) -> None:
        """Wait for the first token, a preemption, or `stop`."""
        self._await(sequence, lambda: sequence.first_token_s is not None)

    def await_end(self, sequence: BatchSequence, max_tokens: int | None = None) -> None:
        """Wait until a request finishes, is preempted, or has `max_tokens` tokens."""

        def ended() -> bool:
            enough = max_tokens is not None and sequence.produced_tokens >= max_tokens
            return sequence.finished_s is not None or enough

        self._await(sequence, ended)

    def abort(self, sequence: BatchSequence) -> None:
        """Remove a request: its output is not needed any more."""
        with self._changed:
            self._batch.remove(sequence)
            self._changed.notify_all()

    def stop(self) -> None:
        """End all waits."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _await(self, sequence: BatchSequence, ended: Callable[[], bool]) -> None:
        with self._changed:
            while not (ended() or sequence.preempted or self._stopped):
                lead = not self._has_leader
                self._has_leader = True
                try:
                    self._clock.wait(self._changed, self._timeout_s() if lead else None)
                finally:
                    if lead:
                        self._has_leader = False
                self._advance()
            self._changed.notify()

    def _timeout_s(self) -> float | None:
        next_s = self._batch.next_s
        return None if next_s is None else max(0.0, next_s - self._clock.now())

    def _advance(self) -> None:
        if self._batch.advance(self._clock.now()):
            self._changed.notify_all()
