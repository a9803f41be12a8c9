"""`bench compare` and `bench report` on saved results: exit codes and outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from kvctl.console import sparkline
from kvctl.lab.compare.paired_runs import Pair, PairedRuns
from kvctl.lab.results.result import Result
from tests.cli.test_cli import run_in_process
from tests.lab.page.test_page import complete_result


def saved(folder: Path, factor: float, number: int = 10) -> Path:
    """Return a folder with repetitions of a run."""
    for place in range(number):
        once = replace(
            complete_result(factor + 0.001 * place), started=f"2026-01-01T{place:02}"
        )
        once.save(folder)
    return folder


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.3, 1), (0.7, 0)])
def test_compare_exits_by_what_it_finds(
    tmp_path: Path, factor: float, code: int
) -> None:
    """Exit code 0 if equal or better, 1 for a regression."""
    base, new = saved(tmp_path / "base", 1.0), saved(tmp_path / "new", factor)
    done = run_in_process("bench", "compare", str(base), str(new))
    assert done.returncode == code, done.stderr
    assert ("regression: lookup takes 1.30" in done.stdout) is (code == 1)
    assert ("slower in lookup" in done.stdout) is (code == 1)


def test_cannot_tell_is_no_failure(tmp_path: Path) -> None:
    """Two runs per side with very different timings."""
    base, new = saved(tmp_path / "a", 1.0, 2), saved(tmp_path / "b", 3.0, 2)
    done = run_in_process("bench", "compare", str(base), str(new), "--markdown")
    assert done.returncode == 0
    assert "| lookup | " in done.stdout
    assert "Too few runs" in done.stdout


def test_wrong_use_of_compare_is_exit_code_2(tmp_path: Path) -> None:
    """Different machines, a wrong rule, nothing to compare: one line each."""
    base = saved(tmp_path / "a", 1.0, 1)
    other: Result = complete_result(1.0)
    other = replace(other, environment=replace(other.environment, cpu="another"))
    new = other.save(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    for flags, says in (
        ([base, new], "--anyway"),
        ([base, base, "--fail-on", "slow"], "rules for a regression"),
        ([base, tmp_path / "empty"], "no results"),
        ([base, tmp_path], "no results; its folders a, b have some"),
    ):
        done = run_in_process("bench", "compare", *map(str, flags))
        assert done.returncode == 2
        assert says in done.stderr.strip().splitlines()[-1]
    assert (
        run_in_process("bench", "compare", str(base), str(new), "--anyway").returncode
        == 0
    )


def test_report_of_paired_runs_has_both_sides(tmp_path: Path) -> None:
    """One folder of `run --versus`: page, Markdown and SVG with both labels."""

    def run_pair(number: int) -> Pair:
        return Pair(complete_result(1.0 + 0.001 * number), complete_result(1.3))

    folder = tmp_path / "pairs"
    PairedRuns(("left", "right"), folder, run_pair).run(10).save(folder)
    page = tmp_path / "report.html"
    done = run_in_process("bench", "report", str(folder), "-o", str(page), "--markdown")
    assert done.returncode == 0, done.stderr
    assert "right is slower in lookup" in page.read_text()
    assert "**right is slower in" in done.stdout
    assert "## left" in done.stdout
    for name, text in (("report.md", "## left"), ("report.svg", "</svg>")):
        path = tmp_path / name
        done = run_in_process("bench", "report", str(folder), "-o", str(path))
        assert done.returncode == 0, done.stderr
        assert text in path.read_text()
    done = run_in_process("bench", "report", str(folder), "-o", "report.pdf")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "must end in .html, .md or .svg" in done.stderr


def test_sparklines_scale_to_the_highest_value() -> None:
    """Zero is blank, the highest value is full, and no values are an empty line."""
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert sparkline([0.0, 0.0]) == "  "
    assert sparkline([]) == ""
