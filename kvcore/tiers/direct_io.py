"""Records in files, read and written past the page cache where that is possible.

A record in a file is a page with the header, the payload, and zeros up to a whole
page. One `preadv` or `pwritev` moves it between the file and L1's own pages.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from enum import Enum, auto
from pathlib import Path

import numpy as np

from kvcore.extents import Buffers, Checksum
from kvcore.tiers.backend import Deadline
from kvcore.tiers.tier import (
    HEADER_BYTES,
    LoadItem,
    StoreItem,
    num_bytes_of,
    pack_header,
    read_header,
)

PAGE = 4096
"""Alignment that O_DIRECT asks of any disk: addresses, lengths, offsets."""
_MAX_VECTORS = 1024
"""IOV_MAX."""
_MAX_MOVE = 64 << 20
"""Bytes a system call: the deadline is looked at in between."""

Transfer = Callable[[int, list[memoryview], int], int]
"""`os.preadv` or `os.pwritev`: descriptor, buffers, offset; bytes moved."""


class Mode(Enum):
    """How a file system lets its files be opened."""

    DIRECT = auto()
    BUFFERED = auto()


def probe(directory: Path) -> Mode:
    """Find out whether files here can be opened with O_DIRECT; raises `OSError`."""
    path = directory / f".probe-{os.getpid()}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return Mode.BUFFERED  # tmpfs and some network file systems
    finally:
        path.unlink(missing_ok=True)
    return Mode.DIRECT


def file_bytes(num_bytes: int) -> int:
    """Bytes that the record of a part of `num_bytes` takes."""
    return PAGE + -(-num_bytes // PAGE) * PAGE


def write_record(path: Path, blob: StoreItem, mode: Mode, deadline: Deadline) -> None:
    """Write a new file; raises `OSError` and `DeadlineExceeded`."""
    edge = _edge()
    edge[:HEADER_BYTES] = pack_header(blob)
    edge[HEADER_BYTES:] = bytes(2 * PAGE - HEADER_BYTES)
    vectors, tail = _vectors(blob.buffers, edge)
    edge[PAGE : PAGE + len(tail)] = tail
    fd = os.open(
        path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _flags(vectors, mode), 0o600
    )
    try:
        if _move(os.pwritev, fd, vectors, deadline) != _total(vectors):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def read_record(
    path: Path, slot: LoadItem, mode: Mode, deadline: Deadline
) -> Checksum | None:
    """Fill a slot from a file; None when the file is not that slot's whole record.

    Raises `OSError` and `DeadlineExceeded`.
    """
    edge = _edge()
    vectors, tail = _vectors(slot.buffers, edge)
    fd = os.open(path, os.O_RDONLY | _flags(vectors, mode))
    try:
        size = file_bytes(num_bytes_of(slot.buffers))
        if os.fstat(fd).st_size != size:
            return None
        if _move(os.preadv, fd, vectors, deadline) != size:
            return None
    finally:
        os.close(fd)
    tail[:] = edge[PAGE : PAGE + len(tail)]
    return read_header(edge, slot)


_local = threading.local()


def _edge() -> memoryview:
    """Two aligned pages of this thread: for the header, and for the payload's end."""
    if not hasattr(_local, "edge"):
        _local.edge = memoryview(mmap.mmap(-1, 2 * PAGE))
    edge: memoryview = _local.edge
    return edge


def _vectors(buffers: Buffers, edge: memoryview) -> tuple[list[memoryview], memoryview]:
    """Return what is moved, whole pages together, and an end that is copied apart.

    Where only the last buffer has an end that fills no page, that end goes through
    `edge`, so that all the memory is aligned. Otherwise padding follows the buffers.
    """
    padding = -num_bytes_of(buffers) % PAGE
    if any(buffer.nbytes % PAGE for buffer in buffers[:-1]):
        return [edge[:PAGE], *buffers, edge[PAGE : PAGE + padding]], edge[:0]
    last = buffers[-1]
    whole = last.nbytes - last.nbytes % PAGE
    end = edge[PAGE:] if padding else edge[:0]
    return [edge[:PAGE], *buffers[:-1], last[:whole], end], last[whole:]


def _flags(vectors: Sequence[memoryview], mode: Mode) -> int:
    """O_DIRECT where the file system and all of the memory allow it."""
    aligned = all(
        buffer.nbytes % PAGE == 0 and _address(buffer) % PAGE == 0
        for buffer in vectors
        if buffer.nbytes
    )
    return os.O_CLOEXEC | (os.O_DIRECT if aligned and mode is Mode.DIRECT else 0)


def _address(buffer: memoryview) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _total(vectors: Sequence[memoryview]) -> int:
    return sum(buffer.nbytes for buffer in vectors)


def _move(
    transfer: Transfer, fd: int, vectors: list[memoryview], deadline: Deadline
) -> int:
    """Move all the vectors from or to the file's start; return the bytes moved."""
    offset = 0
    for group in _groups(vectors):
        deadline.left()
        moved = transfer(fd, group, offset)
        offset += moved
        if moved < _total(group):
            break  # The file ends here, or the disk is full.
    return offset


def _groups(vectors: Sequence[memoryview]) -> list[list[memoryview]]:
    """Cut vectors into what one system call may take."""
    groups: list[list[memoryview]] = [[]]
    room = _MAX_MOVE
    for vector in vectors:
        while vector.nbytes:
            if room == 0 or len(groups[-1]) == _MAX_VECTORS:
                groups.append([])
                room = _MAX_MOVE
            piece = vector[:room]
            groups[-1].append(piece)
            vector = vector[piece.nbytes :]
            room -= piece.nbytes
    return groups
