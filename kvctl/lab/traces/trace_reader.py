"""Format detection, and the reader of all formats that replay as prefixes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import zstandard

from kvcore.errors import SetupError
from kvctl.lab.config.workload_config import Trace
from kvctl.lab.traces import hash_id_jsonl as jsonl
from kvctl.lab.traces import length_csv as lengths
from kvctl.lab.traces import weka_trace as weka
from kvctl.lab.traces.trace_rows import TraceRow, raw_lines

HEAD_BYTES = 4096
SIGNS = {
    "bailian": rb'"parent_chat_id"',
    "ragpulse": rb'"passages_ids"|"sys_prompt"',
    "weka": rb'"requests"\s*:|"hash_id_scope"',
    "mooncake": rb'"hash_ids"',
    "azure": rb"ContextTokens",
    "burstgpt": rb"Request tokens",
}
"""Patterns of a file's first bytes, most specific first."""


def detect(path: Path) -> str:
    """Return the format of a trace, from its first bytes.

    Raises:
        SetupError: the file cannot be read, or has no known format.
    """
    if path.is_dir():
        return "ragpulse" if list(path.glob("0_trace.jsonl*")) else "weka"
    head = _head(path)
    if not head:
        raise SetupError(f"{path}: empty")
    for name, sign in SIGNS.items():
        if re.search(sign, head):
            return name
    raise SetupError(f"{path}: no known trace format; known are {', '.join(SIGNS)}")


def _head(path: Path) -> bytes:
    head = b""
    try:
        for line in raw_lines(path):
            head += line
            if len(head) >= HEAD_BYTES:
                break
        return head
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise SetupError(
            f"{path}: {getattr(error, 'strerror', None) or error}"
        ) from None


def read(trace: Trace) -> Iterator[TraceRow]:
    """Yield the rows of a trace.

    Raises:
        SetupError: with file, line and reason; or the format has no prefixes.
    """
    path = Path(trace.trace or "")
    name = detect(path) if trace.format == "auto" else trace.format
    match name:
        case "mooncake":
            return jsonl.read_mooncake(path, trace.block_size)
        case "bailian":
            return jsonl.read_bailian(path, trace.block_size)
        case "weka":
            return weka.read(path)
        case "azure" | "burstgpt":
            columns = lengths.AZURE if name == "azure" else lengths.BURSTGPT
            size = trace.block_size or lengths.BLOCK_SIZE
            return lengths.read(path, columns, trace.reuse, size)
        case _:
            raise SetupError(
                f"{path}: {name} has no prefixes; use a workload of kind documents "
                "(scenarios/rag_blend.toml)"
            )
