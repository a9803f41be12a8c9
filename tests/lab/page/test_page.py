"""The page of results as text: complete, self-contained, and escaped."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
from msgspec.structs import replace

from kvctl.console import duration
from kvctl.lab.compare.comparison import compare
from kvctl.lab.config.copy_settings import CopyRow, Setting
from kvctl.lab.config.scenario import Fault, ModelConfig, Scenario
from kvctl.lab.config.workload_config import Chat
from kvctl.lab.latency import Latency, summarise
from kvctl.lab.page import svg
from kvctl.lab.page.html_page import render
from kvctl.lab.report.result_collection import ResultCollection, RunGroup
from kvctl.lab.results.load_report import LoadReport, SweepStep
from kvctl.lab.results.result import Result, TierHits
from kvctl.lab.results.result_builder import summarise as result_of
from kvctl.lab.results.time_series import LatencyPoint, Series, SeriesPoint
from kvctl.lab.run.fault_injection import FaultReport
from kvctl.lab.run.raw_measurements import RawMeasurements
from tests.lab.results.test_limits import ALONE

SCENARIO = Scenario(ModelConfig("tiny-llama"), Chat(), question="<b>Is it & fast?</b>")
VOID = {"meta", "br"}


LOAD = LoadReport(
    requests=40, failed=1, aborted=0, preemptions=0, warm_ups=0, offered_per_s=10.0,
    done_per_s=9.0, lag=None, waited=None, generator_bound=False, ttft=None,
    goodput=None, sessions=None,
    faults=(FaultReport(Fault(at_s=1), 1.0, 0.5, 0.1, 0.75, 3, 2, 0.5, 0.25),),
)  # fmt: skip
COPIES = tuple(
    CopyRow(
        Setting(kib << 10, "scattered", 1), 1 << 25, 1 << 23, 8.0, 9.0, share,
        share + 0.25, 7.0, 0.4, 0.0, product_slowdown=slowdown,
    )
    for kib, share, slowdown in ((4, 0.5, 0.0625), (32, 0.7, None))
)  # fmt: skip


def step(rate: float, request: Latency) -> SweepStep:
    """Return one step of a sweep."""
    return SweepStep(rate, 9, 1.0, request, None, kept_up=True)


@cache
def complete_result(factor: float) -> Result:
    """Return a result with data for every section of a page."""
    rng = np.random.default_rng(0)
    calls = rng.lognormal(-7, 0.5, 2000) * factor
    points = tuple(
        SeriesPoint(
            end_s=0.5 * place,
            counts={"requests": 10, "tokens": 100, "tokens_hit": 5 * place},
            operations={"request": LatencyPoint(10, 0.01, 0.02)},
        )
        for place in range(1, 9)
    )
    plain = result_of(RawMeasurements("complete_result", SCENARIO, 0, elapsed_s=4.0))
    request = summarise(calls * 10)
    return replace(
        plain,
        alone=ALONE,
        tiers=(TierHits("L1", 0.1), TierHits("tier 1: <file>", 0.125, 4096)),
        load=replace(LOAD, steps=(step(8, request), step(99, request))),
        operations={"lookup": summarise(calls), "request": summarise(calls * 10)},
        series=Series(0.5, points),
        counts=replace(plain.counts, tokens=800, tokens_hit=180, tokens_hit_ideal=400),
        problems=(),
    )


def result_storing(factor: float) -> Result:
    """Return such a result with a long count that depends on the factor."""
    result, num_bytes = complete_result(factor), int(factor * 1_102_053_376)
    return replace(result, counts=replace(result.counts, stored_bytes=num_bytes))


@cache
def page(*factors: float) -> str:
    """Return a page of one side per factor, with ten runs each."""
    runs = [
        [result_storing(factor * (1 + 0.001 * place)) for place in range(10)]
        for factor in factors
    ]
    sides = [RunGroup.of(f"side {n}", n, results) for n, results in enumerate(runs)]
    comparisons = [compare(runs[0], other) for other in runs[1:]]
    return render(ResultCollection(sides, comparisons))


class Nesting(HTMLParser):
    """Check that elements are nested correctly."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Record an opened element unless it is void."""
        del attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Ignore self-closing elements."""

    def handle_endtag(self, tag: str) -> None:
        """Check that the tag closes the last opened element."""
        assert self.open.pop() == tag


@pytest.mark.parametrize("factors", [(1.0,), (1.0, 1.3), (1.0, 1.0, 0.5, 2.0)])
def test_a_page_is_complete_and_self_contained(factors: tuple[float, ...]) -> None:
    """Elements are nested; no resource is loaded and no script runs."""
    text = page(*factors)
    nesting = Nesting()
    nesting.feed(text)
    assert nesting.open == []
    assert not re.search(r"(src|href)=|url\(|@import|<script|https?://", text)


def test_a_page_begins_with_the_verdict() -> None:
    """The verdict is a sentence and precedes all figures."""
    text = page(1.0, 1.3)
    assert "new is slower in lookup (+30" in text
    assert text.index("is slower in") < text.index("requests/s")
    assert "▲ slower" in text


def test_text_of_a_scenario_is_escaped() -> None:
    """A scenario's question is not interpreted as markup."""
    assert "&lt;b&gt;Is it &amp; fast?" in page(1.0)
    assert "<b>Is it" not in page(1.0)


