"""From saved results to a page, Markdown and tables, as a user asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from kvctl.console import sparkline
from kvctl.lab.compare.paired_runs import Pair, PairedRuns
from kvctl.lab.results.result import Result
from tests.cli.test_cli import kvctl
from tests.lab.page.test_page import planted


def saved(folder: Path, factor: float, number: int = 10) -> Path:
    """A folder of repetitions."""
    for place in range(number):
        once = replace(
            planted(factor + 0.001 * place), started=f"2026-01-01T{place:02}"
        )
        once.save(folder)
    return folder


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.3, 1), (0.7, 0)])
def test_compare_exits_by_what_it_finds(
    tmp_path: Path, factor: float, code: int
) -> None:
    """0 for the same and for better, 1 for a regression that is named."""
    base, new = saved(tmp_path / "base", 1.0), saved(tmp_path / "new", factor)
    done = kvctl("bench", "compare", str(base), str(new))
    assert done.returncode == code, done.stderr
    assert ("regression: lookup takes 1.30" in done.stdout) is (code == 1)
    assert ("slower in lookup" in done.stdout) is (code == 1)


def test_cannot_tell_is_no_failure(tmp_path: Path) -> None:
    """Two runs a side, far apart."""
    base, new = saved(tmp_path / "a", 1.0, 2), saved(tmp_path / "b", 3.0, 2)
    done = kvctl("bench", "compare", str(base), str(new), "--markdown")
    assert done.returncode == 0
    assert "| lookup | " in done.stdout
    assert "Too few runs" in done.stdout


def test_wrong_use_of_compare_is_exit_code_2(tmp_path: Path) -> None:
    """Unlike machines, a wrong rule, nothing to compare: one line each."""
    base = saved(tmp_path / "a", 1.0, 1)
    other: Result = planted(1.0)
    other = replace(other, environment=replace(other.environment, cpu="another"))
    new = other.save(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    for flags, says in (
        ([base, new], "--anyway"),
        ([base, base, "--fail-on", "slow"], "rules for a regression"),
        ([base, tmp_path / "empty"], "no results"),
        ([base, tmp_path], "no results; its folders a, b have some"),
    ):
        done = kvctl("bench", "compare", *map(str, flags))
        assert done.returncode == 2
        assert says in done.stderr.strip().splitlines()[-1]
    assert kvctl("bench", "compare", str(base), str(new), "--anyway").returncode == 0


def test_a_report_of_a_contest_has_both_sides(tmp_path: Path) -> None:
    """One folder from `run --versus`: a page and Markdown with both labels."""

    def play(number: int) -> Pair:
        return Pair(planted(1.0 + 0.001 * number), planted(1.3))

    contest = PairedRuns(("left", "right"), tmp_path / "contest", play)
    contest.run(10).save(tmp_path / "contest")
    page = tmp_path / "report.html"
    done = kvctl(
        "bench", "report", str(tmp_path / "contest"), "-o", str(page), "--markdown"
    )
    assert done.returncode == 0, done.stderr
    assert "right is slower in lookup" in page.read_text()
    assert "**right is slower in" in done.stdout
    assert "## left" in done.stdout


def test_sparks_rise_to_the_highest() -> None:
    """Nothing is blank, the highest full, and no values no line."""
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert sparkline([0.0, 0.0]) == "  "
    assert sparkline([]) == ""
