"""The queue of a played engine."""

from __future__ import annotations

import threading

import pytest

from kvctl.lab.messages import EnginePlan, Tally
from kvctl.lab.scenario import Chat, ModelConfig, Scenario
from kvctl.lab.scheduler import Queue, Score
from kvctl.lab.workload import Access


def queue(engine: int = 0, engines: int = 1, turns: int = 2) -> Queue:
    """A queue of three talks."""
    workload = Chat(num_sessions=3, turns=turns)
    scenario = Scenario(ModelConfig("tiny-llama"), workload, engines=engines)
    return Queue(EnginePlan("", engine, "e", "m", 0, scenario))


def drain(source: Queue) -> list[str]:
    """Take everything, one after another."""
    taken = []
    while (access := source.take()) is not None:
        taken.append(access.request_id)
        source.done(access)
    return taken


def test_engines_share_a_workload_without_overlap() -> None:
    """Two engines take every access once, sessions whole."""
    ours, theirs = drain(queue(0, 2)), drain(queue(1, 2))
    assert sorted(ours + theirs) == sorted(drain(queue()))
    sessions = [{name.partition(".")[0] for name in share} for share in (ours, theirs)]
    assert not sessions[0] & sessions[1]


def test_a_session_has_one_request_under_way() -> None:
    """The next turn waits until the one before it has ended."""
    source = queue()
    first = [source.take() for _ in range(3)]
    taken: list[Access | None] = []
    waiter = threading.Thread(target=lambda: taken.append(source.take()))
    waiter.start()
    assert first[0] is not None
    source.done(first[0])
    waiter.join(10)
    assert taken[0] is not None
    assert taken[0].request_id == "0.1"


def test_a_stopped_queue_wakes_who_waits() -> None:
    """After a stop nobody gets anything, not even who waited for a session."""
    source = queue()
    for _ in range(3):
        source.take()
    taken: list[Access | None] = []
    waiter = threading.Thread(target=lambda: taken.append(source.take()))
    waiter.start()
    source.stop()
    waiter.join(10)
    assert taken == [None]
    assert source.take() is None


def test_the_score_adds_up() -> None:
    """Counts add, errors count one each, a chunk asked for twice is one."""
    score = Score()
    score.add(Tally(requests=1, chunks=2), {"lookup": 0.5}, [b"a" * 8, b"b" * 8])
    score.add(Tally(requests=1, chunks=1), {"lookup": 0.25}, [b"a" * 8], ["lost"])
    report = score.report()
    assert (report.tally.requests, report.tally.chunks, report.tally.errors) == (
        2,
        3,
        1,
    )
    assert len(report.chunk_heads) == 16
    assert report.errors == ("lost",)
    assert report.samples.summary()["lookup"].count == 2


@pytest.mark.parametrize("count", [9, 15])
def test_only_the_first_errors_are_told(count: int) -> None:
    """All are counted, ten are told."""
    score = Score()
    for number in range(count):
        score.add(Tally(), {}, errors=[str(number)])
    assert score.tally().errors == count
    assert len(score.report().errors) == min(count, 10)
