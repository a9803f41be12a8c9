"""The only module that prints.

Results go to stdout, errors and progress to stderr. On a terminal tables are drawn
and progress moves; elsewhere the same comes as plain lines without colour.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""
PLAIN_INTERVAL_S = 2.0
"""Between two progress lines where nothing can be redrawn."""
FRAME_WIDTH = 3
"""Columns of a terminal between two of a table."""
NAME_WIDTH = 30
"""A first column of names up to this long stays whole; all else folds to fit."""


class Table(Struct, frozen=True):
    """Rows of text under a title. A column named `>x` is aligned right, headed `x`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def line(text: str = "") -> None:
    """Print one line to stdout, now."""
    print(text, flush=True)


def error(text: str) -> None:
    """Print one line to stderr, where anybody hears it."""
    with suppress(OSError):
        print(" ".join(text.split()), file=sys.stderr, flush=True)


def show(*parts: Table | str) -> None:
    """Print tables and lines, one under another."""
    console = _console()
    plain = not console.is_terminal
    for part in parts:
        console.print(_drawn(part, console.width), highlight=False, soft_wrap=plain)


@contextmanager
def live(*parts: Table | str) -> Iterator[Callable[..., None]]:
    """Give a function that replaces what is shown; elsewhere it prints once more."""
    from rich.console import Group
    from rich.live import Live

    console = _console()
    if not console.is_terminal:
        yield show
        return

    def drawn(parts: Sequence[Table | str]) -> RenderableType:
        return Group(*(_drawn(part, console.width) for part in parts))

    with Live(drawn(parts), console=console, auto_refresh=False) as display:
        yield lambda *new: display.update(drawn(new), refresh=True)


@dataclass(slots=True)
class Progress:
    """Work under way. `update` may be called as often as one likes."""

    label: str
    clock: Callable[[], float] = time.monotonic
    _draw: Callable[[float, str], None] | None = None
    _next: float = field(default=0.0)

    def update(self, share: float, note: str = "") -> None:
        """Show how much is done, 0 to 1, and a few words."""
        if self._draw is not None:
            self._draw(share, note)
            return
        now = self.clock()
        if now >= self._next:
            self._next = now + PLAIN_INTERVAL_S
            error(f"{self.label} {share:4.0%} {note}")


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """Show progress on stderr for as long as the block runs."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield Progress(label)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(label, total=1.0, note="")
        yield Progress(
            label,
            _draw=lambda share, note: bars.update(task, completed=share, note=note),
        )


def bar(share: float, width: int = 30) -> str:
    """Draw a share of a whole, 0 to 1, as text."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return f"[{'#' * filled}{'.' * (width - filled)}] {share:.1%}"


SPARKS = " ▁▂▃▄▅▆▇█"


def spark(values: Sequence[float], width: int = 60) -> str:
    """Draw how values run, from nothing to the highest, in so many characters.

    Of more values than that, each character draws the highest of its share.
    """
    each = -(-len(values) // width) or 1
    values = [max(values[at : at + each]) for at in range(0, len(values), each)]
    top = max(values, default=0.0) or 1.0
    steps = len(SPARKS) - 1
    return "".join(SPARKS[round(max(0.0, value) / top * steps)] for value in values)


def many(number: int, noun: str) -> str:
    """Write a number of things: `1 rank`, `2,000 ranks`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(num_bytes: float) -> str:
    """Write a number of bytes for people: `1.5 GiB`."""
    if abs(num_bytes) < 1024:
        return f"{num_bytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} TiB"


def duration(seconds: float) -> str:
    """Write a duration with three digits: `12.3 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def _drawn(part: Table | str, width: int) -> RenderableType:
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    if isinstance(part, str):
        return Text(part)
    words = _longest_words(part)
    if sum(words) + FRAME_WIDTH * len(words) > width:
        part = _as_records(part)
        words = _longest_words(part)
    table = Drawn(
        title=part.title or None,
        title_justify="left",
        box=box.SIMPLE,
        show_header=any(name.removeprefix(">") for name in part.columns),
    )
    longest = max((len(row[0]) for row in part.rows), default=0)
    for place, name in enumerate(part.columns):
        table.add_column(
            name.removeprefix(">"),
            justify="right" if name.startswith(">") else "left",
            overflow="fold",
            no_wrap=place == 0 and longest <= NAME_WIDTH,
            min_width=min(words[place], width // 2),
        )
    for row in part.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _longest_words(table: Table) -> list[int]:
    """Return how narrow each column can be with no word broken but such as paths."""
    columns = zip(table.columns, *table.rows, strict=True)
    longest = (
        max((len(word) for cell in column for word in cell.split()), default=0)
        for column in columns
    )
    return [min(length, NAME_WIDTH) for length in longest]


def _as_records(table: Table) -> Table:
    """Turn rows that are too wide into a line a cell, with a gap after each row."""
    names = [name.removeprefix(">") for name in table.columns]
    rows: list[tuple[str, str]] = []
    for row in table.rows:
        rows += [("", "")] if rows else []
        rows += [(name, cell) for name, cell in zip(names, row, strict=True) if cell]
    return Table(table.title, ("", ""), tuple(rows))
