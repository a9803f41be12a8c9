"""Matchers: where stored documents occur in a prompt.

A matcher returns runs of chunks that have the prompt's tokens, confirmed by the
document's chained hashes from its start on, or by the digest of a chunk's own tokens.
The caller finds out whether the chunks are present.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import numpy as np

from kvcore.blend.document_index import DocumentChunk, DocumentIndex
from kvcore.blend.paragraphs import Markers, split_paragraphs
from kvcore.blend.rolling_hash import SLICE_WINDOWS, RollingHash, Tokens
from kvcore.errors import BadRequest
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
"""Chunks confirmed or added between two yields, about 150 us."""

CountReady = Callable[[list[ChunkHash]], int]
"""Returns how many leading chunks L1 has for all ranks."""


class DocumentSpace:
    """Hash space of the documents of one model and one set of whole-prompt extras.

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
        """Added to rolling hashes: equal tokens of two spaces differ in the index."""
        self._cache_salt = cache_salt(extras)

    def owner(self, key: SessionKey) -> SaltedKey:
        """Return the owner of stores and loads; its salt names their quota."""
        return SaltedKey(key.engine_id, key.request_id, self._cache_salt)

    def digest(self, packed: memoryview) -> bytes:
        """Return the SHA-256 of a chunk's own packed tokens in this space."""
        state = sha256(self.seed)
        state.update(packed)
        return state.digest()


