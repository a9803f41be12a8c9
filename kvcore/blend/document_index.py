"""Index of the document chunks that L1 or a tier has, and its file.

An entry is found by the rolling hash of its tokens and confirmed by a SHA-256 digest
of them. Most windows of a prompt are in no document: a counting Bloom filter with two
probes (Fan et al., Summary Cache, 2000) excludes them in numpy.

Memory: the filter takes 16 bytes per page of the arena, allocated at start, and an
entry about 430 bytes (tests/benchmarks/blend.py), for any number of entries.

A chunk that L1 evicts stays in the index when a tier has it. Tiers do not report their
evictions: such an entry may be outdated until a lookup queries the tier and calls
`remove`. Beyond a limit the least recently used of them are removed, unless L1 has
them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvcore.blend.rolling_hash import Hashes
from kvcore.config import ServerConfig
from kvcore.errors import SetupError
from kvcore.keys import ChunkHash
from kvcore.private_file import open_private

log = logging.getLogger(__name__)

Offsets = npt.NDArray[np.intp]

SLOTS_PER_CHUNK = 16
"""Filter slots per possible chunk: 1.4 % of the windows of no document pass."""
MIN_BITS, MAX_BITS = 12, 30
MAX_COUNT = 255
"""A slot at this count is never decremented: a false negative would lose a match."""
PROBES = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
"""Odd multipliers; a product's high bits give a slot (Dietzfelbinger et al., 1997)."""
WORD = (1 << 64) - 1

NO_SLOT = -1
_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"KVDocs\0\1"
_SLOT = struct.Struct("<32s32sQQQ")
SLOT_BYTES = _SLOT.size
"""88 bytes; the header has the same size."""
_READ_SLOTS = 4096


class DocumentChunk(msgspec.Struct, eq=False, gc=False):
    """One chunk of a document. `newer` and `older` share its rolling hash."""

    hash: ChunkHash
    rolling_hash: int
    digest: bytes
    """SHA-256 of its own tokens, in its space."""
    start: int
    """Position of its first token in its document."""
    slot: int = NO_SLOT
    """Its slot in the journal."""
    newer: DocumentChunk | None = None
    older: DocumentChunk | None = None


