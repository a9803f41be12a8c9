"""Results from files to what people read: a page, Markdown, tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvcore.errors import SetupError
from kvctl.console import Table
from kvctl.lab.compare import comparison_tables as tables
from kvctl.lab.compare.comparison import COMPARISON, Comparison, compare, gather
from kvctl.lab.compare.paired_runs import BASE, NEW
from kvctl.lab.page.html_page import MAX_SIDES, render
from kvctl.lab.page.run_group import RunGroup
from kvctl.lab.report import result_tables as report


@dataclass(frozen=True, slots=True)
class Collection:
    """Sides, and the first one compared with each other."""

    sides: Sequence[RunGroup]
    comparisons: Sequence[Comparison]


def collect(paths: Sequence[Path]) -> Collection:
    """Read results; a folder of `bench run --versus` holds two sides.

    Raises:
        SetupError: a file cannot be read, or there are more sides than colours.
    """
    named: list[tuple[str, Path]] = []
    for path in paths:
        if (path / COMPARISON).exists():
            labels = _labels(path / COMPARISON)
            named += zip(labels, (path / BASE, path / NEW), strict=True)
        else:
            named.append((_label(path), path))
    if len(named) > MAX_SIDES:
        raise SetupError(f"{len(named)} sides: a page shows {MAX_SIDES} at most")
    read = [(label, gather(path)) for label, path in named]
    sides = [
        RunGroup.of(label, place, runs) for place, (label, runs) in enumerate(read)
    ]
    comparisons = [
        compare(read[0][1], runs, (read[0][0], label), anyway=True)
        for label, runs in read[1:]
    ]
    return Collection(sides, comparisons)


def _label(path: Path) -> str:
    """Name a side after its file or folder, without the time that a file names."""
    return path.name if path.is_dir() else path.stem.partition("-2")[0]


def _labels(path: Path) -> tuple[str, str]:
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=Comparison)
    except (OSError, msgspec.MsgspecError) as error:
        raise SetupError(f"{path}: not a comparison: {error}") from None
    return saved.base.label, saved.new.label


def write(collection: Collection, path: Path) -> None:
    """Write the page.

    Raises:
        SetupError: the file cannot be written.
    """
    try:
        path.write_text(render(collection.sides, collection.comparisons))
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from None


def parts(collection: Collection) -> Iterator[Table | str]:
    """Render for `console.show`."""
    for side in collection.sides:
        yield from report.parts(side.typical)
    for comparison in collection.comparisons:
        yield from tables.parts(comparison)


def markdown(collection: Collection) -> str:
    """Write Markdown: the comparisons, then each side's tables."""
    lines = [tables.markdown(one) for one in collection.comparisons]
    for side in collection.sides:
        lines.append(f"## {side.label}")
        lines += [
            f"{part.title}\n\n" + "\n".join(tables.table(part))
            if isinstance(part, Table)
            else part
            for part in report.parts(side.typical)
        ]
    return "\n\n".join(lines)
