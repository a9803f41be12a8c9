"""Detection rate of known slowdowns in recorded noise, and the false-alarm rate.

`noise.json` holds pairs of runs of two equal systems on a busy machine. A trial draws
pairs of it, swaps sides at random, makes one operation slower, and compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from kvctl.lab.compare.comparison import Comparison, compare
from kvctl.lab.compare.significance import Verdict
from kvctl.lab.config.scenario import ModelConfig, Scenario
from kvctl.lab.config.workload_config import Chat
from kvctl.lab.latency import summarise
from kvctl.lab.results.result import Repetition, Result
from kvctl.lab.results.result_builder import summarise as result_of
from kvctl.lab.run.raw_measurements import RawMeasurements

RECORDED = Path(__file__).with_name("noise.json")
GAPS: dict[str, list[float]] = msgspec.json.decode(RECORDED.read_bytes())["gaps"]
NUM_PAIRS = 20
"""As in `make regress`."""
SLOWER = 1.1

ONCE = summarise(np.array([1.0]))
PLAIN = replace(
    result_of(RawMeasurements("noise", Scenario(ModelConfig("tiny-llama"), Chat()), 0)),
    operations=dict.fromkeys(GAPS, ONCE),
    turns=dict.fromkeys(GAPS, (1.0,)),
)


def trials(number: int, planted: str | None) -> Iterator[Comparison]:
    """Yield comparisons, with one operation slower if named."""
    rng = np.random.default_rng(5)
    for _ in range(number):
        drawn = rng.choice(len(GAPS["request"]), NUM_PAIRS, replace=False)
        sides = rng.choice((-1.0, 1.0), NUM_PAIRS)
        base = [_run("base", place, {}) for place in range(NUM_PAIRS)]
        new = [
            _run("new", place, _ratios(int(pair), float(side), planted))
            for place, (pair, side) in enumerate(zip(drawn, sides, strict=True))
        ]
        yield compare(base, new)


def _ratios(pair: int, side: float, planted: str | None) -> dict[str, float]:
    return {
        name: math.exp(side * gaps[pair]) * (SLOWER if name == planted else 1.0)
        for name, gaps in GAPS.items()
    }


def _run(side: str, place: int, ratios: dict[str, float]) -> Result:
    turns = {name: (ratio,) for name, ratio in ratios.items()} or PLAIN.turns
    return replace(PLAIN, repetition=Repetition("noise", side, place), turns=turns)


def found(comparison: Comparison, name: str) -> bool:
    """Return whether an operation is significantly worse."""
    return comparison.timings[name].effect.verdict is Verdict.WORSE


def alarmed(comparison: Comparison) -> bool:
    """Return whether any operation is significantly worse."""
    return any(found(comparison, name) for name in comparison.timings)


def test_slowdowns_are_found_without_false_alarms() -> None:
    """Twenty trials each: slower requests are found, equal systems rarely alarm."""
    assert sum(found(one, "request") for one in trials(20, "request")) >= 19
    assert sum(map(alarmed, trials(20, None))) <= 1


@pytest.mark.soak
@pytest.mark.parametrize("name", GAPS)
def test_a_tenth_is_found_in_95_of_100(name: str) -> None:
    """A 10 % slowdown of any one operation."""
    assert sum(found(one, name) for one in trials(100, name)) >= 95


@pytest.mark.soak
def test_equal_systems_alarm_in_at_most_5_of_100() -> None:
    """With all operations tested together."""
    assert sum(map(alarmed, trials(100, None))) <= 5
