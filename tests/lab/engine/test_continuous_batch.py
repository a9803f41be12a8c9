"""The engine's time model: steps, chunked prefill, limits, preemption."""

from __future__ import annotations

import pytest

from kvctl.lab.config.scenario import EngineModel
from kvctl.lab.engine.continuous_batch import (
    BatchClock,
    BatchSequence,
    ContinuousBatch,
)
from tests.lab.fake_clock import FakeClock

MODEL = EngineModel(
    prefill_tokens_per_s=1000,
    decode_s=0.001,
    step_s=0.01,
    max_batch=2,
    max_batched_tokens=100,
)


def run(batch: ContinuousBatch) -> bool:
    """Complete all steps; return whether a request changed."""
    changed = batch.advance(0.0)
    while (next_s := batch.next_s) is not None:
        changed |= batch.advance(next_s)
    return changed


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    """250 tokens take steps of 100, 100 and 50 tokens, each with the fixed time."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), BatchSequence(250, 0, 3)
    batch.add(one)
    assert run(batch)
    first = 3 * 0.01 + 0.25
    assert one.first_token_s == pytest.approx(first)
    assert one.finished_s == pytest.approx(first + 2 * 0.011)


def test_retrieved_tokens_are_not_computed() -> None:
    """Only the remaining prefill takes time."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), BatchSequence(250, 200, 1)
    batch.add(one)
    assert run(batch)
    assert one.first_token_s == pytest.approx(0.01 + 0.05)


def test_the_batch_is_limited() -> None:
    """The third request begins after one of the first two has finished."""
    batch = ContinuousBatch(MODEL, 1000, 16)
    sequences = [BatchSequence(10, 0, 2) for _ in range(3)]
    for one in sequences:
        batch.add(one)
    assert run(batch)
    first, _, third = sequences
    assert third.first_token_s is not None
    assert first.finished_s is not None
    assert third.first_token_s > first.finished_s


def test_the_youngest_request_is_preempted() -> None:
    """When outputs need more blocks than exist, the older request continues."""
    batch = ContinuousBatch(MODEL, 4, 16)
    old, young = BatchSequence(32, 0, 20), BatchSequence(32, 0, 20)
    batch.add(old)
    batch.add(young)
    assert run(batch)
    assert young.preempted
    assert young.finished_s is None
    assert not old.preempted
    assert old.finished_s is not None
    assert batch.num_preempted == 1


def test_an_aborted_request_leaves_no_trace() -> None:
    """It is removed from the queue, the batch and the current step."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), BatchSequence(50, 0, 5)
    batch.add(one)
    batch.advance(0.0)
    batch.remove(one)
    assert not run(batch)
    assert one.first_token_s is None
    assert len(batch) == 0


def test_a_late_call_records_the_times_of_the_steps() -> None:
    """`advance` completes all steps that have ended since."""
    batch, one = ContinuousBatch(MODEL, 1000, 16), BatchSequence(50, 0, 3)
    batch.add(one)
    batch.advance(0.0)
    assert batch.advance(100.0)
    assert one.finished_s == pytest.approx(0.06 + 2 * 0.011)


def test_the_batch_clock_waits_for_the_models_times() -> None:
    """First token and end are at the model's times."""
    clock = FakeClock()
    batch_clock = BatchClock(ContinuousBatch(MODEL, 1000, 16), clock)
    one = BatchSequence(50, 0, 3)
    batch_clock.submit(one)
    batch_clock.await_first_token(one)
    assert clock.time == one.first_token_s == pytest.approx(0.06)
    batch_clock.await_end(one)
    assert clock.time == one.finished_s == pytest.approx(0.06 + 2 * 0.011)
