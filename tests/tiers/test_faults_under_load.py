"""A real Valkey stands still, dies and restarts beneath a server under load."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvctl.lab import runner as driver
from kvctl.lab.config.scenario import read

SCENARIO = Path(__file__).parents[2] / "scenarios" / "tier_faults.toml"
SHORTER = (
    "workload.num_requests=400",
    'faults=[{at_s=2, target="service", service="store", action="stop", for_s=1.5},'
    ' {at_s=6, target="service", service="store", action="kill", for_s=0.5}]',
)


@pytest.mark.tiers
@pytest.mark.timeout(90)
def test_a_tier_that_fails_costs_hits_and_nothing_else() -> None:
    """Both faults are noticed, and the tier is asked again; no request fails."""
    result = driver.run("tier_faults", read(SCENARIO, SHORTER), 0, None)
    assert result.problems == ()
    counts = result.counts
    assert (counts.errors, counts.bytes_wrong, counts.leases_leaked) == (0, 0, 0)
    assert counts.tokens_from_tiers > 0
    assert result.load is not None
    for fault in result.load.faults:
        assert fault.requests_failed == 0
        assert fault.noticed_s is not None
        assert fault.recovered_s is not None
        assert fault.noticed_s < fault.recovered_s
