"""Journal of a kept arena: the commits and removals of its parts.

An append-only file of checksummed records. It tells where bytes are, not that they are
intact: each part has a checksum, and the next run checks the bytes against it. So the
file is never synced, and a lost or torn record costs at most a chunk. If the disk fails
or is full, the journal ends and the server goes on.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import xxhash

from kvcore.errors import SetupError
from kvcore.extents import Allocation, Checksum
from kvcore.keys import ChunkHash
from kvcore.private_file import open_private
from kvcore.storage.chunk import Chunk, PartId, PartName

log = logging.getLogger(__name__)

_FRAME = struct.Struct("<IQ")
VERSION = 1
SPARE_RECORDS = 16_384
"""Records beyond twice the live parts after which the journal is compacted."""


class JournalOpened(msgspec.Struct, frozen=True, array_like=True, tag="o"):
    """First record: the size of its arena."""

    version: int
    total_bytes: int
    page_bytes: int


class PartCommitted(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """A part that became readable."""

    chunk: ChunkHash
    part: PartId
    name: PartName
    extents: Allocation
    num_bytes: int
    checksum: Checksum


class PartFreed(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """A removed chunk, with all its parts."""

    chunk: ChunkHash
    num_parts: int


Record = JournalOpened | PartCommitted | PartFreed

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class Journal:
    """Writer of one arena's journal. `note*` runs under L1's lock, `write` outside it.

    Written to a second file until `begin` replaces an earlier run's journal.
    """

    def __init__(self, path: Path, opened: JournalOpened) -> None:
        self.path = path
        self._opened = opened
        self._noted: deque[Record] = deque()
        self._lock = threading.Lock()
        self._num_records = 0
        self._num_live = 0
        self._ended = False
        """Whether the disk failed: later records are dropped."""
        self._compaction: threading.Thread | None = None
        self._aside: int | None = None
        """File of a running compaction; every record is written to it, too."""
        try:
            self._file = self._create(self._aside_path)
        except OSError as error:
            raise _unusable(path, error) from None

    def note(self, chunk: Chunk, part: PartId) -> None:
        """Queue the record of a readable part, if it has a name and a checksum."""
        place = chunk.parts[part]
        if place.name is not None and place.checksum:
            self._noted.append(
                PartCommitted(
                    chunk.hash,
                    part,
                    place.name,
                    place.extents,
                    place.num_bytes,
                    place.checksum,
                )
            )

    def note_removed(self, chunk: Chunk) -> None:
        """Queue the record of a removed chunk."""
        self._noted.append(PartFreed(chunk.hash, chunk.ready.bit_count()))

    def write(self) -> bool:
        """Append the queued records in order; return whether to compact."""
        if not self._noted:
            return False
        with self._lock:
            frames = []
            while self._noted:
                record = self._noted.popleft()
                self._count(record)
                frames.append(_frame(record))
            try:
                self._append(b"".join(frames))
            except OSError as error:
                self._end(error)
            waste = self._num_records - 2 * self._num_live
            idle = self._compaction is None and not self._ended
            return idle and waste > SPARE_RECORDS

    def _count(self, record: Record) -> None:
        self._num_records += 1
        if isinstance(record, PartCommitted):
            self._num_live += 1
        elif isinstance(record, PartFreed):
            self._num_live -= record.num_parts

    def _append(self, data: bytes) -> None:
        for file in (self._file, self._aside):
            if file is not None and not self._ended:
                _write_all(file, data)

    def _end(self, error: OSError) -> None:
        """Stop writing; the next run checks every part that the journal names."""
        self._ended = True
        log.error("keeping L1 in %s ended: %s", self.path, error.strerror)

    def begin(self) -> None:
        """Replace an earlier run's journal."""
        self.write()
        try:
            self._aside_path.replace(self.path)
        except OSError as error:
            raise _unusable(self.path, error) from None

    # -- compaction -------------------------------------------------------------------

    def compact(self, note_all: Callable[[], None]) -> None:
        """Rewrite the journal on a thread of its own.

        `note_all` queues and writes every readable part; records that come meanwhile
        go to both files.
        """
        with self._lock:
            if self._compaction is not None or self._ended:
                return
            try:
                self._aside = self._create(self._aside_path)
            except OSError as error:
                self._end(error)
                return
            self._num_records = self._num_live = 0
            self._compaction = threading.Thread(
                target=self._compact, args=(note_all,), name="compact", daemon=True
            )
            self._compaction.start()

    @property
    def _aside_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.new")

    def _compact(self, note_all: Callable[[], None]) -> None:
        note_all()
        with self._lock:
            aside, self._aside, self._compaction = self._aside, None, None
            if aside is None:
                return
            if not self._ended:
                try:
                    self._aside_path.replace(self.path)
                    self._file, aside = aside, self._file
                except OSError as error:
                    self._end(error)
            os.close(aside)

    def _create(self, path: Path) -> int:
        file = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            _write_all(file, _frame(self._opened))
        except OSError:
            os.close(file)
            raise
        return file

    def close(self) -> None:
        """Finish the compaction, write the queued records and close the file."""
        compaction = self._compaction
        if compaction is not None:
            compaction.join()
        self.write()
        with self._lock:
            os.close(self._file)


def read(path: Path, opened: JournalOpened) -> Iterator[PartCommitted | PartFreed]:
    """Yield a journal's records up to the first that is torn.

    Yields nothing if there is no journal, or if it is another arena's.

    Raises:
        SetupError: the file exists and cannot be read.
    """
    try:
        with os.fdopen(open_private(path, os.O_RDONLY), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(path, error) from None
    records = _records(data)
    if next(records, None) != opened:
        return
    for record in records:
        if not isinstance(record, JournalOpened):
            yield record


def _records(data: bytes) -> Iterator[Record]:
    offset = 0
    while offset + _FRAME.size <= len(data):
        length, digest = _FRAME.unpack_from(data, offset)
        offset += _FRAME.size
        payload = data[offset : offset + length]
        if len(payload) < length or xxhash.xxh3_64_intdigest(payload) != digest:
            return
        try:
            yield _decoder.decode(payload)
        except msgspec.MsgspecError:
            return
        offset += length


def _unusable(path: Path, error: OSError) -> SetupError:
    return SetupError(f"l1.keep = {path}: {error.strerror}")


def _frame(record: Record) -> bytes:
    payload = _encoder.encode(record)
    return _FRAME.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + payload


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
