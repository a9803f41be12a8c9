"""Arrival of requests, as declared in a scenario's `[load]`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvcore.option_structs import Options, require

Rate = Annotated[
    float, Meta(gt=0, description="requests per second, of all engines together")
]
Seconds = Annotated[float, Meta(gt=0)]
Slots = Annotated[
    int, Meta(ge=1, le=256, description="concurrent requests per engine at most")
]


class LoadOptions(Options, frozen=True):
    """Options of every kind of load: duration and warm-up."""

    max_s: Annotated[
        Seconds | None, Meta(description="no request begins later than this")
    ] = None
    warmup_requests: Annotated[
        int, Meta(ge=0, description="first requests, excluded from the measurement")
    ] = 0
    warmup_s: Annotated[
        float, Meta(ge=0, description="requests before this time are excluded")
    ] = 0.0


class ClosedLoop(LoadOptions, frozen=True, tag="closed", tag_field="kind"):
    """Each engine keeps `concurrency` requests in progress."""

    concurrency: Slots = 4


class TraceTimes(LoadOptions, frozen=True, tag="trace", tag_field="kind"):
    """Arrival times of the trace; equal ones are spread up to the next time."""

    speed: Annotated[float, Meta(gt=0, description="2 halves all gaps")] = 1.0
    concurrency: Slots = 32


class Constant(LoadOptions, frozen=True, tag="constant", tag_field="kind"):
    """Arrivals at a constant rate, evenly spaced."""

    rate: Rate = 10.0
    concurrency: Slots = 32


class Poisson(LoadOptions, frozen=True, tag="poisson", tag_field="kind"):
    """Arrivals as a Poisson process."""

    rate: Rate = 10.0
    concurrency: Slots = 32


class Bursts(LoadOptions, frozen=True, tag="bursts", tag_field="kind"):
    """A Poisson process with periodic bursts of another rate."""

    rate: Rate = 10.0
    burst_rate: Rate = 100.0
    burst_s: Seconds = 1.0
    every_s: Annotated[Seconds, Meta(description="period of the bursts")] = 10.0
    concurrency: Slots = 32

    def check(self) -> None:
        """Raise `SetupError` unless a burst ends before the next one begins."""
        require(
            self.burst_s < self.every_s,
            "load.burst_s",
            self.burst_s,
            f"less than load.every_s, {self.every_s}",
        )


class Sweep(LoadOptions, frozen=True, tag="sweep", tag_field="kind"):
    """A Poisson process whose rate rises in steps until the system is saturated.

    It is saturated when less than `kept_up` of a step's requests end before the step
    does, plus a grace period of a tenth of the step.
    """

    rate: Annotated[Rate, Meta(description="of the first step")] = 10.0
    factor: Annotated[
        float, Meta(gt=1, description="rate of a step relative to the one before")
    ] = 1.5
    step_s: Seconds = 5.0
    max_steps: Annotated[int, Meta(ge=1, le=100)] = 12
    kept_up: Annotated[float, Meta(gt=0, le=1)] = 0.9
    concurrency: Slots = 32


RateLoad = Constant | Poisson | Bursts | Sweep
Load = ClosedLoop | TraceTimes | RateLoad
