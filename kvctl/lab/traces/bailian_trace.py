"""Bailian's JSONL: one request a line, chats linked by the turn before.

Fields: `chat_id`, `parent_chat_id` (-1 for a first turn), `timestamp` (s), `turn`,
`input_length`, `output_length`, `type`, `hash_ids` of 16-token blocks.
Source: alibaba-edu/qwen-bailian-usagetraces-anon; Wang et al., USENIX ATC 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from kvctl.lab.traces.trace_lines import parse
from kvctl.lab.traces.trace_row import TraceRow, make_row

BLOCK_SIZE = 16
NO_PARENT = -1


class _BailianLine(msgspec.Struct):
    chat_id: int
    input_length: Annotated[int, Meta(ge=1)]
    hash_ids: list[int]
    timestamp: Annotated[float, Meta(ge=0)] = 0.0
    parent_chat_id: int = NO_PARENT
    output_length: Annotated[int, Meta(ge=0)] = 0


def read(path: Path, block_size: int = BLOCK_SIZE) -> Iterator[TraceRow]:
    """Stream the rows; a session is named after its first chat.

    Raises:
        SetupError: with file, line number and reason.
    """
    decoder = msgspec.json.Decoder(_BailianLine)
    roots: dict[int, int] = {}

    def row(text: bytes, number: int) -> TraceRow:
        line = decoder.decode(text)
        parent = line.parent_chat_id
        # A parent from before the trace's begin stands for itself.
        root = line.chat_id if parent == NO_PARENT else roots.get(parent, parent)
        roots[line.chat_id] = root
        return make_row(
            line=number,
            arrival_s=line.timestamp,
            num_tokens=line.input_length,
            output_length=line.output_length,
            hash_ids=line.hash_ids,
            block_size=block_size,
            session_id=str(root),
        )

    return parse(path, row)
