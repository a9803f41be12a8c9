"""Fault injection: its schedule, and the effects in a request log."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from kvctl.lab.config.scenario import Fault
from kvctl.lab.engine.engine_statistics import RECORD, Outcome, Records
from kvctl.lab.run.fault_injection import (
    FaultInjector,
    FaultNotice,
    InjectedFault,
    describe,
)
from tests.lab.fake_clock import FakeClock


class RecordingTarget:
    """Records the calls of its methods."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def send_signal(self, number: signal.Signals) -> FaultNotice | None:
        """Record the call; the server notices a SIGKILL 0.1 s later."""
        self.calls.append(number.name)
        return FaultNotice(noticed_s=2.1) if number == signal.SIGKILL else None

    def start_again(self) -> None:
        """Record the call."""
        self.calls.append("start_again")


@pytest.mark.parametrize(
    ("action", "calls"),
    [
        ("kill", ["SIGKILL", "start_again"]),
        ("stop", ["SIGSTOP", "SIGCONT"]),
        ("restart", ["SIGTERM", "start_again"]),
    ],
)
def test_a_fault_is_injected_and_ended_on_time(action: str, calls: list[str]) -> None:
    """Not before; the fault is active until the process is back."""
    clock, target = FakeClock(), RecordingTarget()
    injector = FaultInjector(0.0, lambda _: target, clock.now)
    injector.schedule(Fault(at_s=2.0, action=action, for_s=0.5))  # type: ignore[arg-type]
    injector.inject_due()
    assert (target.calls, injector.num_active, injector.next_s) == ([], 0, 2.0)
    clock.time = 2.0
    injector.inject_due()
    assert (target.calls, injector.num_active, injector.next_s) == (calls[:1], 1, 2.5)
    clock.time = 2.5
    injector.inject_due()
    assert target.calls[: len(calls)] == calls
    assert (injector.num_active, injector.next_s) == (0, None)
    noticed = injector.injected[0].notice.noticed_s
    assert noticed == (2.1 if action == "kill" else None)


def request_log(*entries: tuple[float, float, Outcome, int]) -> Records:
    """Return records with these times of begin and end, outcomes and engines."""
    records = np.zeros(len(entries), RECORD)
    for record, (begun, ended, outcome, engine) in zip(records, entries, strict=True):
        record["due_s"] = record["begun_s"] = begun
        record["ended_s"], record["outcome"] = ended, outcome
        record["engine"] = engine
        record["tokens"], record["tokens_hit"] = 100, 80 if begun < 10 else 20
    return records


def test_effects_of_a_fault_on_requests() -> None:
    """Noticed by the first failure; recovered by a request that began after it."""
    done, failed = Outcome.DONE, Outcome.FAILED
    records = request_log(
        (1.0, 1.1, done, 0),
        (9.95, 10.3, failed, 0),
        (9.99, 11.2, done, 1),
        (10.2, 11.3, failed, 1),
        (11.1, 11.4, done, 0),
        (12.0, 12.1, done, 0),
    )
    report = describe(InjectedFault(Fault(at_s=10), 10.0, back_s=11.0), 0.0, records)
    assert report.back_s == pytest.approx(1.0)
    assert report.noticed_s == pytest.approx(0.3)
    assert report.recovered_s == pytest.approx(1.4)
    assert (report.requests_failed, report.requests_slowed) == (2, 2)
    assert (report.hit_rate_before, report.hit_rate_during) == (0.8, 0.2)


def test_a_tier_recovers_when_the_server_uses_it_again() -> None:
    """Requests succeed without the tier, and do not show its recovery."""
    records = request_log((1.0, 1.1, Outcome.DONE, 0), (10.5, 10.6, Outcome.DONE, 0))
    fault = Fault(at_s=10, target="service", service="store")
    notice = FaultNotice(noticed_s=10.2, recovered_s=12.5)
    report = describe(InjectedFault(fault, 10.0, 11.0, notice), 0.0, records)
    assert report.noticed_s == pytest.approx(0.2)
    assert report.recovered_s == pytest.approx(2.5)
    assert report.requests_failed == 0
    notice = FaultNotice(noticed_s=10.2)
    assert (
        describe(InjectedFault(fault, 10.0, 11.0, notice), 0.0, records).recovered_s
        is None
    )


def test_a_worker_fault_affects_its_engine_only() -> None:
    """Requests of other engines are not counted."""
    failed = Outcome.FAILED
    records = request_log((9.9, 10.1, failed, 0), (9.9, 10.2, failed, 1))
    fault = Fault(at_s=10, target="worker", engine=1)
    report = describe(InjectedFault(fault, 10.0), 0.0, records)
    assert report.requests_failed == 1
    assert report.recovered_s is None
