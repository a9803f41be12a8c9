"""Faults: when they happen, and what a journal tells of them."""

from __future__ import annotations

import numpy as np
import pytest

from kvctl.lab.faults import FaultPlan, Struck, describe
from kvctl.lab.journal import RECORD, Outcome, Records
from kvctl.lab.scenario import Fault
from tests.lab.clock import FakeClock


class Victim:
    """Takes note of what it is told to do."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def kill(self) -> float | None:
        """Die."""
        self.told.append("kill")
        return None

    def end(self) -> float | None:
        """End."""
        self.told.append("end")
        return None

    def freeze(self) -> None:
        """Stand still."""
        self.told.append("freeze")

    def thaw(self) -> None:
        """Go on."""
        self.told.append("thaw")

    def begin(self) -> None:
        """Come back."""
        self.told.append("begin")


@pytest.mark.parametrize(
    ("action", "told"),
    [("kill", ["kill", "begin"]), ("stop", ["freeze", "thaw"]), ("restart", ["end"])],
)
def test_a_fault_strikes_and_ends_at_its_time(action: str, told: list[str]) -> None:
    """Nothing happens before; what was struck is away until it is back."""
    clock, victim = FakeClock(), Victim()
    plan = FaultPlan(0.0, lambda _: victim, clock.now)
    plan.add(Fault(at_s=2.0, action=action, for_s=0.5))  # type: ignore[arg-type]
    plan.play()
    assert (victim.told, plan.away, plan.next_s) == ([], 0, 2.0)
    clock.time = 2.0
    plan.play()
    assert (victim.told, plan.away, plan.next_s) == (told[:1], 1, 2.5)
    clock.time = 2.5
    plan.play()
    assert victim.told[: len(told)] == told
    assert (plan.away, plan.next_s) == (0, None)


def journal(*entries: tuple[float, float, Outcome, int]) -> Records:
    """Requests that begin and end at these times, on these engines."""
    records = np.zeros(len(entries), RECORD)
    for record, (begun, ended, outcome, engine) in zip(records, entries, strict=True):
        record["due_s"] = record["begun_s"] = begun
        record["ended_s"], record["outcome"] = ended, outcome
        record["engine"] = engine
    return records


def test_a_journal_tells_what_a_fault_did() -> None:
    """Noticed by the first failure, over with the first that began after it."""
    done, failed = Outcome.DONE, Outcome.FAILED
    records = journal(
        (1.0, 1.1, done, 0),
        (9.95, 10.3, failed, 0),
        (9.99, 11.2, done, 1),
        (10.2, 11.3, failed, 1),
        (11.1, 11.4, done, 0),
        (12.0, 12.1, done, 0),
    )
    report = describe(Struck(Fault(at_s=10), 10.0, back_s=11.0), 0.0, records)
    assert report.back_s == pytest.approx(1.0)
    assert report.noticed_s == pytest.approx(0.3)
    assert report.recovered_s == pytest.approx(1.4)
    assert (report.requests_failed, report.requests_slowed) == (2, 2)


def test_a_workers_fault_is_told_of_its_engine() -> None:
    """Others' requests are not counted."""
    failed = Outcome.FAILED
    records = journal((9.9, 10.1, failed, 0), (9.9, 10.2, failed, 1))
    fault = Fault(at_s=10, target="worker", engine=1)
    report = describe(Struck(fault, 10.0), 0.0, records)
    assert report.requests_failed == 1
    assert report.recovered_s is None
