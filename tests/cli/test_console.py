"""Layout of tables by the width of the terminal."""

from __future__ import annotations

import pytest

from kvctl import console

WIDE = console.Table(
    "registrations",
    ("instance", "model", ">rank"),
    (("1.aa-0/0", "llama/1@1.aa", "0 of 1"), ("1.aa-0/1", "llama/1@1.aa", "")),
)


def shown(capsys: pytest.CaptureFixture[str], width: int) -> list[str]:
    """Return the lines of the table on a terminal of this width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "PLAIN_WIDTH", width)
        console.show(WIDE)
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_a_table_with_room_for_its_words_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line per row."""
    lines = shown(capsys, 60)
    assert "1.aa-0/0   llama/1@1.aa   0 of 1" in lines


def test_rows_that_are_too_wide_have_one_line_per_cell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No word is broken, and empty cells are omitted."""
    lines = shown(capsys, 32)
    assert lines[:2] == ["registrations", ""]
    assert [line.split() for line in lines[2:-1]] == [
        ["instance", "1.aa-0/0"],
        ["model", "llama/1@1.aa"],
        ["rank", "0", "of", "1"],
        [],
        ["instance", "1.aa-0/1"],
        ["model", "llama/1@1.aa"],
    ]


def test_a_long_path_is_folded_and_its_row_stays_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A path wider than the terminal is folded; other cells stay on one line."""
    row = ("gone", "down", f"unix:///{'a-folder/' * 12}socket: no such file")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "PLAIN_WIDTH", 80)
        console.show(console.Table("tiers", ("tier", "state", "last error"), (row,)))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["gone", "down"] for line in lines)