class DocumentIndex:
    """Entries by rolling hash and by chunk hash.

    For one thread. Any thread may call `note_evicted`, which takes effect at the next
    `add` or `candidates`.
    """

    def __init__(
        self,
        l1_chunks: int,
        tier_chunks: int = 0,
        journal: DocumentJournal | None = None,
        is_in_l1: Callable[[ChunkHash], bool] = lambda _: False,
    ) -> None:
        bits = max(1, (l1_chunks + tier_chunks) * SLOTS_PER_CHUNK - 1).bit_length()
        bits = min(max(bits, MIN_BITS), MAX_BITS)
        self._shift = 64 - bits
        self._filter = bytearray(1 << bits)
        self._counts = np.frombuffer(self._filter, np.uint8)
        self._by_rolling_hash: dict[int, DocumentChunk] = {}
        """The newest entry of each rolling hash."""
        self._by_hash: dict[ChunkHash, DocumentChunk] = {}
        self._evicted: deque[tuple[ChunkHash, bool]] = deque()
        """Chunks that L1 evicted, and whether a tier has them."""
        self._max_in_tier = tier_chunks
        self._in_tier: dict[ChunkHash, None] = {}
        """Least recently used first."""
        self._journal = journal
        self._is_in_l1 = is_in_l1

    def __len__(self) -> int:
        return len(self._by_hash)

    def __contains__(self, key: ChunkHash) -> bool:
        return key in self._by_hash

    def add(self, entry: DocumentChunk) -> None:
        """Add a chunk; an entry of the same chunk hash stays as it is."""
        self._apply_evictions()
        if entry.hash in self._by_hash:
            return
        self._by_hash[entry.hash] = entry
        older = self._by_rolling_hash.get(entry.rolling_hash)
        self._by_rolling_hash[entry.rolling_hash] = entry
        if self._journal is not None:
            self._journal.write(entry)
        if older is not None:
            entry.older, older.newer = older, entry
            return
        for slot in self._slots(entry.rolling_hash):
            self._filter[slot] = min(self._filter[slot] + 1, MAX_COUNT)

    def note_evicted(self, key: ChunkHash, *, in_tier: bool) -> None:
        """Record that L1 no longer has a chunk. Any thread, under any lock.

        The entry stays when a tier has the chunk, or was known to have it before.
        """
        if key in self._by_hash:
            self._evicted.append((key, in_tier))

    def remove(self, key: ChunkHash) -> None:
        """Remove a chunk that neither L1 nor a tier has; a no-op if unknown."""
        entry = self._by_hash.pop(key, None)
        if entry is not None:
            self._in_tier.pop(key, None)
            self._unlink(entry)
            if self._journal is not None:
                self._journal.blank(entry)

    def touch(self, key: ChunkHash) -> None:
        """Record the use of a chunk: of those in tiers it is removed last."""
        if key in self._in_tier:
            del self._in_tier[key]
            self._in_tier[key] = None

    @property
    def num_in_tier(self) -> int:
        """Number of chunks that tiers should have, whether L1 has them or not."""
        return len(self._in_tier)

    def is_in_tier(self, key: ChunkHash) -> bool:
        """Return whether a tier should have a chunk."""
        return key in self._in_tier

    def candidates(self, rolling_hashes: Hashes) -> Offsets:
        """Return the indexes of the hashes that pass the filter, ascending."""
        self._apply_evictions()
        shift = np.uint64(self._shift)
        offsets: Offsets = np.arange(0)
        for number, probe in enumerate(PROBES):
            probed = rolling_hashes[offsets] if number else rolling_hashes
            counts = self._counts.take((probed * probe >> shift).view(np.int64))
            passed = np.flatnonzero(counts != 0)
            offsets = offsets[passed] if number else passed
        return offsets

    def has_rolling_hash(self, rolling_hash: int) -> bool:
        """Return whether some entry has this rolling hash."""
        return rolling_hash in self._by_rolling_hash

    def find(self, rolling_hash: int, digest: bytes) -> list[DocumentChunk]:
        """Return the entries with exactly these tokens, the newest first."""
        found = []
        entry = self._by_rolling_hash.get(rolling_hash)
        while entry is not None:
            if entry.digest == digest:
                found.append(entry)
            entry = entry.older
        return found

    def _apply_evictions(self) -> None:
        while self._evicted:
            key, in_tier = self._evicted.popleft()
            if key in self._in_tier:
                self.touch(key)
            elif not in_tier:
                self.remove(key)
            elif key in self._by_hash:
                self._in_tier[key] = None
                if len(self._in_tier) > self._max_in_tier:
                    self._remove_oldest()

    def _remove_oldest(self) -> None:
        """Remove the least recently used chunk in a tier.

        If L1 has it too, its entry stays until L1 evicts it.
        """
        oldest = next(iter(self._in_tier))
        if self._is_in_l1(oldest):
            del self._in_tier[oldest]
        else:
            self.remove(oldest)

    def _unlink(self, entry: DocumentChunk) -> None:
        newer, older = entry.newer, entry.older
        entry.newer = entry.older = None
        if older is not None:
            older.newer = newer
        if newer is not None:
            newer.older = older
        elif older is not None:
            self._by_rolling_hash[entry.rolling_hash] = older
        else:
            del self._by_rolling_hash[entry.rolling_hash]
            for slot in self._slots(entry.rolling_hash):
                if self._filter[slot] < MAX_COUNT:
                    self._filter[slot] -= 1

    def _slots(self, rolling_hash: int) -> Sequence[int]:
        return [(rolling_hash * int(probe) & WORD) >> self._shift for probe in PROBES]


