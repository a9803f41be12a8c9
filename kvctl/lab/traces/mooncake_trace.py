"""Mooncake's JSONL: one request a line, its prompt as ids of chained token blocks.

Fields: `timestamp` (ms), `input_length`, `output_length`, `hash_ids`; then, as later
users of the format added them, `block_size` (tokens an id; 512) and `session_id`.
Source: Qin et al., Mooncake, FAST 2025, the traces published with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from kvctl.lab.traces.trace_lines import parse
from kvctl.lab.traces.trace_row import MIN_BLOCK_SIZE, TraceRow, block_tokens, make_row

__all__ = ["BLOCK_SIZE", "TraceRow", "block_tokens", "read"]

BLOCK_SIZE = 512


class _MooncakeLine(msgspec.Struct):
    input_length: Annotated[int, Meta(ge=1)]
    hash_ids: list[int]
    timestamp: Annotated[float, Meta(ge=0)] = 0.0
    output_length: Annotated[int, Meta(ge=0)] = 0
    block_size: Annotated[int, Meta(ge=MIN_BLOCK_SIZE)] | None = None
    session_id: str | int | None = None


def read(path: Path, block_size: int = BLOCK_SIZE) -> Iterator[TraceRow]:
    """Stream the rows of a plain, `.gz` or `.zst` file; blank lines are skipped.

    `block_size` counts for rows that name none.

    Raises:
        SetupError: the file cannot be read, or a line is no request; with file, line
            number and reason.
    """
    decoder = msgspec.json.Decoder(_MooncakeLine)

    def row(text: bytes, number: int) -> TraceRow:
        line = decoder.decode(text)
        return make_row(
            line=number,
            arrival_s=line.timestamp / 1000,
            num_tokens=line.input_length,
            output_length=line.output_length,
            hash_ids=line.hash_ids,
            block_size=line.block_size or block_size,
            session_id=None if line.session_id is None else str(line.session_id),
        )

    return parse(path, row)
