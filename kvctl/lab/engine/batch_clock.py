"""Runs an engine's time model against the clock, for the slots that wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from kvctl.lab.engine.continuous_batch import (
    BatchEvents,
    ContinuousBatch,
    Event,
    Sequence,
)
from kvctl.lab.engine.request_pacer import Clock


@dataclass(slots=True, eq=False)
class BatchProgress:
    """How far a request is in the engine."""

    sequence: Sequence
    first_token_s: float | None = None
    finished_s: float | None = None
    preempted: bool = False


class BatchClock:
    """A batch whose steps take real time. Any thread may submit and wait.

    There is no thread of its own: one of those that wait lets the steps pass, as the
    leader among the slots of a pacer does.
    """

    def __init__(self, batch: ContinuousBatch, clock: Clock | None = None) -> None:
        self._batch = batch
        self._clock = clock or Clock()
        self._changed = threading.Condition()
        self._progress: dict[Sequence, BatchProgress] = {}
        self._led = False
        self._stopped = False

    def submit(self, sequence: Sequence) -> BatchProgress:
        """Queue a request in the engine."""
        with self._changed:
            # Steps that ended by now began without it.
            self._advance()
            progress = self._progress[sequence] = BatchProgress(sequence)
            self._batch.add(sequence)
            self._advance()
            self._changed.notify_all()
            return progress

    def await_first_token(self, progress: BatchProgress) -> None:
        """Wait for the first token, a preemption, or the end of all."""
        self._await(progress, lambda: progress.first_token_s is not None)

    def await_end(self, progress: BatchProgress, max_tokens: int | None = None) -> None:
        """Wait until a request is finished or preempted; or has so many tokens."""

        def ended() -> bool:
            produced = progress.sequence.produced_tokens
            enough = max_tokens is not None and produced >= max_tokens
            return progress.finished_s is not None or enough

        self._await(progress, ended)

    def abort(self, progress: BatchProgress) -> None:
        """Forget a request: nobody waits for its answer any more."""
        with self._changed:
            self._progress.pop(progress.sequence, None)
            self._batch.remove(progress.sequence)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _await(self, progress: BatchProgress, ended: Callable[[], bool]) -> None:
        with self._changed:
            while not (ended() or progress.preempted or self._stopped):
                lead = not self._led
                self._led = True
                try:
                    self._clock.wait(self._changed, self._timeout_s() if lead else None)
                finally:
                    if lead:
                        self._led = False
                self._advance()
            self._changed.notify()

    def _timeout_s(self) -> float | None:
        next_s = self._batch.next_s
        return None if next_s is None else max(0.0, next_s - self._clock.now())

    def _advance(self) -> None:
        happened = self._batch.advance(self._clock.now())
        for one in happened:
            self._note(one)
        if happened:
            self._changed.notify_all()

    def _note(self, happened: BatchEvents) -> None:
        progress = self._progress.get(happened.sequence)
        if progress is None:
            return
        match happened.event:
            case Event.FIRST_TOKEN:
                progress.first_token_s = happened.at_s
            case Event.FINISHED:
                progress.finished_s = happened.at_s
                del self._progress[happened.sequence]
            case Event.PREEMPTED:
                progress.preempted = True
                del self._progress[happened.sequence]
