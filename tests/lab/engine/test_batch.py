"""The engine's time model: steps, chunked prefill, limits, preemption."""

from __future__ import annotations

import pytest

from kvctl.lab.engine.batch_clock import BatchClock
from kvctl.lab.engine.continuous_batch import (
    BatchEvents,
    ContinuousBatch,
    Event,
    Sequence,
)
from kvctl.lab.scenario import EngineModel
from tests.lab.fake_clock import FakeClock

MODEL = EngineModel(
    prefill_tokens_per_s=1000,
    decode_s=0.001,
    step_s=0.01,
    max_batch=2,
    max_batched_tokens=100,
)


def run(batch: ContinuousBatch) -> list[BatchEvents]:
    """Let all steps pass."""
    happened = batch.advance(0.0)
    while (next_s := batch.next_s) is not None:
        happened += batch.advance(next_s)
    return happened


def at(happened: list[BatchEvents], sequence: Sequence, event: Event) -> float:
    """When something happened."""
    return next(h.at_s for h in happened if (h.sequence, h.event) == (sequence, event))


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    """250 tokens take steps of 100, 100 and 50, each with its fixed time."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), Sequence(250, 0, 3)
    batch.add(one)
    happened = run(batch)
    first = 3 * 0.01 + 0.25
    assert at(happened, one, Event.FIRST_TOKEN) == pytest.approx(first)
    assert at(happened, one, Event.FINISHED) == pytest.approx(first + 2 * 0.011)


def test_what_was_loaded_is_not_computed() -> None:
    """Only the remaining prefill costs time."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), Sequence(250, 200, 1)
    batch.add(one)
    assert at(run(batch), one, Event.FIRST_TOKEN) == pytest.approx(0.01 + 0.05)


def test_the_batch_is_limited() -> None:
    """The third request begins when one of the two is finished."""
    batch = ContinuousBatch(MODEL, 1000, 16)
    sequences = [Sequence(10, 0, 2) for _ in range(3)]
    for one in sequences:
        batch.add(one)
    happened = run(batch)
    ends = [at(happened, one, Event.FINISHED) for one in sequences]
    assert at(happened, sequences[2], Event.FIRST_TOKEN) > ends[0]


def test_the_youngest_gives_its_blocks_up() -> None:
    """Where answers outgrow the blocks, it is preempted and the older one goes on."""
    batch = ContinuousBatch(MODEL, 4, 16)
    old, young = Sequence(32, 0, 20), Sequence(32, 0, 20)
    batch.add(old)
    batch.add(young)
    happened = run(batch)
    assert [h.event for h in happened if h.sequence is young][-1] is Event.PREEMPTED
    assert [h.event for h in happened if h.sequence is old][-1] is Event.FINISHED
    assert batch.num_preempted == 1


def test_an_aborted_request_leaves_no_trace() -> None:
    """It is removed from the queue, the batch and the step under way."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), Sequence(50, 0, 5)
    batch.add(one)
    batch.advance(0.0)
    batch.remove(one)
    assert run(batch) == []
    assert len(batch) == 0


def test_steps_that_nobody_watched_have_passed() -> None:
    """A late look finds the events at their own times."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), Sequence(50, 0, 3)
    batch.add(one)
    batch.advance(0.0)
    happened = batch.advance(100.0)
    assert at(happened, one, Event.FINISHED) == pytest.approx(0.06 + 2 * 0.011)


def test_the_stepper_waits_as_long_as_the_model_says() -> None:
    """First token and end come at the model's times."""
    clock = FakeClock()
    stepper = BatchClock(ContinuousBatch(MODEL, 1000, 16), clock)
    progress = stepper.submit(Sequence(50, 0, 3))
    stepper.await_first_token(progress)
    assert clock.time == progress.first_token_s == pytest.approx(0.06)
    stepper.await_end(progress)
    assert clock.time == progress.finished_s == pytest.approx(0.06 + 2 * 0.011)
