"""Azure's and BurstGPT's CSV: arrival times and lengths of requests.

They do not record shared prefixes: a generator selects the prompts to continue.
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
from kvctl.lab.traces.trace_rows import TraceRow, parse

BLOCK_SIZE = 64
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
MICROSECOND_DIGITS = 6
SHOWN_CHARACTERS = 100
"""Limit of a wrong header in messages; lines of other formats may be long."""


@dataclass(frozen=True, slots=True)
class Length:
    """One line: arrival time and tokens."""

    line: int
    arrival_s: float
    num_tokens: int
    output_length: int


def read(
    path: Path, columns: Sequence[str], reuse: Reuse, block_size: int = BLOCK_SIZE
) -> Iterator[TraceRow]:
    """Yield rows whose prompts continue earlier ones according to `reuse`.

    Times count from the first line. The generator has a fixed seed: a trace always
    yields the same rows.

    Raises:
        SetupError: with file, line number and reason.
    """
    return _PrefixGenerator(reuse, block_size).rows(lengths(path, columns))


def lengths(path: Path, columns: Sequence[str]) -> Iterator[Length]:
    """Yield the lines; requests without a prompt are skipped."""
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
    """Parse seconds, or a date and time with up to seven decimals (Azure)."""
    if "-" not in text:
        return float(text)
    whole, _, decimals = text.partition(".")
    moment = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return moment.timestamp() + float(f"0.{decimals[:MICROSECOND_DIGITS] or 0}")


class _PrefixGenerator:
    """Generates block ids; the prompt of a session begins with its previous one."""

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
            ids = known + [self._new_id() for _ in range(num_blocks - len(known))]
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
        """Return the index of a random session with a shorter prompt, if any."""
        if self._rng.random() >= self._reuse.share:
            return None
        shorter = [
            at for at, (_, ids) in enumerate(self._open) if len(ids) < num_blocks
        ]
        return int(self._rng.choice(shorter)) if shorter else None

    def _system(self, num_blocks: int) -> list[int]:
        shared = self._reuse.system_tokens // self._block_size
        return list(range(1, 1 + min(shared, num_blocks)))

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id
