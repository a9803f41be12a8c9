"""How near calls came to what the machine can do."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kvctl.lab.rank.isolated_calls import IsolatedTimings
from kvctl.lab.report.result_tables import list_ceiling_shares
from kvctl.lab.results.result import Result
from kvctl.lab.results.result_builder import summarise
from tests.lab.results.test_summary import engine, evidence

ALONE = IsolatedTimings(
    copy_bytes=10**6,
    plain_copy_gb_per_s=10.0,
    store_gb_per_s=2.0,
    retrieve_gb_per_s=1.0,
    store=0.2,
    retrieve=0.1,
    lookup_tokens=2048,
    lookup_s=0.0004,
    lookup=0.5,
    ping_trip_s=0.0001,
)


def shares(result: Result) -> dict[str, float]:
    """What was reached, by call."""
    return {one.name: one.share for one in list_ceiling_shares(result)}


def test_a_copy_is_held_against_a_copy_and_a_round_trip() -> None:
    """1 MB in 0.5 ms, where a plain copy takes 0.1 ms and a bare trip as long: 40 %."""
    found = shares(replace(summarise(evidence(engine(b"a"))), alone=ALONE))
    assert found["store, alone"] == pytest.approx(0.4)
    assert found["retrieve, alone"] == pytest.approx(0.2)
    assert found["lookup, alone"] == pytest.approx(0.5)


def test_under_load_copies_are_held_against_copies_beside_them() -> None:
    """2 GB/s of 10; what was not measured is left out."""
    found = shares(summarise(evidence(engine(b"a"))))
    assert found["store, under load"] == pytest.approx(0.2)
    assert found.keys() == {"store, under load", "lookup, under load"}
