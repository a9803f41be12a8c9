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

MATCH_STEP = 64
"""Chunks confirmed before others are served, about 100 us."""

IsReady = Callable[[ChunkHash], bool]


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

    def find(self, tokens: Tokens, space: DocumentSpace, is_ready: IsReady) -> Runs:
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

    def find(self, tokens: Tokens, space: DocumentSpace, is_ready: IsReady) -> Runs:
        """Return every paragraph, stored or not: a tier may have what L1 lacks."""
        del is_ready
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

    def find(self, tokens: Tokens, space: DocumentSpace, is_ready: IsReady) -> Runs:
        """Return the runs of known chunks; ready ones only."""
        runs: list[Run] = []
        free = 0
        num_confirmed = 0
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
                entries = self._confirmed(key, tokens, start, space, is_ready)
                run = yield from self._longest(entries, tokens, start, is_ready)
                if run is None:
                    continue
                runs.append(run)
                free = start + len(run.hashes) * size
                num_confirmed += len(run.hashes)
                if num_confirmed >= MATCH_STEP:
                    num_confirmed = 0
                    yield
        return runs

    def _confirmed(
        self,
        key: int,
        tokens: Tokens,
        start: int,
        space: DocumentSpace,
        is_ready: IsReady,
    ) -> list[Entry]:
        digest = space.digest(tokens[start : start + self._chunk_size])
        return [e for e in self._index.find(key, digest) if is_ready(e.hash)]

    def _longest(
        self, entries: list[Entry], tokens: Tokens, start: int, is_ready: IsReady
    ) -> Generator[None, None, Run | None]:
        """Follow all documents that hold the first chunk until one is left over.

        A document's next chunk has the hash that its last one and the prompt's tokens
        give, so that looking it up confirms it.
        """
        size = self._chunk_size
        alive = [(entry, [entry.hash]) for entry in entries]
        best, at = alive, start
        while alive:
            best, at = alive, at + size
            following = tokens[at : at + size]
            if len(following) < size:
                break
            alive = []
            for number, (entry, hashes) in enumerate(best, 1):
                if number % MATCH_STEP == 0:
                    yield
                child = child_hash(hashes[-1], following.data)
                if self._index.get(child) is not None and is_ready(child):
                    hashes.append(child)
                    alive.append((entry, hashes))
        if not best:
            return None
        entry, hashes = best[0]
        return Run(entry.start, start, hashes)
