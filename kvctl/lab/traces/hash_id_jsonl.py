"""Mooncake's and Bailian's JSONL: one request per line, with chained block ids.

Mooncake: `timestamp` (ms), `input_length`, `output_length`, `hash_ids`, and in later
files `block_size` (tokens per id; 512) and `session_id`. Source: Qin et al., Mooncake,
FAST 2025, the traces published with it.

Bailian: `chat_id`, `parent_chat_id` (-1 for a first turn), `timestamp` (s),
`input_length`, `output_length`, `hash_ids` of 16-token blocks. Source:
alibaba-edu/qwen-bailian-usagetraces-anon; Wang et al., USENIX ATC 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from kvctl.lab.traces.trace_rows import MIN_BLOCK_SIZE, TraceRow, make_row, parse

MOONCAKE_BLOCK_SIZE = 512
BAILIAN_BLOCK_SIZE = 16
NO_PARENT = -1


class _RequestLine(msgspec.Struct, kw_only=True):
    input_length: Annotated[int, Meta(ge=1)]
    hash_ids: list[int]
    timestamp: Annotated[float, Meta(ge=0)] = 0.0
    output_length: Annotated[int, Meta(ge=0)] = 0

    def row(
        self, number: int, arrival_s: float, block_size: int, session_id: str | None
    ) -> TraceRow:
        return make_row(
            line=number,
            arrival_s=arrival_s,
            num_tokens=self.input_length,
            output_length=self.output_length,
            hash_ids=self.hash_ids,
            block_size=block_size,
            session_id=session_id,
        )


class _MooncakeLine(_RequestLine, kw_only=True):
    block_size: Annotated[int, Meta(ge=MIN_BLOCK_SIZE)] | None = None
    session_id: str | int | None = None


class _BailianLine(_RequestLine, kw_only=True):
    chat_id: int
    parent_chat_id: int = NO_PARENT


def read_mooncake(path: Path, block_size: int | None = None) -> Iterator[TraceRow]:
    """Yield the rows of a file; `block_size` (512) is for rows without one.

    Raises:
        SetupError: the file cannot be read, or a line is no request; with file, line
            number and reason.
    """
    decoder = msgspec.json.Decoder(_MooncakeLine)

    def row(text: bytes, number: int) -> TraceRow:
        line = decoder.decode(text)
        session = None if line.session_id is None else str(line.session_id)
        size = line.block_size or block_size or MOONCAKE_BLOCK_SIZE
        return line.row(number, line.timestamp / 1000, size, session)

    return parse(path, row)


def read_bailian(path: Path, block_size: int | None = None) -> Iterator[TraceRow]:
    """Yield the rows of a file; a session is named after its first chat.

    Raises:
        SetupError: the file cannot be read, or a line is no request; with file, line
            number and reason.
    """
    decoder = msgspec.json.Decoder(_BailianLine)
    roots: dict[int, int] = {}
    size = block_size or BAILIAN_BLOCK_SIZE

    def row(text: bytes, number: int) -> TraceRow:
        line = decoder.decode(text)
        parent = line.parent_chat_id
        # A parent from before the start of the trace is its own root.
        root = line.chat_id if parent == NO_PARENT else roots.get(parent, parent)
        roots[line.chat_id] = root
        return line.row(number, line.timestamp, size, str(root))

    return parse(path, row)
