"""Records in files, transferred without the page cache where that is possible.

A record in a file is a page with the header, the payload, and zeros up to a page
boundary. `preadv` and `pwritev` transfer it between the file and L1's own pages.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kvcore.extents import Buffers
from kvcore.tiers.tier import (
    HEADER_BYTES,
    REJECTED,
    Deadline,
    LoadItem,
    LoadResult,
    StoreItem,
)

PAGE = 4096
"""Alignment that O_DIRECT requires of any disk: addresses, lengths, offsets."""
_MAX_VECTORS = 1024
"""IOV_MAX."""
_MAX_TRANSFER_BYTES = 64 << 20
"""Per system call: the deadline is checked between them."""

VectoredCall = Callable[[int, list[memoryview], int], int]
"""`os.preadv` or `os.pwritev`: descriptor, buffers, offset; returns bytes."""


def supports_direct_io(directory: Path) -> bool:
    """Return whether files here can be opened with O_DIRECT; raises `OSError`."""
    path = directory / f".probe-{os.getpid()}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False  # tmpfs and some network file systems
    finally:
        path.unlink(missing_ok=True)
    return True


def file_bytes(num_bytes: int) -> int:
    """Return the file size of a part of `num_bytes`."""
    return PAGE + -(-num_bytes // PAGE) * PAGE


def write_record(
    path: Path, item: StoreItem, deadline: Deadline, *, direct: bool
) -> None:
    """Write a new file; `direct` allows O_DIRECT.

    Raises:
        OSError: from the file system.
        DeadlineExceeded: between two system calls.
    """
    edge = _thread.pages
    edge[:HEADER_BYTES] = item.header()
    edge[HEADER_BYTES:] = bytes(2 * PAGE - HEADER_BYTES)
    vectors, tail = _vectors(item.buffers, edge)
    edge[PAGE : PAGE + len(tail)] = tail
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | _direct_flag(vectors, direct)
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        if _transfer(os.pwritev, fd, vectors, deadline) != _total(vectors):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def read_record(
    path: Path, item: LoadItem, deadline: Deadline, *, direct: bool
) -> LoadResult:
    """Fill an item from a file; REJECTED if the file is not the item's whole record.

    Raises:
        OSError: from the file system.
        DeadlineExceeded: between two system calls.
    """
    edge = _thread.pages
    vectors, tail = _vectors(item.buffers, edge)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _direct_flag(vectors, direct))
    try:
        size = file_bytes(item.num_bytes)
        if os.fstat(fd).st_size != size:
            return REJECTED
        if _transfer(os.preadv, fd, vectors, deadline) != size:
            return REJECTED
    finally:
        os.close(fd)
    tail[:] = edge[PAGE : PAGE + len(tail)]
    return item.result_of(edge)


class _ThreadPages(threading.local):
    """Two aligned pages per thread: for the header, and for the payload's end."""

    def __init__(self) -> None:
        self.pages = memoryview(mmap.mmap(-1, 2 * PAGE))


_thread = _ThreadPages()


def _vectors(buffers: Buffers, edge: memoryview) -> tuple[list[memoryview], memoryview]:
    """Return the vectors, whole pages together, and the tail that is copied instead.

    If only the last buffer ends within a page, its tail goes through `edge`, so that
    all the memory is aligned. Otherwise padding follows the buffers.
    """
    padding = -sum(buffer.nbytes for buffer in buffers) % PAGE
    if any(buffer.nbytes % PAGE for buffer in buffers[:-1]):
        return [edge[:PAGE], *buffers, edge[PAGE : PAGE + padding]], edge[:0]
    last = buffers[-1]
    whole = last.nbytes - last.nbytes % PAGE
    end = edge[PAGE:] if padding else edge[:0]
    return [edge[:PAGE], *buffers[:-1], last[:whole], end], last[whole:]


def _direct_flag(vectors: Sequence[memoryview], direct: bool) -> int:
    """Return O_DIRECT if allowed and if all of the memory is aligned."""
    aligned = all(
        buffer.nbytes % PAGE == 0 and address_of(buffer) % PAGE == 0
        for buffer in vectors
        if buffer.nbytes
    )
    return os.O_DIRECT if direct and aligned else 0


def address_of(buffer: memoryview) -> int:
    """Return the address of a buffer's first byte."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _total(vectors: Sequence[memoryview]) -> int:
    return sum(buffer.nbytes for buffer in vectors)


def _transfer(
    call: VectoredCall, fd: int, vectors: Sequence[memoryview], deadline: Deadline
) -> int:
    """Transfer all the vectors from or to the file's start; return the bytes."""
    offset = 0
    for group in _groups(vectors):
        deadline.remaining()
        num_bytes = call(fd, group, offset)
        offset += num_bytes
        if num_bytes < _total(group):
            break  # The file ends here, or the disk is full.
    return offset


def _groups(vectors: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Yield vectors in groups, each within the limits of one system call."""
    group: list[memoryview] = []
    room = _MAX_TRANSFER_BYTES
    for vector in vectors:
        while vector.nbytes:
            if room == 0 or len(group) == _MAX_VECTORS:
                yield group
                group, room = [], _MAX_TRANSFER_BYTES
            group.append(vector[:room])
            room -= group[-1].nbytes
            vector = vector[group[-1].nbytes :]
    yield group
