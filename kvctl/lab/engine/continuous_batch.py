"""An engine's continuous batch as a time model: chunked prefill, decode, preemption.

Time is an argument everywhere, so the model runs as fast or as slow as its caller. In
each step the running requests decode one token each, and what is left of the step's
token budget prefills the requests at the head of the queue (Agrawal et al.,
Sarathi-Serve, OSDI 2024). A step takes a fixed time, plus one for the tokens that it
prefills, plus one for each request that it decodes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from kvctl.lab.scenario import EngineModel


class Event(Enum):
    """What a step brought a request."""

    FIRST_TOKEN = "first_token"
    FINISHED = "finished"
    PREEMPTED = "preempted"
    """Its blocks were needed: it has to begin again, with what it has produced."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine. Token counts are of what it still has to do."""

    prompt_tokens: int
    computed_tokens: int
    """Of the prompt: their KV is there, loaded or computed."""
    output_tokens: int
    """To produce, the first one with the prefill."""
    produced_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV takes room."""
        return self.computed_tokens + self.produced_tokens

    @property
    def prefilled(self) -> bool:
        """The prompt is done: the request decodes."""
        return self.computed_tokens >= self.prompt_tokens


@dataclass(frozen=True, slots=True)
class BatchEvents:
    """An event of one request, when its step ended."""

    sequence: Sequence
    event: Event
    at_s: float


@dataclass(slots=True)
class _BatchStep:
    end_s: float
    prefills: dict[Sequence, int] = field(default_factory=dict)
    decodes: list[Sequence] = field(default_factory=list)


class ContinuousBatch:
    """The requests of one engine. Not safe for several threads."""

    def __init__(self, model: EngineModel, num_blocks: int, block_size: int) -> None:
        self._model = model
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._step: _BatchStep | None = None
        self.num_preempted = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a request whose prompt has been loaded as far as it was found."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a request, wherever it is: it was aborted."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        if self._step is not None:
            self._step.prefills.pop(sequence, None)
            if sequence in self._step.decodes:
                self._step.decodes.remove(sequence)

    def advance(self, now_s: float) -> list[BatchEvents]:
        """End the step whose time has come and begin the next; say what happened.

        Call it when something was added and at `next_s`. Steps that ended long ago
        follow one another without a pause, as they would have.
        """
        happened: list[BatchEvents] = []
        while self._step is None or self._step.end_s <= now_s:
            begin_s = now_s if self._step is None else self._step.end_s
            if self._step is not None:
                happened += self._end(self._step)
            self._step = self._begin(begin_s, happened)
            if self._step is None:
                break
        return happened

    @property
    def next_s(self) -> float | None:
        """When the step under way ends; None when there is nothing to do."""
        return self._step.end_s if self._step else None

    def _begin(self, now_s: float, happened: list[BatchEvents]) -> _BatchStep | None:
        step = _BatchStep(now_s)
        self._preempt(now_s, happened)
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
        step.end_s = now_s + self._seconds(step)
        return step

    def _prefill(self, step: _BatchStep, sequence: Sequence, budget: int) -> int:
        """Give a request its part of the budget; return what is left.

        At least the prompt's last token is computed: it brings the first answer.
        """
        missing = sequence.prompt_tokens - sequence.computed_tokens
        given = max(0, min(missing, budget))
        if given:
            step.prefills[sequence] = given
        return budget - given

    def _seconds(self, step: _BatchStep) -> float:
        model = self._model
        return (
            model.step_s
            + sum(step.prefills.values()) / model.prefill_tokens_per_s
            + len(step.decodes) * model.decode_s
        )

    def _admits(self, sequence: Sequence) -> bool:
        """Say whether a request fits; one alone always does."""
        if not self._running:
            return True
        fits = self._used() + self._blocks(sequence.prompt_tokens) <= self._num_blocks
        return fits and len(self._running) < self._model.max_batch

    def _preempt(self, now_s: float, happened: list[BatchEvents]) -> None:
        """Take the youngest requests out until one more token fits for each."""
        while len(self._running) > 1 and self._used(1) > self._num_blocks:
            youngest = self._running.pop()
            self.num_preempted += 1
            happened.append(BatchEvents(youngest, Event.PREEMPTED, now_s))

    def _used(self, more: int = 0) -> int:
        """Count the blocks of the running; a prompt's are all taken at once."""
        return sum(
            self._blocks(one.prompt_tokens + one.produced_tokens + more)
            for one in self._running
        )

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _end(self, step: _BatchStep) -> list[BatchEvents]:
        happened: list[BatchEvents] = []
        for sequence, num_tokens in step.prefills.items():
            sequence.computed_tokens += num_tokens
            if sequence.prefilled:
                happened += self._produce(sequence, step.end_s)
        for sequence in step.decodes:
            happened += self._produce(sequence, step.end_s)
        return happened

    def _produce(self, sequence: Sequence, now_s: float) -> list[BatchEvents]:
        """Add a token of the answer."""
        sequence.produced_tokens += 1
        events = []
        if sequence.produced_tokens == 1:
            events.append(BatchEvents(sequence, Event.FIRST_TOKEN, now_s))
        if sequence.produced_tokens >= sequence.output_tokens:
            self._running.remove(sequence)
            events.append(BatchEvents(sequence, Event.FINISHED, now_s))
        return events
