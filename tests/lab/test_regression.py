"""The working tree against a commit: what fails, and what people read of it."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest
from msgspec.structs import replace

from kvcore.errors import SetupError
from kvctl.lab.compare.commit_installs import CommitInstalls
from kvctl.lab.compare.comparison import compare
from kvctl.lab.compare.fail_rules import DEFAULT, FailRules
from kvctl.lab.compare.paired_runs import Command, InterleavedRuns
from kvctl.lab.config.scenario import ModelConfig, Scenario
from kvctl.lab.config.scenario import read as read_scenario
from kvctl.lab.config.workload_config import Chat
from kvctl.lab.latency import summarise
from kvctl.lab.regression import Regression, against_baseline, markdown
from kvctl.lab.report.comparison_report import render_junit
from kvctl.lab.results.result import Result, read
from kvctl.lab.results.result_builder import summarise as result_of
from kvctl.lab.run.raw_measurements import RawMeasurements

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "results" / "baselines" / "regress.json"
PLAIN = result_of(
    RawMeasurements("planted", Scenario(ModelConfig("tiny-llama"), Chat()), 0)
)


def runs(seconds: float, **counts: int) -> list[Result]:
    """Twelve runs that take about so long."""
    return [
        replace(
            PLAIN,
            operations={"lookup": summarise(np.array([seconds + 0.001 * place]))},
            counts=replace(PLAIN.counts, **counts),
        )
        for place in range(12)
    ]


def baseline(folder: Path, **counts: int) -> Path:
    """A saved result to hold others against."""
    return replace(PLAIN, counts=replace(PLAIN.counts, **counts)).save(folder)


def test_counts_of_the_baseline_must_repeat(tmp_path: Path) -> None:
    """Equal: nothing to say. Otherwise each unlike count, with both figures."""
    path = baseline(tmp_path, tokens_hit=7)
    assert against_baseline(path, runs(1.0, tokens_hit=7)) == []
    (line,) = against_baseline(path, runs(1.0, tokens_hit=5))
    assert line == "tokens_hit: 7 in the baseline, 5 now"


def test_a_baseline_of_something_else_is_no_baseline(tmp_path: Path) -> None:
    """Missing, or made with other settings: it says how to make one."""
    (line,) = against_baseline(tmp_path / "none.json", runs(1.0))
    assert "is missing: `make baseline`" in line
    other = [replace(one, seed=3) for one in runs(1.0)]
    (line,) = against_baseline(baseline(tmp_path), other)
    assert "another seed" in line


def test_what_fails_is_in_the_summary_and_in_junit() -> None:
    """A slower operation and an unlike count: both named in both."""
    found = compare(runs(1.0), runs(1.2), ("main", "tree"))
    regression = Regression(
        found, FailRules(DEFAULT).find_regressions(found), ["tokens_hit: 7, 5"]
    )
    assert regression.failed
    text = markdown(regression)
    assert "tree is slower in lookup" in text
    assert "- tokens_hit: 7, 5" in text
    suite = fromstring(render_junit(found, regression.of_baseline))
    failed = {case.get("name") for case in suite if case.find("failure") is not None}
    assert failed == {"lookup", "counts"}
    assert suite.get("failures") == "2"


def test_cannot_tell_is_skipped_and_passes() -> None:
    """Two runs decide nothing: no failure anywhere."""
    found = compare(runs(1.0)[:2], runs(2.0)[:2], ("main", "tree"))
    regression = Regression(found, FailRules(DEFAULT).find_regressions(found), [])
    assert not regression.failed
    assert "All counts are equal to the baseline." in markdown(regression)
    suite = fromstring(render_junit(found, []))
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")


def test_the_committed_baseline_is_of_the_scenario_in_force() -> None:
    """Else every regression run would fail: `make baseline` renews it."""
    committed = read(BASELINE)
    scenario = read_scenario(ROOT / "scenarios" / "regress.toml")
    assert committed.scenario == scenario
    assert committed.problems == ()
    assert committed.counters["chunks_evicted"] > 0


def test_an_unknown_commit_is_wrong_use(tmp_path: Path) -> None:
    """Told before anything is installed."""
    with pytest.raises(SetupError, match="no-such-commit: no such commit"):
        CommitInstalls(ROOT, tmp_path).resolve("no-such-commit")


@pytest.mark.long
def test_two_interleaved_runs_have_equal_counts(tmp_path: Path) -> None:
    """Two real runs: equal counts, and a median for every turn."""
    text = (ROOT / "tests" / "lab" / "compare" / "turns.toml").read_text()
    scenario = tmp_path / "turns.toml"
    scenario.write_text(text)
    side = Command(sys.executable, [str(scenario)])
    pair = InterleavedRuns(side, side, in_turns=True)(0)
    assert pair.base.counts == pair.new.counts
    assert pair.base.counts.requests == 12
    assert pair.base.problems == pair.new.problems == ()
    assert len(pair.base.turns["request"]) == len(pair.new.turns["request"]) == 12
