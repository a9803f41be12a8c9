"""Deterministic KV bytes, which can be checked without a copy of them.

A 64-bit word is a function of the chunk's hash, the rank, the group, K or V, the
layer, and its position in the chunk. A swap of chunks, ranks, groups, layers, K and V,
slots or heads is therefore detected. Replicated KV (MLA) is equal on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from kvctl.lab.config.model_geometry import Indices, Seeds, Words

HASH_BYTES = 32
BATCH_BYTES = 1 << 20
"""Bytes generated at once: large for numpy, and small enough for a CPU cache."""
POISON = 0xA5
"""Byte in blocks before a retrieve, which makes missing writes visible."""

WEYL = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
"""Weyl step and finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""


def chunk_seeds(hashes: bytes) -> Seeds:
    """Return the first word of each of the concatenated 32-byte chunk hashes."""
    return np.frombuffer(hashes, "<u8").reshape(-1, HASH_BYTES // 8)[:, 0]


def mix(values: Seeds) -> Seeds:
    """Return the mixed 64-bit values: splitmix64's finaliser."""
    values = (values ^ (values >> np.uint64(30))) * MIX_1
    values = (values ^ (values >> np.uint64(27))) * MIX_2
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class _PatternBatch:
    blocks: Indices
    """`[chunks, blocks per chunk]`"""
    words: Words
    """`[chunks, blocks per chunk, L, K, S, H, words]`, a view of scratch memory."""


class HostPattern:
    """Writes and checks one group of one rank's cache in host memory.

    Blocks are those of whole chunks, in order, `[chunks x blocks per chunk]`. Not
    thread-safe: calls share scratch memory.
    """

    def __init__(
        self, view: Words, group: int, rank: int | None, chunk_blocks: int
    ) -> None:
        self.view = view
        self.chunk_blocks = chunk_blocks
        planes = view.shape[1] * view.shape[2]
        self.salts = salts_of(rank, group, planes)
        block_bytes = view[0, 0, 0].nbytes
        self.block_words = block_bytes // view.itemsize
        num_words = -(-block_bytes // 8)
        steps = np.arange(chunk_blocks * num_words, dtype=np.uint64) * WEYL
        self.steps = steps.reshape(chunk_blocks, 1, num_words)
        self.batch_chunks = batch_chunks_of(steps.size * planes)
        shape = (self.batch_chunks, chunk_blocks, planes, num_words)
        self.scratch = np.empty(shape, np.uint64)

    def write(self, seeds: Seeds, blocks: Indices) -> None:
        """Write the chunks' bytes into blocks, except null blocks (-1)."""
        for batch in self._batches(seeds, blocks):
            valid = batch.blocks >= 0
            if valid.all():
                self.view[batch.blocks] = batch.words
            else:
                self.view[batch.blocks[valid]] = batch.words[valid]

    def count_wrong_bytes(self, seeds: Seeds, blocks: Indices) -> int:
        """Return the wrong bytes of the chunks' blocks, except null blocks (-1)."""
        wrong = 0
        for batch in self._batches(seeds, blocks):
            valid = batch.blocks >= 0
            whole = bool(valid.all())
            actual = self.view[batch.blocks if whole else batch.blocks[valid]]
            expected = batch.words if whole else batch.words[valid]
            if not np.array_equal(actual, expected):
                wrong += _count_different(actual, expected)
        return wrong

    def _batches(self, seeds: Seeds, blocks: Indices) -> Iterator[_PatternBatch]:
        by_chunk = blocks.reshape(len(seeds), self.chunk_blocks)
        for first in range(0, len(seeds), self.batch_chunks):
            last = min(first + self.batch_chunks, len(seeds))
            yield _PatternBatch(by_chunk[first:last], self._words(seeds[first:last]))

    def _words(self, seeds: Seeds) -> Words:
        """Return whole chunks in scratch memory, shaped like the view's blocks."""
        planes = mix(seeds[:, None] + self.salts)
        made = self.scratch[: len(seeds)]
        np.add(planes[:, None, :, None], self.steps, out=made)
        words = made.view(self.view.dtype)[..., : self.block_words]
        return words.reshape(len(seeds), self.chunk_blocks, *self.view.shape[1:])


def salts_of(rank: int | None, group: int, num_planes: int) -> Seeds:
    """Return a salt per plane; `rank` is None if all ranks are equal."""
    digests = [
        sha256(f"{rank}/{group}/{p}".encode()).digest() for p in range(num_planes)
    ]
    return np.frombuffer(b"".join(digest[:8] for digest in digests), "<u8")


def batch_chunks_of(chunk_words: int) -> int:
    """Return the number of chunks of `chunk_words` words to generate at once."""
    return max(1, BATCH_BYTES // (8 * chunk_words))


def _count_different(actual: Words, expected: Words) -> int:
    shape = (*actual.shape[:-1], -1)
    left = np.ascontiguousarray(actual).view(np.uint8).reshape(shape)
    right = np.ascontiguousarray(expected).view(np.uint8).reshape(shape)
    return int(np.count_nonzero(left != right))