def read_tokens(packed: memoryview, extras: Sequence[ExtraKey] = ()) -> Tokens:
    """Return packed tokens without a copy, up to the first extra at a later token.

    Extra material at token 0 applies to the whole and makes another space. Tokens after
    a later one (an image) are neither stored nor matched: their KV depends on it.

    Raises:
        BadRequest: not whole tokens.
    """
    if len(packed) % 4:
        raise BadRequest(f"tokens: {len(packed)} bytes are not whole uint32")
    tokens: Tokens = np.frombuffer(packed, "<u4")
    return tokens[: min((e.start for e in extras if e.start), default=len(tokens))]


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive chunks of one document, from token `start` of a prompt on."""

    old_start: int
    """Position of the first token in the document."""
    start: int
    hashes: list[ChunkHash]
    continues: bool = False
    """Whether it continues the previous run: both are pieces of one match."""


Runs = Generator[None, None, list[TokenRun]]
Entries = Generator[None, None, list[DocumentChunk]]


class Matcher(Protocol):
    """Finds disjoint runs in a prompt, in order; yields between bounded steps."""

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Entries:
        """Return the index entries by which a document's chunks are found later."""

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return the runs of chunks that L1 or a tier may have."""


class SeparatorMatcher:
    """Treats each paragraph as a document and matches it from its first token on."""

    def __init__(self, markers: Markers, chunk_size: int, slice_chunks: int) -> None:
        self._markers = markers
        self._chunk_size = chunk_size
        self._slice_chunks = slice_chunks

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Entries:
        """Return none: a document's hashes follow from its tokens."""
        del tokens, hashes, space
        yield from ()
        return []

    def find(
        self,
        tokens: Tokens,
        space: DocumentSpace,
        count_ready: CountReady,
        runs: Sequence[TokenRun] = (),
    ) -> Runs:
        """Return the paragraphs that begin outside `runs`, each up to the next run.

        Includes paragraphs that L1 lacks, since a tier may have them.
        """
        del count_ready
        size = self._chunk_size
        found = []
        num_hashed = 0
        ends = [run.start + len(run.hashes) * size for run in runs]
        for paragraph in split_paragraphs(tokens, self._markers):
            start, end = paragraph.start, paragraph.end
            following = bisect_right(ends, start)
            if following < len(runs):
                end = max(start, min(end, runs[following].start))
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
    """Finds chunks at any offset: left to right, the longest run at each position.

    Chunks that a tier should have count for the length of a run. With `separators` it
    also returns the paragraphs between the runs, which find documents that another
    host has stored in the tier, from their start on.
    """

    def __init__(
        self,
        index: DocumentIndex,
        rolling: RollingHash,
        separators: SeparatorMatcher | None = None,
    ) -> None:
        self._index = index
        self._rolling = rolling
        self._separators = separators
        self._chunk_size = rolling.window

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Entries:
        """Return an entry for each whole chunk."""
        entries: list[DocumentChunk] = []
        size, packed = self._chunk_size, tokens.data
        for first in range(0, len(hashes), MATCH_STEP):
            if first:
                yield
            step = hashes[first : first + MATCH_STEP]
            start = first * size
            whole = tokens[start : start + len(step) * size]
            rolled = (self._rolling.chunks(whole) + space.salt).tolist()
            for rolling_hash, chunk_hash in zip(rolled, step, strict=True):
                digest = space.digest(packed[start : start + size])
                entries.append(DocumentChunk(chunk_hash, rolling_hash, digest, start))
                start += size
        return entries

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return the runs, each entirely in L1 or entirely missing there."""
        runs = yield from self._find_anywhere(tokens, space, count_ready)
        if self._separators is not None:
            runs += yield from self._separators.find(tokens, space, count_ready, runs)
            runs.sort(key=lambda run: run.start)
        return runs

    def _find_anywhere(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        runs: list[TokenRun] = []
        free = num_hashed = 0
        size, packed = self._chunk_size, tokens.data
        for first in range(0, len(tokens) - size + 1, SLICE_WINDOWS):
            if first:
                yield
            part = tokens[first : first + SLICE_WINDOWS + size - 1]
            rolled = self._rolling.windows(part) + space.salt
            offsets = self._index.candidates(rolled)
            for offset, rolling_hash in zip(
                offsets.tolist(), rolled[offsets].tolist(), strict=True
            ):
                start = first + offset
                if start < free or not self._index.has_rolling_hash(rolling_hash):
                    continue
                digest = space.digest(packed[start : start + size])
                run = TokenRun(0, start, [])
                for entry in self._index.find(rolling_hash, digest):
                    hashes = [entry.hash]
                    while self._extend(hashes, packed, start):
                        yield
                    num_hashed += len(hashes)
                    if num_hashed >= MATCH_STEP:
                        num_hashed = 0
                        yield
                    length = self._count_present(hashes, count_ready)
                    if length > len(run.hashes):
                        run = TokenRun(entry.start, start, hashes[:length])
                if run.hashes:
                    runs += self._cut(run, count_ready)
                    free = start + len(run.hashes) * size
        return runs

    def _count_present(self, hashes: list[ChunkHash], count_ready: CountReady) -> int:
        """Count the leading chunks that L1 has or a tier should have."""
        length = count_ready(hashes)
        is_in_tier = self._index.is_in_tier
        while length < len(hashes) and is_in_tier(hashes[length]):
            while length < len(hashes) and is_in_tier(hashes[length]):
                length += 1
            length += count_ready(hashes[length:])
        return length

    def _cut(self, run: TokenRun, count_ready: CountReady) -> list[TokenRun]:
        """Cut a run between chunks that L1 has and chunks that it lacks."""
        hashes = run.hashes
        if not self._index.num_in_tier:
            return [run]
        cut: list[TokenRun] = []
        first = 0
        while first < len(hashes):
            end = first + count_ready(hashes[first:])
            if end == first:
                rest = range(first + 1, len(hashes))
                ready = (i for i in rest if count_ready(hashes[i : i + 1]))
                end = next(ready, len(hashes))
            skip = first * self._chunk_size
            old_start, start = run.old_start + skip, run.start + skip
            cut.append(TokenRun(old_start, start, hashes[first:end], first > 0))
            first = end
        return cut

    def _extend(self, hashes: list[ChunkHash], packed: memoryview, start: int) -> bool:
        """Append at most `MATCH_STEP` chunks of a run; return False at its end.

        The hash of a document's next chunk follows from its last one and the prompt's
        tokens, so finding it in the index confirms it.
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
