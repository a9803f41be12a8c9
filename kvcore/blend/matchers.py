"""Where stored documents may stand in a prompt.

A matcher names runs of chunks; which of them can be had, storage says. What it names
is certain to be of those tokens: by the document's chained hash from its start on, or
by the digest of a chunk's own tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import numpy as np

from kvcore.blend.document_chunk import DocumentChunk
from kvcore.blend.document_index import DocumentIndex
from kvcore.blend.paragraphs import Markers, cut
from kvcore.blend.rolling_hash import SLICE_WINDOWS, RollingHash, Tokens
from kvcore.keys import (
    ChunkHash,
    ExtraKey,
    HashChain,
    SaltedKey,
    SessionKey,
    cache_salt,
    chain_seed,
    child_hash,
)

MATCH_STEP = 128
"""Chunks confirmed or learnt before others are served, about 150 us."""

CountReady = Callable[[list[ChunkHash]], int]
"""Says how many leading chunks are there for all ranks."""


class DocumentSpace:
    """The documents of one model and whole-prompt material: a hash space of its own.

    Extra material at token 0 (cache salt, LoRA) makes another space.
    """

    def __init__(
        self,
        model: str,
        world_size: int,
        chunk_size: int,
        extras: Sequence[ExtraKey] = (),
    ) -> None:
        materials = [extra.material for extra in extras if extra.start == 0]
        self.seed = chain_seed("document", model, world_size, chunk_size, materials)
        self.salt = np.uint64(int.from_bytes(self.seed[:8], "little"))
        """Keeps equal tokens of two spaces apart in the index."""
        self._cache_salt = cache_salt(extras)

    def owner(self, key: SessionKey) -> SaltedKey:
        """Name whom room is made for, so that a salt's quota counts."""
        return SaltedKey(key.engine_id, key.request_id, self._cache_salt)

    def digest(self, packed: memoryview) -> bytes:
        """Return the content hash of a chunk's own packed tokens, in this space."""
        state = sha256(self.seed)
        state.update(packed)
        return state.digest()


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive chunks of one document, from `start` of a prompt on."""

    old_start: int
    """Position of the first in the document."""
    start: int
    hashes: list[ChunkHash]
    goes_on: bool = False
    """With what the run before it ends: they are one, had or missed apart."""


Runs = Generator[None, None, list[TokenRun]]
Learnt = Generator[None, None, list[DocumentChunk]]


class Matcher(Protocol):
    """Finds runs in order, apart from each other; yields where others may be served."""

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Learnt:
        """Return what must be known of a document's chunks to find them again."""

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return the runs in a prompt, of chunks that may be there."""


class SeparatorMatcher:
    """Each paragraph is a document from its start on, as far as that is stored."""

    def __init__(self, markers: Markers, chunk_size: int, slice_chunks: int) -> None:
        self._markers = markers
        self._chunk_size = chunk_size
        self._slice_chunks = slice_chunks

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Learnt:
        """Nothing: a document's hashes follow from its tokens."""
        del tokens, hashes, space
        yield from ()
        return []

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return every paragraph, stored or not: a tier may have what L1 lacks."""
        del count_ready
        return (yield from self.find_between([], tokens, space))

    def find_between(
        self, runs: list[TokenRun], tokens: Tokens, space: DocumentSpace
    ) -> Runs:
        """Return the paragraphs that begin outside these runs, as far as the next."""
        size = self._chunk_size
        found = []
        num_hashed = 0
        ends = [run.start + len(run.hashes) * size for run in runs]
        for paragraph in cut(tokens, self._markers):
            start, end = paragraph.start, paragraph.end
            later = bisect_right(ends, start)
            if later < len(runs):
                end = max(start, min(end, runs[later].start))
            chain = HashChain(space.seed, size)
            packed = tokens[start:end].data.cast("B")
            yield from chain.extend(packed, self._slice_chunks)
            if chain.hashes:
                found.append(TokenRun(0, start, chain.hashes))
            num_hashed += len(chain.hashes)
            if num_hashed >= self._slice_chunks:
                num_hashed = 0
                yield
        return found


class RollingHashMatcher:
    """Finds chunks at any offset: from left to right, the longest run at each place.

    What a tier is believed to have counts for the length of a run.
    """

    def __init__(self, index: DocumentIndex, rolling: RollingHash) -> None:
        self._index = index
        self._rolling = rolling
        self._chunk_size = rolling.window

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Learnt:
        """Return an entry for each whole chunk."""
        entries: list[DocumentChunk] = []
        size, packed = self._chunk_size, tokens.data
        for first in range(0, len(hashes), MATCH_STEP):
            if first:
                yield
            step = hashes[first : first + MATCH_STEP]
            start = first * size
            whole = tokens[start : start + len(step) * size]
            keys = (self._rolling.chunks(whole) + space.salt).tolist()
            for key, chunk_hash in zip(keys, step, strict=True):
                digest = space.digest(packed[start : start + size])
                entries.append(DocumentChunk(chunk_hash, key, digest, start))
                start += size
        return entries

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return the runs of known chunks, cut where L1 has one side and not the other.

        What is not in L1 may be in a tier.
        """
        runs: list[TokenRun] = []
        free = num_hashed = 0
        size, packed = self._chunk_size, tokens.data
        for first in range(0, len(tokens) - size + 1, SLICE_WINDOWS):
            if first:
                yield
            part = tokens[first : first + SLICE_WINDOWS + size - 1]
            keys = self._rolling.windows(part) + space.salt
            places = self._index.candidates(keys)
            for place, key in zip(places.tolist(), keys[places].tolist(), strict=True):
                start = first + place
                if start < free or not self._index.known(key):
                    continue
                digest = space.digest(packed[start : start + size])
                best: list[ChunkHash] = []
                old_start = 0
                for entry in self._index.find(key, digest):
                    hashes = [entry.hash]
                    while self._follow(hashes, packed, start):
                        yield
                    num_hashed += len(hashes)
                    if num_hashed >= MATCH_STEP:
                        num_hashed = 0
                        yield
                    reach = self._reach(hashes, count_ready)
                    if reach > len(best):
                        best, old_start = hashes[:reach], entry.start
                if best:
                    runs += self._cut(TokenRun(old_start, start, best), count_ready)
                    free = start + len(best) * size
        return runs

    def _reach(self, hashes: list[ChunkHash], count_ready: CountReady) -> int:
        """Count the leading chunks that L1 has or a tier may have."""
        reach = count_ready(hashes)
        is_in_tier = self._index.is_in_tier
        while reach < len(hashes) and is_in_tier(hashes[reach]):
            while reach < len(hashes) and is_in_tier(hashes[reach]):
                reach += 1
            reach += count_ready(hashes[reach:])
        return reach

    def _cut(self, run: TokenRun, count_ready: CountReady) -> list[TokenRun]:
        """Cut a run into what L1 has and what it has not, in turn."""
        hashes = run.hashes
        if not self._index.num_in_tier:
            return [run]
        pieces: list[TokenRun] = []
        first = 0
        while first < len(hashes):
            end = first + count_ready(hashes[first:])
            if end == first:
                later = range(first + 1, len(hashes))
                ready = (at for at in later if count_ready(hashes[at : at + 1]))
                end = next(ready, len(hashes))
            at = first * self._chunk_size
            pieces.append(
                TokenRun(
                    run.old_start + at, run.start + at, hashes[first:end], first > 0
                )
            )
            first = end
        return pieces

    def _follow(self, hashes: list[ChunkHash], packed: memoryview, start: int) -> bool:
        """Follow a run's document some way; False at its end in the prompt.

        A document's next chunk has the hash that its last one and the prompt's tokens
        give, so that looking it up confirms it.
        """
        size, index = self._chunk_size, self._index
        first = start + len(hashes) * size
        end = min(first + MATCH_STEP * size, len(packed) - size + 1)
        for at in range(first, end, size):
            child = child_hash(hashes[-1], packed[at : at + size])
            if child not in index:
                return False
            hashes.append(child)
        return first + MATCH_STEP * size == end


class CombinedMatcher:
    """Chunks anywhere, and between them paragraphs that only a tier may know.

    So it finds what another host has stored, from its document's start on.
    """

    def __init__(
        self, anywhere: RollingHashMatcher, separated: SeparatorMatcher
    ) -> None:
        self._anywhere = anywhere
        self._separated = separated

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Learnt:
        """See `RollingHashMatcher`."""
        return self._anywhere.learn(tokens, hashes, space)

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return the runs of both."""
        runs = yield from self._anywhere.find(tokens, space, count_ready)
        runs += yield from self._separated.find_between(runs, tokens, space)
        return sorted(runs, key=lambda run: run.start)
