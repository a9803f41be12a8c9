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
from itertools import count, islice
from pathlib import Path

import numpy as np

from kvctl.lab.config.workload_config import Reuse
from kvctl.lab.traces.trace_rows import TraceRow, parse

BLOCK_SIZE = 64
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
MICROSECOND_DIGITS = 6
FIRST_ID = (1 << 32) + 1
"""First id of a block outside the system prompt."""
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
    return _extend_prompts(lengths(path, columns), reuse, block_size)


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


def _extend_prompts(
    lines: Iterator[Length], reuse: Reuse, block_size: int
) -> Iterator[TraceRow]:
    """Generate block ids; the prompt of a session begins with its previous one."""
    rng = np.random.default_rng(0)
    new_ids = count(FIRST_ID)
    shared_blocks = reuse.system_tokens // block_size
    sessions: list[tuple[str, list[int]]] = []
    for line in lines:
        num_blocks = line.num_tokens // block_size
        name, known = str(line.line), [*range(1, 1 + min(shared_blocks, num_blocks))]
        if rng.random() < reuse.share:
            lengths = [len(ids) for _, ids in sessions]
            shorter = [at for at, length in enumerate(lengths) if length < num_blocks]
            if shorter:
                name, known = sessions.pop(int(rng.choice(shorter)))
        ids = known + list(islice(new_ids, num_blocks - len(known)))
        sessions.append((name, ids))
        del sessions[: -reuse.sessions]
        yield TraceRow(
            line=line.line,
            arrival_s=line.arrival_s,
            num_tokens=line.num_tokens,
            output_length=line.output_length,
            hash_ids=np.array(ids, np.uint64),
            block_size=block_size,
            session_id=name,
        )
