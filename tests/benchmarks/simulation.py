"""Block accesses per second of `kvctl bench simulate`, by policy.

    PYTHONPATH=. python tests/benchmarks/simulation.py TRACE...

The traces are read once. Only the policies' work is timed, alternating, with a capacity
of a tenth of the unique blocks. Prints medians and spread of the rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from time import process_time

from kvcore.storage.eviction import POLICIES, make_policy
from kvctl.lab.workload.cache_simulation import (
    NumberedRequests,
    SimulatedL1,
    capacity_blocks,
    load,
)

ROUNDS = 5


def main() -> None:
    """Time every policy on every trace."""
    for path in map(Path, sys.argv[1:]):
        requests = load(path)
        accesses = sum(map(len, requests.blocks))
        rates: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for _ in range(ROUNDS):
            for policy in POLICIES:
                rates[policy].append(accesses / timed(requests, policy))
        print(f"{path.name}: {accesses:,} accesses, thousands a second")
        for policy, found in rates.items():
            low, middle, high = (f(found) / 1e3 for f in (min, median, max))
            print(f"  {policy:10} {middle:8,.0f} [{low:,.0f}..{high:,.0f}]")


def timed(requests: NumberedRequests, policy: str) -> float:
    """Return the policy's CPU seconds, since the machine may be shared."""
    listed = [ids.tolist() for ids in requests.blocks]
    cache = SimulatedL1(
        make_policy(policy), capacity_blocks("10%", requests.num_unique)
    )
    begun = process_time()
    for blocks in listed:
        cache.serve(blocks)
    return process_time() - begun


if __name__ == "__main__":
    main()