def test_faults_tiers_sweeps_and_limits_are_drawn() -> None:
    """Each appears if the result has it, and is escaped."""
    text = page(1.0)
    assert "Shaded: faults" in text
    assert "kill server, recovered after 750 ms" in text
    assert "Hit rate of tiers" in text
    assert "tier 1: &lt;file&gt; 12.5%" in text
    assert "latency of requests by rate" in text
    assert "40%</b>: 500 us, ceiling 200 us" in text
    assert "1 fault recovered within 750 ms, 3 requests failed" in text


def test_copies_are_listed_and_summarised() -> None:
    """One row per setting; the summary has shares and the slowdown of a product."""
    copied = replace(complete_result(1), copies=COPIES)
    text = render(ResultCollection([RunGroup.of("side", 0, [copied])], []))
    for shown in (
        "<h2>Copies</h2>", "calls of 32MiB", "8 (50%)", "9 (95%)", ">6%<",
        "All bytes correct: stores reached 50% to 70% of a plain copy, retrieves "
        "75% to 95%; a concurrent matrix product ran at most 6% slower.",
    ):  # fmt: skip
        assert shown in text
    assert "<h2>Copies" not in page(1)


def test_problems_precede_other_figures() -> None:
    """The sentence of a failed run names the problem."""
    failed = replace(complete_result(1.0), problems=("3 bytes were wrong",))
    text = render(ResultCollection([RunGroup.of("a", 0, [failed])], []))
    assert "complete_result failed: 3 bytes were wrong." in text


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([7.0], ["0", "2", "4", "6", "8"]), ([0.0], ["0", "0.25", "0.5", "0.75", "1"])],
)
def test_axes_have_round_ticks(values: list[float], ticks: list[str]) -> None:
    """Ticks range from zero to at least the highest value."""
    axis = svg.linear(values, "{:g}".format)
    assert [tick.text for tick in axis.ticks] == ticks


def test_a_line_has_gaps_without_values() -> None:
    """Points farther apart than `reach` are not joined."""
    points = [svg.Point(x, 1.0) for x in (0.5, 1.0, 3.0, 3.5)]
    axis = svg.linear([4.0], "{:g}".format)
    drawn = svg.lines("t", [svg.Line("a", points, reach=0.75)], axis, axis)
    assert drawn.count("<polyline") == 2
    whole = svg.lines("t", [svg.Line("a", points)], axis, axis)
    assert whole.count("<polyline") == 1


def test_a_logarithmic_axis_places_by_ratio() -> None:
    """The geometric mean is at the centre."""
    axis = svg.logarithmic([0.001, 0.1], duration)
    assert axis.share(0.01) == pytest.approx(0.5)
    assert "10 ms" in [tick.text for tick in axis.ticks]
