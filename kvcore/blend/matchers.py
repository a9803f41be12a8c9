"""Where stored documents may stand in a prompt.

A matcher names runs of chunks; which of them can be had, storage says. What it names
is certain to be of those tokens: by the document's chained hash from its start on, or
by the digest of a chunk's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import numpy as np

from kvcore.blend.index import DocumentIndex, Entry
from kvcore.blend.paragraphs import Markers, cut
from kvcore.blend.rolling import SLICE_WINDOWS, RollingHash, Tokens
from kvcore.keys import ChunkHash, HashChain, chain_seed, child_hash

MATCH_STEP = 128
"""Chunks confirmed before others are served, about 150 us."""

CountReady = Callable[[list[ChunkHash]], int]
"""Says how many leading chunks are there for all ranks."""


class DocumentSpace:
    """The documents of one model: a space of hashes of its own."""

    def __init__(self, model: str, world_size: int, chunk_size: int) -> None:
        self.seed = chain_seed("document", model, world_size, chunk_size)
        self.salt = np.uint64(int.from_bytes(self.seed[:8], "little"))
        """Keeps equal tokens of two models apart in the index."""

    def digest(self, chunk: Tokens) -> bytes:
        """Return the content hash of a chunk's own tokens, in this space."""
        state = sha256(self.seed)
        state.update(chunk.data)
        return state.digest()


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive chunks of one document, from `start` of a prompt on."""

    old_start: int
    """Position of the first in the document."""
    start: int
    hashes: list[ChunkHash]


Runs = Generator[None, None, list[Run]]


class Matcher(Protocol):
    """Finds runs in order, apart from each other; yields where others may be served."""

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Iterable[Entry]:
        """Return what must be known of a document's chunks to find them again."""

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return the runs in a prompt, of chunks that may be there."""


class Separated:
    """Each paragraph is a document from its start on, as far as that is stored."""

    def __init__(self, markers: Markers, chunk_size: int, slice_chunks: int) -> None:
        self._markers = markers
        self._chunk_size = chunk_size
        self._slice_chunks = slice_chunks

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Iterable[Entry]:
        """Nothing: a document's hashes follow from its tokens."""
        del tokens, hashes, space
        return ()

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return every paragraph, stored or not: a tier may have what L1 lacks."""
        del count_ready
        runs = []
        num_hashed = 0
        for paragraph in cut(tokens, self._markers):
            chain = HashChain(space.seed, self._chunk_size)
            packed = tokens[paragraph.start : paragraph.end].data.cast("B")
            yield from chain.extend(packed, self._slice_chunks)
            if chain.hashes:
                runs.append(Run(0, paragraph.start, chain.hashes))
            num_hashed += len(chain.hashes)
            if num_hashed >= self._slice_chunks:
                num_hashed = 0
                yield
        return runs


class Anywhere:
    """Finds chunks at any offset: from left to right, the longest run at each place."""

    def __init__(self, index: DocumentIndex, rolling: RollingHash) -> None:
        self._index = index
        self._rolling = rolling
        self._chunk_size = rolling.window

    def learn(
        self, tokens: Tokens, hashes: list[ChunkHash], space: DocumentSpace
    ) -> Iterable[Entry]:
        """Return an entry for each whole chunk."""
        size = self._chunk_size
        keys = (self._rolling.chunks(tokens) + space.salt).tolist()
        for number, (key, chunk_hash) in enumerate(zip(keys, hashes, strict=True)):
            start = number * size
            digest = space.digest(tokens[start : start + size])
            yield Entry(chunk_hash, key, digest, start)

    def find(
        self, tokens: Tokens, space: DocumentSpace, count_ready: CountReady
    ) -> Runs:
        """Return the runs of known chunks; ready ones only."""
        runs: list[Run] = []
        free = 0
        num_hashed = 0
        size, last = self._chunk_size, len(tokens) - self._chunk_size
        for first in range(0, last + 1, SLICE_WINDOWS):
            if first:
                yield
            part = tokens[first : first + SLICE_WINDOWS + size - 1]
            keys = self._rolling.windows(part) + space.salt
            places = self._index.candidates(keys)
            for place, key in zip(places.tolist(), keys[places].tolist(), strict=True):
                start = first + place
                if start < free or not self._index.known(key):
                    continue
                run: Run | None = None
                digest = space.digest(tokens[start : start + size])
                for entry in [*self._index.find(key, digest)]:
                    hashes = yield from self._follow(entry, tokens, start)
                    num_ready = count_ready(hashes)
                    if num_ready > (len(run.hashes) if run else 0):
                        run = Run(entry.start, start, hashes[:num_ready])
                    num_hashed += len(hashes)
                    if num_hashed >= MATCH_STEP:
                        num_hashed = 0
                        yield
                if run is not None:
                    runs.append(run)
                    free = start + len(run.hashes) * size
        return runs

    def _follow(
        self, entry: Entry, tokens: Tokens, start: int
    ) -> Generator[None, None, list[ChunkHash]]:
        """Follow the document of a confirmed chunk as far as the prompt has it.

        A document's next chunk has the hash that its last one and the prompt's tokens
        give, so that looking it up confirms it.
        """
        size = self._chunk_size
        hashes = [entry.hash]
        for at in range(start + size, len(tokens) - size + 1, size):
            child = child_hash(hashes[-1], tokens[at : at + size].data)
            if self._index.get(child) is None:
                break
            hashes.append(child)
            if len(hashes) % MATCH_STEP == 0:
                yield
        return hashes
