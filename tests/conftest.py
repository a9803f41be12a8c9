"""Settings of every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Timings never decide a test: a busy machine only takes longer.
settings.register_profile(
    "gate",
    deadline=None,
    # The same examples each time: a gate is not where new ones should be found.
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search",
    settings.get_profile("gate"),
    derandomize=False,
    max_examples=1000,
    print_blob=True,
)
settings.load_profile("gate")
