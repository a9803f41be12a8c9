"""Lines of a trace file, plain or compressed, and where a bad one is."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import zstandard

from kvcore.errors import SetupError

READ_BYTES = 1 << 20

T = TypeVar("T")


def parse(path: Path, parse_line: Callable[[bytes, int], T | None]) -> Iterator[T]:
    """Stream what each line of a plain, `.gz` or `.zst` file says.

    `parse_line` gets a line and its number, from 1; a line for which it returns None
    says nothing, and blank ones are skipped.

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
    """Stream the lines of a file as they are."""
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
