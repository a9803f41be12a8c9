"""The engine's time model: steps, chunked prefill, limits, preemption."""

from __future__ import annotations

import pytest

from kvctl.lab.config.scenario import EngineModel
from kvctl.lab.engine.continuous_batch import (
    BatchClock,
    BatchEvent,
    BatchSequence,
    ContinuousBatch,
    TimedEvent,
)
from tests.lab.fake_clock import FakeClock

MODEL = EngineModel(
    prefill_tokens_per_s=1000,
    decode_s=0.001,
    step_s=0.01,
    max_batch=2,
    max_batched_tokens=100,
)


def run(batch: ContinuousBatch) -> list[TimedEvent]:
    """Complete all steps; return their events."""
    events = batch.advance(0.0)
    while (next_s := batch.next_s) is not None:
        events += batch.advance(next_s)
    return events


def at(events: list[TimedEvent], sequence: BatchSequence, event: BatchEvent) -> float:
    """Return the time of an event."""
    return next(h.at_s for h in events if (h.sequence, h.event) == (sequence, event))


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    """250 tokens take steps of 100, 100 and 50 tokens, each with the fixed time."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), BatchSequence(250, 0, 3)
    batch.add(one)
    events = run(batch)
    first = 3 * 0.01 + 0.25
    assert at(events, one, BatchEvent.FIRST_TOKEN) == pytest.approx(first)
    assert at(events, one, BatchEvent.FINISHED) == pytest.approx(first + 2 * 0.011)


def test_retrieved_tokens_are_not_computed() -> None:
    """Only the remaining prefill takes time."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), BatchSequence(250, 200, 1)
    batch.add(one)
    assert at(run(batch), one, BatchEvent.FIRST_TOKEN) == pytest.approx(0.01 + 0.05)


def test_the_batch_is_limited() -> None:
    """The third request begins after one of the first two has finished."""
    batch = ContinuousBatch(MODEL, 1000, 16)
    sequences = [BatchSequence(10, 0, 2) for _ in range(3)]
    for one in sequences:
        batch.add(one)
    events = run(batch)
    ends = [at(events, one, BatchEvent.FINISHED) for one in sequences]
    assert at(events, sequences[2], BatchEvent.FIRST_TOKEN) > ends[0]


def test_the_youngest_request_is_preempted() -> None:
    """When outputs need more blocks than exist, the older request continues."""
    batch = ContinuousBatch(MODEL, 4, 16)
    old, young = BatchSequence(32, 0, 20), BatchSequence(32, 0, 20)
    batch.add(old)
    batch.add(young)
    events = run(batch)
    assert [h.event for h in events if h.sequence is young][-1] is BatchEvent.PREEMPTED
    assert [h.event for h in events if h.sequence is old][-1] is BatchEvent.FINISHED
    assert batch.num_preempted == 1


def test_an_aborted_request_leaves_no_trace() -> None:
    """It is removed from the queue, the batch and the current step."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), BatchSequence(50, 0, 5)
    batch.add(one)
    batch.advance(0.0)
    batch.remove(one)
    assert run(batch) == []
    assert len(batch) == 0


def test_a_late_call_returns_events_at_their_own_times() -> None:
    """`advance` completes all steps that have ended since."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), BatchSequence(50, 0, 3)
    batch.add(one)
    batch.advance(0.0)
    events = batch.advance(100.0)
    assert at(events, one, BatchEvent.FINISHED) == pytest.approx(0.06 + 2 * 0.011)


def test_the_batch_clock_waits_for_the_models_times() -> None:
    """First token and end are at the model's times."""
    clock = FakeClock()
    batch_clock = BatchClock(ContinuousBatch(MODEL, 1000, 16), clock)
    progress = batch_clock.submit(BatchSequence(50, 0, 3))
    batch_clock.await_first_token(progress)
    assert clock.time == progress.first_token_s == pytest.approx(0.06)
    batch_clock.await_end(progress)
    assert clock.time == progress.finished_s == pytest.approx(0.06 + 2 * 0.011)
