"""A load test in Python: how the size of L1 changes the hit rate of chats."""

from __future__ import annotations

from kvctl.lab.config.scenario import find_scenario, read
from kvctl.lab.runner import run


def main() -> None:
    """Run one scenario with two sizes of L1; every byte is verified."""
    path = find_scenario("regress")
    for size in ("16MiB", "64MiB"):
        overrides = (
            "workload.num_sessions=6",
            "workload.turns=4",
            f"server.l1.size={size}",
        )
        result = run("load-test", read(path, overrides), seed=0, address=None)
        rates, lookup = result.hit_rates, result.operations["lookup"]
        print(
            f"L1 of {size}: {rates.by_token:.1%} of tokens hit, "
            f"lookup p50 {1e6 * lookup.p50_s:.0f} us, "
            f"{result.counts.bytes_wrong} wrong bytes"
        )
        if result.problems:
            raise SystemExit("; ".join(result.problems))


if __name__ == "__main__":
    main()
