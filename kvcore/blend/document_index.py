"""Which chunks of documents L1 or a tier has, by what they say.

An entry is found by the rolling hash of its tokens and confirmed by a SHA-256 digest
of them. Most of a prompt's windows are in no document: a counting Bloom filter with
two probes (Fan et al., Summary Cache, 2000) passes over them in numpy.

Memory: the filter takes 16 bytes for each page of the arena, once and for all, and an
entry about 430 bytes (tests/benchmarks/blend.py), however many there are.

A chunk that leaves L1 stays when a tier has it. No tier tells what it evicts: such an
entry is a belief, which a lookup puts to the tier, and `forget` ends. The longest
unused of them are forgotten beyond a limit; what L1 has is known all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from kvcore.blend.document_chunk import DocumentChunk
from kvcore.blend.document_journal import DocumentJournal
from kvcore.blend.rolling_hash import Hashes
from kvcore.keys import ChunkHash

Offsets = npt.NDArray[np.intp]

SLOTS_A_CHUNK = 16
"""Filter slots for each chunk there can be: 1.4 % of foreign windows pass."""
MIN_BITS, MAX_BITS = 12, 30
MAX_COUNT = 255
"""A slot that once counted so far stays: it is wrong to say no."""
PROBES = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
"""Odd multipliers whose products' high bits pick a slot (Dietzfelbinger et al.)."""
WORD = (1 << 64) - 1


class _Left(msgspec.Struct, frozen=True, gc=False):
    """A chunk that L1 has no longer, and whether a tier has it."""

    hash: ChunkHash
    in_tier: bool


class DocumentIndex:
    """Entries by rolling hash and by chunk hash.

    For one thread, but for `leave`, which any may call: what it tells is seen to at the
    next `add` or `candidates`.
    """

    def __init__(
        self,
        l1_chunks: int,
        tier_chunks: int = 0,
        kept: DocumentJournal | None = None,
        is_in_l1: Callable[[ChunkHash], bool] = lambda _: False,
    ) -> None:
        bits = max(1, (l1_chunks + tier_chunks) * SLOTS_A_CHUNK - 1).bit_length()
        bits = min(max(bits, MIN_BITS), MAX_BITS)
        self._shift = 64 - bits
        self._filter = bytearray(1 << bits)
        self._counts = np.frombuffer(self._filter, np.uint8)
        self._by_key: dict[int, DocumentChunk] = {}
        self._by_hash: dict[ChunkHash, DocumentChunk] = {}
        self._left: deque[_Left] = deque()
        self._max_in_tier = tier_chunks
        self._in_tier: dict[ChunkHash, None] = {}
        """The longest unused first."""
        self._kept = kept
        self._is_in_l1 = is_in_l1

    def __len__(self) -> int:
        return len(self._by_hash)

    def add(self, entry: DocumentChunk) -> None:
        """Enter a chunk; one that is known stays as it is."""
        self._settle()
        if entry.hash in self._by_hash:
            return
        self._by_hash[entry.hash] = entry
        twin = self._by_key.get(entry.key)
        self._by_key[entry.key] = entry
        if self._kept is not None:
            self._kept.write(entry)
        if twin is not None:
            entry.after, twin.before = twin, entry
            return
        for slot in self._slots(entry.key):
            self._filter[slot] = min(self._filter[slot] + 1, MAX_COUNT)

    def leave(self, key: ChunkHash, *, in_tier: bool) -> None:
        """Note that L1 has a chunk no longer. Any thread, under any lock.

        It stays when a tier has it, or was known to before.
        """
        if key in self._by_hash:
            self._left.append(_Left(key, in_tier))

    def forget(self, key: ChunkHash) -> None:
        """Take out a chunk that is nowhere, known or not."""
        entry = self._by_hash.pop(key, None)
        if entry is not None:
            self._in_tier.pop(key, None)
            self._unlink(entry)
            if self._kept is not None:
                self._kept.blank(entry)

    def touch(self, key: ChunkHash) -> None:
        """Note the use of a chunk: of those in tiers the unused ones go first."""
        if key in self._in_tier:
            del self._in_tier[key]
            self._in_tier[key] = None

    @property
    def num_in_tier(self) -> int:
        """Chunks that tiers are believed to have, whether L1 has them or not."""
        return len(self._in_tier)

    def is_in_tier(self, key: ChunkHash) -> bool:
        """Say whether a tier is believed to have a chunk."""
        return key in self._in_tier

    def __contains__(self, key: ChunkHash) -> bool:
        return key in self._by_hash

    def candidates(self, keys: Hashes) -> Offsets:
        """Return the places of those keys that some entry may have, ascending."""
        self._settle()
        shift = np.uint64(self._shift)
        places: Offsets = np.arange(0)
        for number, probe in enumerate(PROBES):
            asked = keys[places] if number else keys
            counts = self._counts.take((asked * probe >> shift).view(np.int64))
            passed = np.flatnonzero(counts != 0)
            places = places[passed] if number else passed
        return places

    def known(self, key: int) -> bool:
        """Say whether some entry has this rolling hash."""
        return key in self._by_key

    def find(self, key: int, digest: bytes) -> list[DocumentChunk]:
        """Return the entries of these very tokens, the latest first."""
        found = []
        entry = self._by_key.get(key)
        while entry is not None:
            if entry.digest == digest:
                found.append(entry)
            entry = entry.after
        return found

    def _settle(self) -> None:
        while self._left:
            left = self._left.popleft()
            if left.hash not in self._by_hash:
                continue
            if left.hash in self._in_tier:
                self.touch(left.hash)
            elif left.in_tier:
                self._in_tier[left.hash] = None
                if len(self._in_tier) > self._max_in_tier:
                    self._forget_oldest()
            else:
                self.forget(left.hash)

    def _forget_oldest(self) -> None:
        """Forget a chunk in a tier; what L1 has, L1 tells of when it leaves."""
        oldest = next(iter(self._in_tier))
        if self._is_in_l1(oldest):
            del self._in_tier[oldest]
        else:
            self.forget(oldest)

    def _unlink(self, entry: DocumentChunk) -> None:
        before, after = entry.before, entry.after
        entry.before = entry.after = None
        if after is not None:
            after.before = before
        if before is not None:
            before.after = after
        elif after is not None:
            self._by_key[entry.key] = after
        else:
            del self._by_key[entry.key]
            for slot in self._slots(entry.key):
                if self._filter[slot] < MAX_COUNT:
                    self._filter[slot] -= 1

    def _slots(self, key: int) -> Sequence[int]:
        return [(key * int(probe) & WORD) >> self._shift for probe in PROBES]
