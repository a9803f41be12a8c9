"""Comparison of results: counts exactly, timings by the spread of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from kvcore.errors import SetupError
from kvctl.lab.compare.comparison import CountVerdict, compare, read_results
from kvctl.lab.compare.fail_rules import DEFAULT, FailRules
from kvctl.lab.compare.paired_runs import Pair, PairedRuns
from kvctl.lab.compare.significance import Verdict
from kvctl.lab.config.scenario import ModelConfig, Scenario
from kvctl.lab.config.workload_config import Chat
from kvctl.lab.latency import summarise
from kvctl.lab.results.result import Result
from kvctl.lab.results.result_builder import summarise as result_of
from kvctl.lab.run.raw_measurements import RawMeasurements

SCENARIO = Scenario(ModelConfig("tiny-llama"), Chat())
PLAIN = result_of(RawMeasurements("planted", SCENARIO, 0))


def run(lookup_s: float, store_s: float = 1.0, **counts: int) -> Result:
    """Return a run in which all calls of an operation took equally long."""
    seconds = {"lookup": lookup_s, "store": store_s}
    return replace(
        PLAIN,
        operations={name: summarise(np.array([s])) for name, s in seconds.items()},
        counts=replace(PLAIN.counts, **counts),
        counters={"chunks_evicted": 7},
    )


def runs(median_s: float, number: int = 12, **counts: int) -> list[Result]:
    """Return runs whose durations vary by a few percent."""
    noise = 0.02 * np.cos(np.arange(number) * 2.4)
    return [run(median_s * float(np.exp(one)), **counts) for one in noise]


def test_a_slower_side_is_a_regression() -> None:
    """A tenth slower in lookups: worse there, the same elsewhere, counts the same."""
    found = compare(runs(1.0), runs(1.1))
    effect = found.timings["lookup"].effect
    assert effect.verdict is Verdict.WORSE
    assert effect.ratio == pytest.approx(1.1, rel=0.02)
    assert found.timings["store"].effect.verdict is Verdict.SAME
    assert {one.verdict for one in found.counts.values()} == {CountVerdict.SAME}
    (line,) = FailRules(DEFAULT).find_regressions(found)
    assert line.startswith("lookup takes 1.10")
    assert FailRules("lookup>5%").find_regressions(found)
    assert not FailRules("lookup>20%,store>1%").find_regressions(found)


def test_a_faster_side_is_better_and_passes() -> None:
    """Better is no regression, and neither is 'cannot tell'."""
    found = compare(runs(1.1), runs(1.0))
    assert found.timings["lookup"].effect.verdict is Verdict.BETTER
    assert not FailRules(DEFAULT).find_regressions(found)
    few = compare(runs(1.0, 2), runs(2.0, 2))
    assert few.timings["lookup"].effect.verdict is Verdict.CANNOT_TELL
    assert not FailRules(DEFAULT).find_regressions(few)


@pytest.mark.parametrize(
    ("name", "base", "new", "verdict"),
    [
        ("tokens_hit", [5, 5], [5, 5], CountVerdict.SAME),
        ("tokens_hit", [5, 5], [4, 4], CountVerdict.WORSE),
        ("tokens_hit", [5, 5], [6, 6], CountVerdict.BETTER),
        ("errors", [0, 0], [0, 1], CountVerdict.VARIES),
        ("errors", [0, 0], [1, 1], CountVerdict.WORSE),
        ("stored_bytes", [9, 9], [8, 8], CountVerdict.DIFFERS),
        ("tokens_hit", [4, 6], [5, 5], CountVerdict.VARIES),
        ("tokens_hit", [4, 6], [3, 3], CountVerdict.WORSE),
    ],
)
def test_counts_are_compared_exactly(
    name: str, base: Sequence[int], new: Sequence[int], verdict: CountVerdict
) -> None:
    """Any difference of constant counts; otherwise values outside the range."""
    ours = [run(1.0, **{name: value}) for value in base]
    theirs = [run(1.0, **{name: value}) for value in new]
    found = compare(ours, theirs)
    assert found.counts[name].verdict is verdict
    failing = verdict in (CountVerdict.WORSE, CountVerdict.DIFFERS)
    assert bool(FailRules("counts").find_regressions(found)) is failing


def test_other_settings_may_store_other_amounts() -> None:
    """With other settings, a count that differs passes, and a worse one fails."""
    larger = replace(SCENARIO, cache_blocks=2048)
    base = [run(1.0, stored_bytes=1, chunks_hit=3)] * 2
    new = [replace(run(1.0, stored_bytes=2, chunks_hit=2), scenario=larger)] * 2
    found = compare(base, new)
    assert found.settings == {"cache_blocks": ("1024", "2048")}
    assert FailRules("counts").find_regressions(found) == ["chunks_hit: 3 -> 2"]


def test_other_work_has_other_counts() -> None:
    """For different workloads, only counts that must be zero are compared."""
    other = replace(SCENARIO, workload=Chat(turns=9))
    new = [replace(run(1.0, chunks_hit=99), scenario=other)] * 2
    found = compare(runs(1.0), new)
    assert found.counts.keys() == {"errors", "bytes_wrong", "leases_leaked"}


def test_different_machines_are_refused_by_default() -> None:
    """The error names the difference and the flag that allows it."""
    elsewhere = replace(PLAIN.environment, cpu="another", num_cores=1)
    theirs = [replace(one, environment=elsewhere) for one in runs(1.0)]
    with pytest.raises(SetupError, match=r"cpu: .* and another; .*--anyway"):
        compare(runs(1.0), theirs)
    assert "another" in compare(runs(1.0), theirs, allow_unlike=True).notes[0]


@pytest.mark.parametrize("rule", ["lookup", "lookup>5", "faster", "lookup > x%"])
def test_a_wrong_rule_says_what_rules_are(rule: str) -> None:
    """Wrong usage is an error before any run."""
    with pytest.raises(SetupError, match="rules for a regression"):
        FailRules(rule)


def test_a_rule_for_an_unknown_operation_names_the_known() -> None:
    """The error lists the compared operations."""
    with pytest.raises(SetupError, match="unknown operation; known are lookup, store"):
        FailRules("lokup>5%").find_regressions(compare(runs(1.0), runs(1.0)))


def test_paired_runs_are_compared_in_pairs(tmp_path: Path) -> None:
    """Drift of the machine hides no difference; saved runs compare equally."""
    drift = np.geomspace(1.0, 3.0, 24).tolist()

    def run_pair(number: int) -> Pair:
        return Pair(run(drift[number]), run(drift[number] * 1.1))

    found = PairedRuns(("a", "b"), tmp_path, run_pair).run(24)
    assert found.in_pairs
    assert "to interleave them" in found.notes[0]
    assert found.timings["lookup"].effect.verdict is Verdict.WORSE
    assert found.timings["store"].effect.verdict is Verdict.SAME
    again = compare(
        read_results(tmp_path / "base"), read_results(tmp_path / "new"), ("a", "b")
    )
    assert again == found
    assert found.save(tmp_path).exists()


def test_interleaved_turns_are_compared_pairwise(tmp_path: Path) -> None:
    """The ratio of an interleaved pair is the median over its turns."""
    turns = (1.0, 5.0, 2.0, None)

    def run_pair(number: int) -> Pair:
        slower = tuple(one and one * 1.1 for one in turns)
        # The medians of the runs have the opposite ratio.
        base = replace(run(2.0), turns={"lookup": turns})
        return Pair(base, replace(run(1.0), turns={"lookup": slower}))

    found = PairedRuns(("a", "b"), tmp_path, run_pair).run(12)
    assert found.timings["lookup"].effect.ratio == pytest.approx(1.1)
    assert not any("to interleave them" in note for note in found.notes)
    assert found.timings["lookup"].effect.verdict is Verdict.WORSE


def test_interrupted_pairs_are_dropped(tmp_path: Path) -> None:
    """The complete pairs are compared; without one it is an error."""
    cut = Pair(run(1.0), replace(run(1.0), interrupted=True))
    whole = Pair(run(1.0), run(1.0))
    found = PairedRuns(("a", "b"), tmp_path, lambda number: (whole, cut)[number]).run(
        10
    )
    assert (found.base.num_runs, found.new.num_runs) == (1, 1)
    with pytest.raises(SetupError, match="interrupted before"):
        PairedRuns(("a", "b"), tmp_path, lambda _: cut).run(10)


def test_interrupt_before_a_load_keeps_complete_pairs(tmp_path: Path) -> None:
    """Complete pairs are compared."""

    def run_pair(number: int) -> Pair:
        if number:
            raise KeyboardInterrupt
        return Pair(run(1.0), run(1.0))

    assert PairedRuns(("a", "b"), tmp_path, run_pair).run(10).base.num_runs == 1


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    """A folder without results is wrong usage."""
    with pytest.raises(SetupError, match="no results"):
        read_results(tmp_path)
