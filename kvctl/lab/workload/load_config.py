"""When requests begin: the loads that a scenario's `[load]` declares."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvcore.options import Options, require

Rate = Annotated[float, Meta(gt=0, description="requests a second, of all engines")]
Seconds = Annotated[float, Meta(gt=0)]
Slots = Annotated[
    int,
    Meta(ge=1, le=256, description="requests under way at most, per engine"),
]


class Warmable(Options, frozen=True):
    """What every load has."""

    max_s: Annotated[
        Seconds | None, Meta(description="begin no request after so long")
    ] = None
    warmup_requests: Annotated[
        int, Meta(ge=0, description="played first, told apart from the measurement")
    ] = 0
    warmup_s: Annotated[
        float, Meta(ge=0, description="likewise, by time since the start")
    ] = 0.0


class ClosedLoop(Warmable, frozen=True, tag="closed", tag_field="kind"):
    """Each engine keeps so many requests under way."""

    concurrency: Slots = 4


class TraceTimes(Warmable, frozen=True, tag="trace", tag_field="kind"):
    """Requests are due when the trace says; equal times are spread to the next."""

    speed: Annotated[float, Meta(gt=0, description="2 halves all pauses")] = 1.0
    concurrency: Slots = 32


class Constant(Warmable, frozen=True, tag="constant", tag_field="kind"):
    """Requests are due at even distances."""

    rate: Rate = 10.0
    concurrency: Slots = 32


class Poisson(Warmable, frozen=True, tag="poisson", tag_field="kind"):
    """Requests are due at random, independent of each other."""

    rate: Rate = 10.0
    concurrency: Slots = 32


class Bursts(Warmable, frozen=True, tag="bursts", tag_field="kind"):
    """A Poisson load that rises to another rate for a while, again and again."""

    rate: Rate = 10.0
    burst_rate: Rate = 100.0
    burst_s: Seconds = 1.0
    every_s: Annotated[Seconds, Meta(description="from burst to burst")] = 10.0
    concurrency: Slots = 32

    def check(self) -> None:
        """A burst ends before the next one."""
        require(
            self.burst_s < self.every_s,
            "load.burst_s",
            self.burst_s,
            f"less than load.every_s, {self.every_s}",
        )


class Sweep(Warmable, frozen=True, tag="sweep", tag_field="kind"):
    """A Poisson load in steps, each faster, until the system no longer keeps up.

    It does not keep up with a step when fewer than `kept_up` of the step's requests
    ended by the end of the step and a grace of a tenth of it.
    """

    rate: Annotated[Rate, Meta(description="of the first step")] = 10.0
    factor: Annotated[float, Meta(gt=1, description="from step to step")] = 1.5
    step_s: Seconds = 5.0
    max_steps: Annotated[int, Meta(ge=1, le=100)] = 12
    kept_up: Annotated[float, Meta(gt=0, le=1)] = 0.9
    concurrency: Slots = 32


Load = ClosedLoop | TraceTimes | Constant | Poisson | Bursts | Sweep
OpenLoop = TraceTimes | Constant | Poisson | Bursts | Sweep
