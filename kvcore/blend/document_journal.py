"""Entries of the index that outlive the server, in a file of equal slots.

A record says what a chunk's tokens hash to, never that the chunk is there: L1 or a tier
is asked when a prompt has its tokens. So nothing here is synced, and a record that was
torn or lost costs a match at most. The file holds the rolling hash's secret base, and
no tokens.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

import xxhash

from kvcore.blend.document_chunk import NO_SLOT, DocumentChunk
from kvcore.config import ServerConfig
from kvcore.errors import SetupError
from kvcore.keys import ChunkHash

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"KVDocs\0\1"
_SLOT = struct.Struct("<32s32sQQQ")
SLOT_BYTES = _SLOT.size
"""88, of the header too."""
_BLANK = bytes(SLOT_BYTES)
_READ_SLOTS = 4096


class DocumentJournal:
    """One server's file. For one thread; read once with `read` before the first write.

    It is as long as the most entries that there ever were at once.

    Raises:
        SetupError: it cannot be written, or another server has it.
    """

    def __init__(self, path: Path, chunk_size: int) -> None:
        self._path = path
        self._free: list[int] = []
        self._num_slots = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd: int | None = None
        try:
            self._fd = os.open(path, flags, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.base = self._begin(self._fd, chunk_size)
        except BlockingIOError:
            self.close()
            raise SetupError(
                f"blend.keep = {path}: another server has it; give each its own"
            ) from None
        except OSError as error:
            self.close()
            raise SetupError(f"blend.keep = {path}: {error.strerror}") from None

    def _begin(self, fd: int, chunk_size: int) -> int:
        """Return the base of what is there; else empty the file and draw one."""
        found = os.pread(fd, _HEADER.size, 0)
        if len(found) == _HEADER.size:
            _, _, base, _ = _HEADER.unpack(found)
            if found == _header(chunk_size, base):
                self._num_slots = max(0, os.fstat(fd).st_size // SLOT_BYTES - 1)
                return int(base)
        base = secrets.randbits(64) | 1
        os.ftruncate(fd, 0)
        os.pwrite(fd, _header(chunk_size, base).ljust(SLOT_BYTES, b"\0"), 0)
        return base

    def read(self) -> Iterator[DocumentChunk]:
        """Yield what is kept; slots that are blank or torn are used again."""
        for first in range(0, self._num_slots, _READ_SLOTS):
            if self._fd is None:
                return
            count = min(_READ_SLOTS, self._num_slots - first)
            place = (1 + first) * SLOT_BYTES
            data = os.pread(self._fd, count * SLOT_BYTES, place)
            for slot, fields in enumerate(_SLOT.iter_unpack(data), first):
                chunk_hash, digest, key, start, _ = fields
                if _SLOT.pack(*fields) == _record(chunk_hash, digest, key, start):
                    yield DocumentChunk(
                        ChunkHash(chunk_hash), key, digest, start, slot=slot
                    )
                else:
                    self._free.append(slot)

    def write(self, entry: DocumentChunk) -> None:
        """Keep an entry, in a slot of its own."""
        if entry.slot != NO_SLOT:
            return
        if self._free:
            entry.slot = self._free.pop()
        else:
            entry.slot = self._num_slots
            self._num_slots += 1
        self._put(entry.slot, _record(entry.hash, entry.digest, entry.key, entry.start))

    def blank(self, entry: DocumentChunk) -> None:
        """Keep an entry no longer."""
        if entry.slot != NO_SLOT:
            self._put(entry.slot, _BLANK)
            self._free.append(entry.slot)
            entry.slot = NO_SLOT

    def _put(self, slot: int, data: bytes) -> None:
        """Write a slot; a disk that is full ends the keeping, not the server."""
        if self._fd is None:
            return
        try:
            os.pwrite(self._fd, data, (1 + slot) * SLOT_BYTES)
        except OSError as error:
            log.error("keeping documents in %s ended: %s", self._path, error.strerror)
            self.close()

    def close(self) -> None:
        """Leave the file to the next server."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def open_document_journal(config: ServerConfig) -> DocumentJournal | None:
    """Open the file in which an index outlives its server, if there is to be one."""
    path = config.blend.keep
    if path is None and config.l1.keep is not None:
        path = f"{config.l1.keep}.documents"
    if path is None or config.blend.matcher != "anywhere":
        return None
    return DocumentJournal(Path(path), config.chunk_size)


def _header(chunk_size: int, base: int) -> bytes:
    head = _HEADER.pack(_MAGIC, chunk_size, base, 0)
    return _HEADER.pack(_MAGIC, chunk_size, base, _check(head))


def _record(chunk_hash: bytes, digest: bytes, key: int, start: int) -> bytes:
    record = _SLOT.pack(chunk_hash, digest, key, start, 0)
    return _SLOT.pack(chunk_hash, digest, key, start, _check(record))


def _check(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)
