"""Regression check: timings against a commit, counts against a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import SetupError
from kvctl.lab.compare.commit_installs import CommitInstalls, supports_interleaving
from kvctl.lab.compare.comparison import (
    Comparison,
    CountVerdict,
    compare_counts,
    differences,
    format_range,
    read_results,
)
from kvctl.lab.compare.fail_rules import FailRules
from kvctl.lab.compare.paired_runs import (
    NEW,
    Command,
    InterleavedRuns,
    Pair,
    PairedRuns,
)
from kvctl.lab.config.scenario import read as read_scenario
from kvctl.lab.page.html_page import save_page
from kvctl.lab.report import comparison_report
from kvctl.lab.report.result_collection import ResultCollection
from kvctl.lab.results.result import Result, make_folder, read
from kvctl.lab.run_turns import can_interleave, fit_in_memory

BASELINES = Path("results/baselines")
FAILING = (CountVerdict.WORSE, CountVerdict.DIFFERS)


@dataclass(frozen=True, slots=True)
class Regression:
    """A comparison, and the reasons for its failure."""

    comparison: Comparison
    of_base: Sequence[str]
    """Violated rules of the comparison with the commit."""
    of_baseline: Sequence[str]
    """Counts that differ from the committed baseline."""

    @property
    def failed(self) -> bool:
        """Whether the working tree has a regression."""
        return bool(self.of_base or self.of_baseline)


@dataclass(frozen=True, slots=True)
class RegressionCheck:
    """Compares the working tree with a commit in paired runs."""

    root: Path
    base: str
    scenario: Path
    num_pairs: int
    folder: Path
    gate: FailRules

    def run(self, report_progress: Callable[[float, str], None]) -> Regression:
        """Install both versions, run them in pairs, and save reports.

        The folder gets `summary.md`, `junit.xml`, `report.html`, `comparison.json` and
        the results of all runs.

        Raises:
            SetupError: an unknown commit, or a run could not begin.
        """
        run_pair = self._prepare_runs(report_progress)

        def run_numbered_pair(number: int) -> Pair:
            share, label = number / self.num_pairs, f"pair {number + 1}"
            report_progress(share, f"{label} of {self.num_pairs}")
            return run_pair(number)

        make_folder(self.folder)
        labels = (self._base_label(), "working tree")
        pairs = PairedRuns(labels, self.folder, run_numbered_pair)
        found = pairs.run(self.num_pairs)
        found.save(self.folder)
        runs = [
            one for one in read_results(self.folder / NEW) if _is_of(one, pairs.name)
        ]
        regression = Regression(
            found,
            self.gate.find_regressions(found),
            against_baseline(self.baseline, runs),
        )
        self._write(regression)
        return regression

    @property
    def baseline(self) -> Path:
        """Path of the committed result whose counts must be repeated."""
        return self.root / BASELINES / f"{self.scenario.stem}.json"

    def _base_label(self) -> str:
        """Return the commit as it was given, and its hash."""
        commit = CommitInstalls(self.root, self.root).resolve(self.base)
        known = commit.startswith(self.base)
        return commit[:12] if known else f"{self.base} ({commit[:12]})"

    def _prepare_runs(
        self, report_progress: Callable[[float, str], None]
    ) -> InterleavedRuns:
        scenario = read_scenario(self.scenario)
        installs = CommitInstalls(self.root, self.root / "build" / "regress")
        report_progress(0.0, f"installing {self.base}")
        base = installs.commit(self.base)
        report_progress(0.0, "installing the working tree")
        new = installs.working_tree()
        # Another folder: a Python that is started here would import from here.
        folder = installs.folder
        in_turns = (
            can_interleave(scenario)
            and fit_in_memory(scenario, scenario)
            and all(supports_interleaving(python, folder) for python in (base, new))
        )
        arguments = [str(self.scenario.resolve())]
        return InterleavedRuns(
            Command(str(base), arguments, folder),
            Command(str(new), arguments, folder),
            in_turns,
        )

    def _write(self, regression: Regression) -> None:
        save_page(ResultCollection.read([self.folder]), self.folder / "report.html")
        texts = {
            "summary.md": markdown(regression),
            "junit.xml": comparison_report.render_junit(
                regression.comparison, regression.of_baseline
            ),
        }
        for name, text in texts.items():
            try:
                (self.folder / name).write_text(text)
            except OSError as error:
                raise SetupError(f"{self.folder / name}: {error.strerror}") from None


def _is_of(result: Result, comparison: str) -> bool:
    return result.repetition is not None and result.repetition.comparison == comparison


def against_baseline(path: Path, runs: Sequence[Result]) -> list[str]:
    """Return a sentence per count that differs from the baseline.

    Counts do not depend on the machine.
    """
    if not path.exists():
        return [f"{path} is missing: `make baseline` writes it"]
    baseline = read(path)
    unlike = differences(baseline, runs[0])
    if unlike:
        keys = ", ".join(unlike)
        return [f"the baseline was made with another {keys}: `make baseline` renews it"]
    return [
        f"{name}: {format_range(one.base)} in the baseline, {format_range(one.new)} now"
        for name, one in compare_counts([baseline], runs).items()
        if one.verdict in FAILING
    ]


def markdown(regression: Regression) -> str:
    """Return a summary for a pull request."""
    lines = [comparison_report.render_markdown(regression.comparison), ""]
    if regression.of_base:
        lines += ["### Regressions", *(f"- {one}" for one in regression.of_base), ""]
    if regression.of_baseline:
        lines.append("### Counts that differ from the baseline")
        lines += [f"- {one}" for one in regression.of_baseline]
    else:
        lines.append("All counts are equal to the baseline.")
    return "\n".join(lines).strip() + "\n"
