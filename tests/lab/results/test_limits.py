"""How close calls came to the ceilings of the machine."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kvctl.lab.rank.isolated_calls import IsolatedTimings
from kvctl.lab.report.result_tables import list_ceiling_shares
from kvctl.lab.results.result import Result
from kvctl.lab.results.result_builder import summarise
from tests.lab.results.test_summary import engine, measurements

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
    """Return the share of the ceiling by call."""
    return {one.name: one.share for one in list_ceiling_shares(result)}


def test_ceiling_of_a_copy_is_a_copy_and_a_round_trip() -> None:
    """1 MB in 0.5 ms, where a plain copy takes 0.1 ms and a bare trip as long: 40 %."""
    found = shares(replace(summarise(measurements(engine(b"a"))), alone=ALONE))
    assert found["store, alone"] == pytest.approx(0.4)
    assert found["retrieve, alone"] == pytest.approx(0.2)
    assert found["lookup, alone"] == pytest.approx(0.5)


def test_ceiling_under_load_is_a_concurrent_copy() -> None:
    """2 GB/s of 10; calls without a measurement are omitted."""
    found = shares(summarise(measurements(engine(b"a"))))
    assert found["store, under load"] == pytest.approx(0.2)
    assert found.keys() == {"store, under load", "lookup, under load"}
