"""Hypothesis profiles of every test: `quick` by default, `full`, `search`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Timings never decide a test: a busy machine only takes longer. `quick` and `full` run
# the same examples each time: new ones are found by `search`, not by a gate.
settings.register_profile(
    "full",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("quick", settings.get_profile("full"), max_examples=6)
settings.register_profile(
    "search",
    settings.get_profile("full"),
    derandomize=False,
    max_examples=1000,
    print_blob=True,
)
settings.load_profile("quick")
