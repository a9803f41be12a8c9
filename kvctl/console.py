"""The only module that prints.

Results go to stdout, errors and progress to stderr. On a terminal, tables are drawn
and progress is redrawn; elsewhere both are plain lines without colour.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from kvcore.errors import SetupError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_WIDTH = 160
"""Width of output to a file or a pipe, in characters."""
PLAIN_INTERVAL_S = 2.0
"""Between two progress lines of a stream that is no terminal."""
SVG_WIDTH = 100
"""Width of a picture of a terminal, in characters."""
FRAME_WIDTH = 3
"""Characters between two columns of a table."""
NAME_WIDTH = 30
"""A first column up to this wide is not folded; other columns are."""


class Table(Struct, frozen=True):
    """Rows of text under a title, rendered by console, Markdown and HTML pages.

    A column `>x` is right-aligned under the head `x`.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table as Markdown under its title."""
        heads = [name.removeprefix(">") for name in self.columns]
        rules = ["---:" if name.startswith(">") else "---" for name in self.columns]
        lines = [_markdown_row(cells) for cells in (heads, rules, *self.rows)]
        return "\n".join([self.title, "", *lines] if self.title else lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def markdown(*parts: Table | str) -> str:
    """Return tables and paragraphs as Markdown."""
    return "\n\n".join(
        part.markdown() if isinstance(part, Table) else part for part in parts
    )


def line(text: str = "") -> None:
    """Print one line to stdout and flush."""
    print(text, flush=True)


def error(text: str) -> None:
    """Print one line to stderr; a closed stderr is ignored."""
    with suppress(OSError):
        print(" ".join(text.split()), file=sys.stderr, flush=True)


def show(*parts: Table | str) -> None:
    """Print tables and lines."""
    console = _console()
    plain = not console.is_terminal
    for part in parts:
        console.print(_drawn(part, console.width), highlight=False, soft_wrap=plain)


@contextmanager
def live(*parts: Table | str) -> Iterator[Callable[..., None]]:
    """Yield a function that redraws a terminal; without a terminal it prints again."""
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
    """Progress of one operation; `update` may be called at any rate."""

    label: str
    clock: Callable[[], float] = time.monotonic
    _draw: Callable[[float, str], None] | None = None
    _next: float = field(default=0.0)

    def update(self, share: float, note: str = "") -> None:
        """Show the completed share, 0 to 1, and a note."""
        if self._draw is not None:
            self._draw(share, note)
            return
        now = self.clock()
        if now >= self._next:
            self._next = now + PLAIN_INTERVAL_S
            error(f"{self.label} {share:4.0%} {note}")


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """Show progress on stderr while the block runs."""
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
    """Return a share, 0 to 1, as a text bar."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return f"[{'#' * filled}{'.' * (width - filled)}] {share:.1%}"


SPARKS = " ▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Return values as block characters, scaled to the highest value.

    With more values than `width`, each character shows the maximum of its share.
    """
    each = -(-len(values) // width) or 1
    values = [max(values[at : at + each]) for at in range(0, len(values), each)]
    top = max(values, default=0.0) or 1.0
    steps = len(SPARKS) - 1
    return "".join(SPARKS[round(max(0.0, value) / top * steps)] for value in values)


def plural(number: int, noun: str) -> str:
    """Return `1 rank`, `2,000 ranks`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(num_bytes: float) -> str:
    """Return a number of bytes with its unit: `1.5 GiB`."""
    if abs(num_bytes) < 1024:
        return f"{num_bytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a duration with three digits: `12.3 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def save_svg(path: Path, title: str, *parts: Table | str) -> None:
    """Write tables and lines as an SVG picture of a terminal.

    Raises:
        SetupError: the file cannot be written.
    """
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console

    # No fonts from elsewhere: the picture works offline and asks no other host.
    style = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    with Path(os.devnull).open("w") as sink:
        console = Console(record=True, width=SVG_WIDTH, file=sink)
        for part in parts:
            console.print(_drawn(part, console.width), highlight=False)
        picture = console.export_svg(title=title, code_format=style)
    write_text(path, picture)


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        SetupError: the file cannot be written.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from None


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
    """Return the narrowest width of each column that breaks no word but long paths."""
    columns = zip(table.columns, *table.rows, strict=True)
    longest = (
        max((len(word) for cell in column for word in cell.split()), default=0)
        for column in columns
    )
    return [min(length, NAME_WIDTH) for length in longest]


def _as_records(table: Table) -> Table:
    """Return rows that are too wide as one line per cell, rows separated by a gap."""
    names = [name.removeprefix(">") for name in table.columns]
    rows: list[tuple[str, str]] = []
    for row in table.rows:
        rows += [("", "")] if rows else []
        rows += [(name, cell) for name, cell in zip(names, row, strict=True) if cell]
    return Table(table.title, ("", ""), tuple(rows))
