"""RAGPulse's folder: requests as lists of contents, and tables of their lengths.

`0_trace.jsonl` has one request per line: `timestamp` (s), `output_length`,
`session_id`, and `hash_ids` with the contents of each kind in prompt order. Five tables
hold the tokens per content. Contents are not chained: a passage is equal at any
position. Source: flashserve/RAGPulse (Wang et al., 2025), one week of a
university's question answering. Lines are not ordered by time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvcore.errors import SetupError
from kvctl.lab.traces.trace_rows import parse

TABLES = {
    "sys_prompt": ("1_sys_prompt", "sys_prompt_id"),
    "passages_ids": ("2_passages", "passage_id"),
    "history": ("3_history", "history_id"),
    "web_search": ("5_web_search", "web_search_id"),
    "user_input": ("4_user_input", "user_input_id"),
}
"""Kind in `hash_ids` to its table and that table's key, in the order of a prompt."""

KIND_SHIFT = 32


class _RagPulseLine(msgspec.Struct):
    timestamp: str
    hash_ids: dict[str, list[int]]
    session_id: str
    output_length: Annotated[int, Meta(ge=0)] = 0


@dataclass(frozen=True, slots=True)
class Content:
    """Tokens that are equal at any position; `id` is unique in a trace."""

    id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RagPulseRow:
    """One request; its prompt is the concatenation of its contents."""

    line: int
    arrival_s: float
    output_length: int
    session_id: str
    contents: tuple[Content, ...]


def read(folder: Path) -> list[RagPulseRow]:
    """Return a whole trace, ordered by time; a file stands for its folder.

    Raises:
        SetupError: with file, line and reason.
    """
    folder = folder.parent if folder.is_file() else folder
    lengths = {
        kind: _read_table(folder, stem, key) for kind, (stem, key) in TABLES.items()
    }
    decoder = msgspec.json.Decoder(_RagPulseLine)

    def row(text: bytes, number: int) -> RagPulseRow:
        line = decoder.decode(text)
        return RagPulseRow(
            number,
            float(line.timestamp),
            line.output_length,
            line.session_id,
            tuple(_contents(line.hash_ids, lengths)),
        )

    rows = parse(_find(folder, "0_trace"), row)
    return sorted(rows, key=lambda row: row.arrival_s)


def _contents(
    ids: Mapping[str, list[int]], lengths: Mapping[str, Mapping[int, int]]
) -> Iterator[Content]:
    """Yield the contents of a prompt.

    Raises:
        ValueError: a content has no length.
    """
    for number, kind in enumerate(TABLES):
        known = lengths[kind]
        for one in ids.get(kind, ()):
            if one not in known:
                raise ValueError(f"{kind} {one} is not in {TABLES[kind][0]}")
            yield Content(number << KIND_SHIFT | one, known[one])


def _read_table(folder: Path, stem: str, key: str) -> dict[int, int]:
    decoder = msgspec.json.Decoder(dict[str, int])

    def entry(text: bytes, number: int) -> tuple[int, int]:
        del number
        line: dict[str, Any] = decoder.decode(text)
        if key not in line or line.get("token_length", -1) < 0:
            raise ValueError(f"needs {key} and token_length")
        return line[key], line["token_length"]

    return dict(parse(_find(folder, stem), entry))


def _find(folder: Path, stem: str) -> Path:
    found = sorted(folder.glob(f"{stem}.jsonl*"))
    if not found:
        raise SetupError(f"{folder}: no {stem}.jsonl; a RAGPulse trace has one")
    return found[0]