class DocumentJournal:
    """File of index entries in slots of equal size, reused by the next server.

    A record has the hashes of a chunk's tokens; whether the chunk is present, lookups
    learn from L1 or a tier. So the file is never synced, and a torn or lost record
    loses at most a match. The file has the rolling hash's secret base and no tokens. It
    is as long as the largest number of entries at one time. For one thread; `read` once
    before the first write.

    Raises:
        SetupError: the file cannot be written, or another server uses it.
    """

    def __init__(self, path: Path, chunk_size: int) -> None:
        self._path = path
        self._free: list[int] = []
        self._num_slots = 0
        self._fd: int | None = None
        try:
            self._fd = open_private(path, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.base = self._read_base(self._fd, chunk_size)
        except OSError as error:
            self.close()
            reason = error.strerror
            if isinstance(error, BlockingIOError):
                reason = "another server uses it; give each server its own file"
            raise SetupError(f"blend.keep = {path}: {reason}") from None

    def _read_base(self, fd: int, chunk_size: int) -> int:
        """Return the rolling hash's base; a new one if the file is new or invalid."""
        found = os.pread(fd, _HEADER.size, 0)
        if len(found) == _HEADER.size:
            base = int(_HEADER.unpack(found)[2])
            if found == _seal(_HEADER, _MAGIC, chunk_size, base):
                self._num_slots = max(0, os.fstat(fd).st_size // SLOT_BYTES - 1)
                return base
        base = secrets.randbits(64) | 1
        os.ftruncate(fd, 0)
        header = _seal(_HEADER, _MAGIC, chunk_size, base)
        os.pwrite(fd, header.ljust(SLOT_BYTES, b"\0"), 0)
        return base

    def read(self) -> Iterator[DocumentChunk]:
        """Yield the entries; blank and torn slots become free."""
        for first in range(0, self._num_slots, _READ_SLOTS):
            if self._fd is None:
                return
            count = min(_READ_SLOTS, self._num_slots - first)
            data = os.pread(self._fd, count * SLOT_BYTES, (1 + first) * SLOT_BYTES)
            for slot, fields in enumerate(_SLOT.iter_unpack(data), first):
                chunk_hash, digest, rolling_hash, start, checksum = fields
                if _SLOT.unpack(_seal(_SLOT, *fields[:-1]))[-1] == checksum:
                    yield DocumentChunk(
                        ChunkHash(chunk_hash), rolling_hash, digest, start, slot
                    )
                else:
                    self._free.append(slot)

    def write(self, entry: DocumentChunk) -> None:
        """Write an entry into a free slot, unless it has one."""
        if entry.slot != NO_SLOT:
            return
        if self._free:
            entry.slot = self._free.pop()
        else:
            entry.slot = self._num_slots
            self._num_slots += 1
        fields = (entry.hash, entry.digest, entry.rolling_hash, entry.start)
        self._put(entry.slot, _seal(_SLOT, *fields))

    def blank(self, entry: DocumentChunk) -> None:
        """Erase an entry and free its slot."""
        if entry.slot != NO_SLOT:
            self._put(entry.slot, bytes(SLOT_BYTES))
            self._free.append(entry.slot)
            entry.slot = NO_SLOT

    def _put(self, slot: int, data: bytes) -> None:
        """Write a slot; on an error close the journal and log it."""
        if self._fd is None:
            return
        try:
            os.pwrite(self._fd, data, (1 + slot) * SLOT_BYTES)
        except OSError as error:
            log.error(
                "documents are no longer kept in %s: %s", self._path, error.strerror
            )
            self.close()

    def close(self) -> None:
        """Close the file; the next server may open it."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def open_document_journal(config: ServerConfig) -> DocumentJournal | None:
    """Return the journal of `blend.keep` or `l1.keep`; None if the index has none.

    Raises:
        SetupError: as `DocumentJournal` raises it.
    """
    path = config.blend.keep
    if path is None and config.l1.keep is not None:
        path = f"{config.l1.keep}.documents"
    if path is None or config.blend.matcher != "anywhere":
        return None
    return DocumentJournal(Path(path), config.chunk_size)


def _seal(layout: struct.Struct, *fields: bytes | int) -> bytes:
    """Pack fields and, as the last one, their checksum."""
    data = layout.pack(*fields, 0)
    return layout.pack(*fields, xxhash.xxh3_64_intdigest(data))
