"""Azure's and BurstGPT's CSV: when requests came and how long they were.

What they shared is not told: a generator decides who continues whose prompt.
Sources: Azure/AzurePublicDataset (Patel et al., Splitwise, ISCA 2024), columns
`TIMESTAMP`, `ContextTokens`, `GeneratedTokens`; HPMLL/BurstGPT (Wang et al., 2024),
columns `Timestamp` (s), `Request tokens`, `Response tokens`, `Session ID` in some.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from kvctl.lab.config.workload_config import Reuse
from kvctl.lab.traces.trace_lines import parse
from kvctl.lab.traces.trace_row import TraceRow

BLOCK_SIZE = 64
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
MICROSECOND_DIGITS = 6
SHOWN_CHARACTERS = 100
"""Of a header that is none; a line of another format may be a long one."""


@dataclass(frozen=True, slots=True)
class Length:
    """One line: when, and how many tokens."""

    line: int
    arrival_s: float
    num_tokens: int
    output_length: int


def read(
    path: Path, columns: Sequence[str], reuse: Reuse, block_size: int = BLOCK_SIZE
) -> Iterator[TraceRow]:
    """Stream rows whose prompts continue earlier ones as `reuse` says.

    Times count from the first line. What is continued is drawn with a fixed seed, so a
    trace reads the same each time.

    Raises:
        SetupError: with file, line number and reason.
    """
    return _Sharing(reuse, block_size).rows(lengths(path, columns))


def lengths(path: Path, columns: Sequence[str]) -> Iterator[Length]:
    """Stream the lines; requests without a prompt are left out."""
    places: list[int] = []
    first: list[float] = []

    def length(text: bytes, number: int) -> Length | None:
        cells = next(csv.reader([text.decode("utf-8-sig").rstrip("\r\n")]))
        if not places:
            places.extend(_places(cells, columns))
            return None
        if len(cells) <= max(places):
            raise ValueError(f"{len(cells)} columns, the header has more")
        when, num_tokens, output = (cells[place] for place in places)
        at_s = _seconds(when)
        first.append(at_s) if not first else None
        if not int(num_tokens):
            return None
        return Length(number, at_s - first[0], int(num_tokens), int(output))

    return parse(path, length)


def _places(header: list[str], columns: Sequence[str]) -> list[int]:
    missing = [name for name in columns if name not in header]
    if missing:
        shown = ",".join(header)[:SHOWN_CHARACTERS]
        raise ValueError(f"the header lacks {', '.join(missing)}: {shown}")
    return [header.index(name) for name in columns]


def _seconds(text: str) -> float:
    """Read seconds, or a date and time; Azure's have seven digits of a second."""
    if "-" not in text:
        return float(text)
    whole, _, decimals = text.partition(".")
    moment = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return moment.timestamp() + float(f"0.{decimals[:MICROSECOND_DIGITS] or 0}")


class _Sharing:
    """Makes up block ids. A session's prompt grows: the next turn begins with it."""

    def __init__(self, reuse: Reuse, block_size: int) -> None:
        self._reuse = reuse
        self._block_size = block_size
        self._rng = np.random.default_rng(0)
        self._next_id = 1 << 32
        self._open: list[tuple[str, list[int]]] = []

    def rows(self, source: Iterator[Length]) -> Iterator[TraceRow]:
        for length in source:
            num_blocks = length.num_tokens // self._block_size
            place = self._continued(num_blocks)
            if place is None:
                name, known = str(length.line), self._system(num_blocks)
            else:
                name, known = self._open.pop(place)
            ids = known + [self._fresh() for _ in range(num_blocks - len(known))]
            self._open.append((name, ids))
            del self._open[: -self._reuse.sessions]
            yield TraceRow(
                line=length.line,
                arrival_s=length.arrival_s,
                num_tokens=length.num_tokens,
                output_length=length.output_length,
                hash_ids=np.array(ids, np.uint64),
                block_size=self._block_size,
                session_id=name,
            )

    def _continued(self, num_blocks: int) -> int | None:
        """Draw one of the open sessions that are shorter than this prompt."""
        if self._rng.random() >= self._reuse.share:
            return None
        shorter = [
            at for at, (_, ids) in enumerate(self._open) if len(ids) < num_blocks
        ]
        return int(self._rng.choice(shorter)) if shorter else None

    def _system(self, num_blocks: int) -> list[int]:
        shared = self._reuse.system_tokens // self._block_size
        return list(range(1, 1 + min(shared, num_blocks)))

    def _fresh(self) -> int:
        self._next_id += 1
        return self._next_id
