"""The regression check: its failures and its reports."""

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
    RawMeasurements("example", Scenario(ModelConfig("tiny-llama"), Chat()), 0)
)


def runs(seconds: float, **counts: int) -> list[Result]:
    """Return twelve runs of about this duration."""
    return [
        replace(
            PLAIN,
            operations={"lookup": summarise(np.array([seconds + 0.001 * place]))},
            counts=replace(PLAIN.counts, **counts),
        )
        for place in range(12)
    ]


def baseline(folder: Path, **counts: int) -> Path:
    """Return the path of a saved result."""
    return replace(PLAIN, counts=replace(PLAIN.counts, **counts)).save(folder)


def test_counts_of_the_baseline_must_repeat(tmp_path: Path) -> None:
    """There is a sentence per count that differs, with both values."""
    path = baseline(tmp_path, tokens_hit=7)
    assert against_baseline(path, runs(1.0, tokens_hit=7)) == []
    (line,) = against_baseline(path, runs(1.0, tokens_hit=5))
    assert line == "tokens_hit: 7 in the baseline, 5 now"


def test_a_missing_or_incomparable_baseline_is_a_failure(tmp_path: Path) -> None:
    """The sentence has the command that makes a baseline."""
    (line,) = against_baseline(tmp_path / "none.json", runs(1.0))
    assert "is missing: `make baseline`" in line
    other = [replace(one, seed=3) for one in runs(1.0)]
    (line,) = against_baseline(baseline(tmp_path), other)
    assert "another seed" in line


def test_failures_are_in_the_summary_and_in_junit() -> None:
    """Both have the slower operation and the count that differs."""
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


def test_an_undecided_operation_is_skipped_and_passes() -> None:
    """Two runs are too few for a verdict, and no failure is reported."""
    found = compare(runs(1.0)[:2], runs(2.0)[:2], ("main", "tree"))
    regression = Regression(found, FailRules(DEFAULT).find_regressions(found), [])
    assert not regression.failed
    assert "All counts are equal to the baseline." in markdown(regression)
    suite = fromstring(render_junit(found, []))
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")


def test_the_committed_baseline_is_of_the_current_scenario() -> None:
    """Otherwise every regression check would fail; `make baseline` renews it."""
    committed = read(BASELINE)
    scenario = read_scenario(ROOT / "scenarios" / "regress.toml")
    assert committed.scenario == scenario
    assert committed.problems == ()
    assert committed.counters["chunks_evicted"] > 0


def test_an_unknown_commit_is_a_setup_error(tmp_path: Path) -> None:
    """The error is raised before anything is installed."""
    with pytest.raises(SetupError, match="no-such-commit: no such commit"):
        CommitInstalls(ROOT, tmp_path).resolve("no-such-commit")


@pytest.mark.long
def test_two_interleaved_runs_have_equal_counts(tmp_path: Path) -> None:
    """Two real runs have equal counts, and a median per turn."""
    text = (ROOT / "tests" / "lab" / "compare" / "turns.toml").read_text()
    scenario = tmp_path / "turns.toml"
    scenario.write_text(text)
    side = Command(sys.executable, [str(scenario)])
    pair = InterleavedRuns(side, side, in_turns=True)(0)
    assert pair.base.counts == pair.new.counts
    assert pair.base.counts.requests == 12
    assert pair.base.problems == pair.new.problems == ()
    assert len(pair.base.turns["request"]) == len(pair.new.turns["request"]) == 12
