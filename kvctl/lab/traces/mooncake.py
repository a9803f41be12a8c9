"""Mooncake's JSONL: one request a line, its prompt as ids of chained token blocks.

Fields: `timestamp` (ms), `input_length`, `output_length`, `hash_ids`; then, as later
users of the format added them, `block_size` (tokens an id; 512) and `session_id`.
Source: Qin et al., Mooncake, FAST 2025, the traces published with it.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard
from msgspec import Meta

from kvcore.errors import SetupError

MAX_ID = 2**64 - 1
MIN_BLOCK_SIZE = 2
"""An id is spelled out in a block's first two tokens."""

TAIL_STREAM = np.uint64(0x9E3779B97F4A7C15)
TOKEN_STEP = np.uint64(0xD1342543DE82EF95)
"""Odd, so that consecutive tokens of a block differ (a Weyl sequence)."""

READ_BYTES = 1 << 20

Ids = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.uint32]


class _Line(msgspec.Struct):
    input_length: Annotated[int, Meta(ge=1)]
    hash_ids: list[int]
    timestamp: Annotated[float, Meta(ge=0)] = 0.0
    output_length: Annotated[int, Meta(ge=0)] = 0
    block_size: Annotated[int, Meta(ge=MIN_BLOCK_SIZE)] | None = None
    session_id: str | int | None = None


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request. Ids are the trace's own, all 64 bits of them."""

    line: int
    arrival_s: float
    num_tokens: int
    output_length: int
    hash_ids: Ids
    block_size: int
    session_id: str | None

    def tokens(self) -> Tokens:
        """Make the prompt's token ids, `[num_tokens]`.

        Blocks are equal exactly when their ids are; tokens after the last id (some
        traces name whole blocks only) are this row's alone.
        """
        made = block_tokens(self.hash_ids, self.block_size).reshape(-1)
        missing = self.num_tokens - made.size
        if missing <= 0:
            return made[: self.num_tokens]
        own = np.array([self.line], np.uint64) * TAIL_STREAM
        return np.concatenate((made, block_tokens(own, max(missing, 2))[0, :missing]))


def block_tokens(ids: Ids, block_size: int) -> Tokens:
    """Spell ids as tokens, `[ids, block_size]`, different ids differently."""
    steps = np.arange(block_size, dtype=np.uint64) * TOKEN_STEP
    mixed = (ids[:, None] * TAIL_STREAM + steps) >> np.uint64(32)
    tokens = mixed.astype(np.uint32)
    tokens[:, 0] = ids & np.uint64(0xFFFFFFFF)
    tokens[:, 1] = ids >> np.uint64(32)
    return tokens


def read(path: Path, block_size: int) -> Iterator[TraceRow]:
    """Stream the rows of a plain, `.gz` or `.zst` file; blank lines are skipped.

    `block_size` counts for rows that name none.

    Raises:
        SetupError: the file cannot be read, or a line is no request; with file, line
            number and reason.
    """
    decoder = msgspec.json.Decoder(_Line)
    number = 0
    try:
        for text in _lines(path):
            number += 1
            if text and not text.isspace():
                yield _row(decoder.decode(text), number, block_size)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise SetupError(f"{path}:{number}: {error}") from None
    except (OSError, EOFError, zstandard.ZstdError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"{path}: {reason}, after line {number}") from None


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        with path.open("rb") as file:
            yield from _split(_inflate(file))
    else:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file


def _inflate(file: BinaryIO) -> Iterator[bytes]:
    """Decompress frame after frame; zstandard's own reader takes a cut file for whole.

    Raises:
        EOFError: the file ends inside a frame.
    """
    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    while piece := file.read(READ_BYTES):
        while piece:
            yield frame.decompress(piece)
            inside, piece = not frame.eof, frame.unused_data
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise EOFError("the file ends inside a zstd frame")


def _split(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _row(line: _Line, number: int, default_block_size: int) -> TraceRow:
    """Build a row; `ValueError` says what cannot be right."""
    block_size = line.block_size or default_block_size
    named, length = len(line.hash_ids), line.input_length
    if not length // block_size <= named <= -(-length // block_size):
        raise ValueError(
            f"input_length {length} is {length / block_size:.1f} blocks of "
            f"{block_size}, hash_ids has {named}"
        )
    if line.hash_ids and not 0 <= min(line.hash_ids) <= max(line.hash_ids) <= MAX_ID:
        raise ValueError("hash_ids must lie in 0..2**64-1")
    return TraceRow(
        line=number,
        arrival_s=line.timestamp / 1000,
        num_tokens=length,
        output_length=line.output_length,
        hash_ids=np.array(line.hash_ids, np.uint64),
        block_size=block_size,
        session_id=None if line.session_id is None else str(line.session_id),
    )
