"""Settings of every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Timings never decide a test: a busy machine only takes longer.
settings.register_profile(
    "gate",
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gate")
