"""Rows of a trace, and the lines of a plain or compressed file that they come from."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from kvcore.errors import SetupError

MAX_ID = 2**64 - 1
MIN_BLOCK_SIZE = 2
"""An id is encoded in the first two tokens of its block."""

TAIL_STREAM = np.uint64(0x9E3779B97F4A7C15)
TOKEN_STEP = np.uint64(0xD1342543DE82EF95)
"""Odd, so that consecutive tokens of a block differ (a Weyl sequence)."""

Ids = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request; `hash_ids` are the unchanged 64-bit ids of the trace."""

    line: int
    arrival_s: float
    num_tokens: int
    output_length: int
    hash_ids: Ids
    block_size: int
    session_id: str | None

    def tokens(self) -> Tokens:
        """Return token ids of the prompt, `[num_tokens]`.

        Blocks are equal exactly when their ids are. Tokens after the last id, in
        traces with ids of whole blocks only, are unique to this row.
        """
        made = block_tokens(self.hash_ids, self.block_size).reshape(-1)
        missing = self.num_tokens - made.size
        if missing <= 0:
            return made[: self.num_tokens]
        own = np.array([self.line], np.uint64) * TAIL_STREAM
        return np.concatenate((made, block_tokens(own, max(missing, 2))[0, :missing]))


def block_tokens(ids: Ids, block_size: int) -> Tokens:
    """Return tokens of ids, `[ids, block_size]`; different ids differ."""
    steps = np.arange(block_size, dtype=np.uint64) * TOKEN_STEP
    mixed = (ids[:, None] * TAIL_STREAM + steps) >> np.uint64(32)
    tokens = mixed.astype(np.uint32)
    tokens[:, 0] = ids & np.uint64(0xFFFFFFFF)
    tokens[:, 1] = ids >> np.uint64(32)
    return tokens


def make_row(
    line: int,
    arrival_s: float,
    num_tokens: int,
    output_length: int,
    hash_ids: list[int],
    block_size: int,
    session_id: str | None,
) -> TraceRow:
    """Return a row.

    Raises:
        ValueError: the number of ids does not fit, or an id exceeds 64 bits.
    """
    named = len(hash_ids)
    if not num_tokens // block_size <= named <= -(-num_tokens // block_size):
        raise ValueError(
            f"input_length {num_tokens} is {num_tokens / block_size:.1f} blocks of "
            f"{block_size}, hash_ids has {named}"
        )
    if hash_ids and not 0 <= min(hash_ids) <= max(hash_ids) <= MAX_ID:
        raise ValueError("hash_ids must lie in 0..2**64-1")
    ids = np.array(hash_ids, np.uint64)
    return TraceRow(
        line, arrival_s, num_tokens, output_length, ids, block_size, session_id
    )


# -- lines -----------------------------------------------------------------------

READ_BYTES = 1 << 20

T = TypeVar("T")


def parse(path: Path, parse_line: Callable[[bytes, int], T | None]) -> Iterator[T]:
    """Yield the parsed lines of a plain, `.gz` or `.zst` file.

    `parse_line` gets a line and its number, from 1. Blank lines, and lines for which
    it returns None, are skipped.

    Raises:
        SetupError: the file cannot be read, or `parse_line` raised `ValueError`; with
            file, line number and reason.
    """
    number = 0
    try:
        for text in raw_lines(path):
            number += 1
            if text and not text.isspace():
                parsed = parse_line(text, number)
                if parsed is not None:
                    yield parsed
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise SetupError(f"{path}:{number}: {error}") from None
    except (OSError, EOFError, zstandard.ZstdError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"{path}: {reason}, after line {number}") from None


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the unparsed lines of a file."""
    if path.suffix == ".zst":
        with path.open("rb") as file:
            yield from _split(_inflate(file))
    else:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file


def _inflate(file: BinaryIO) -> Iterator[bytes]:
    """Decompress all frames; zstandard's reader accepts a truncated file as complete.

    Raises:
        EOFError: the file ends inside a frame.
    """
    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    while data := file.read(READ_BYTES):
        while data:
            yield frame.decompress(data)
            inside, data = not frame.eof, frame.unused_data
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise EOFError("the file ends inside a zstd frame")


def _split(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for data in blocks:
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest
