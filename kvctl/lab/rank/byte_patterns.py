"""Deterministic KV bytes, which can be checked without a copy of them.

A 64-bit word is a function of the chunk's hash, the rank, the group, K or V, the
layer, and its position in the chunk. A swap of chunks, ranks, groups, layers, K and V,
slots or heads is therefore detected. Replicated KV (MLA) is equal on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

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


class BlockPattern(ABC):
    """Writes and checks one group of one rank's cache.

    Blocks are those of whole chunks, in order, `[chunks x blocks per chunk]`. `rank` is
    None if all ranks are equal. Not thread-safe: calls may share scratch memory.
    """

    def __init__(
        self, view: Any, group: int, rank: int | None, chunk_blocks: int
    ) -> None:
        self.view = view
        """Blocks of the group, `[N, L, K, S, H, words]`."""
        self.chunk_blocks = chunk_blocks
        planes = view.shape[1] * view.shape[2]
        block_bytes = view[0, 0, 0].nbytes
        self.block_words = block_bytes // view.itemsize
        self.salts = salts_of(rank, group, planes)
        num_words = -(-block_bytes // 8)
        steps = np.arange(chunk_blocks * num_words, dtype=np.uint64) * WEYL
        self.steps = steps.reshape(chunk_blocks, 1, num_words)
        self.batch_chunks = max(1, BATCH_BYTES // (8 * steps.size * planes))

    def write(self, seeds: Seeds, blocks: Indices) -> None:
        """Write the chunks' bytes into blocks, except null blocks (-1)."""
        for index, words in self._batches(seeds, blocks):
            self.view[index] = words

    def count_wrong_bytes(self, seeds: Seeds, blocks: Indices) -> int:
        """Return the wrong bytes of the chunks' blocks, except null blocks (-1)."""
        return sum(
            self._count_different(self.view[index], words)
            for index, words in self._batches(seeds, blocks)
        )

    def _batches(self, seeds: Seeds, blocks: Indices) -> Iterator[tuple[Any, Any]]:
        """Yield the index of some blocks in the view, and the words of these blocks."""
        by_chunk = blocks.reshape(len(seeds), self.chunk_blocks)
        for first in range(0, len(seeds), self.batch_chunks):
            ids = by_chunk[first : first + self.batch_chunks]
            words = self._words(seeds[first : first + self.batch_chunks])
            valid = ids >= 0
            if valid.all():
                yield self._index(ids), words
            else:
                yield self._index(ids[valid]), words[self._index(valid)]

    @abstractmethod
    def _words(self, seeds: Seeds) -> Any:
        """Return whole chunks, `[chunks, blocks per chunk, L, K, S, H, words]`."""

    @abstractmethod
    def _index(self, array: npt.NDArray[Any]) -> Any:
        """Return block ids, or a mask of blocks, for an array like the view."""

    @abstractmethod
    def _count_different(self, actual: Any, expected: Any) -> int:
        """Return the number of bytes that differ."""


class HostPattern(BlockPattern):
    """The pattern of a group in host memory."""

    def __init__(
        self, view: Words, group: int, rank: int | None, chunk_blocks: int
    ) -> None:
        super().__init__(view, group, rank, chunk_blocks)
        shape = (self.batch_chunks, chunk_blocks, self.salts.size, self.steps.shape[2])
        self._scratch = np.empty(shape, np.uint64)

    def _words(self, seeds: Seeds) -> Words:
        planes = mix(seeds[:, None] + self.salts)
        made = self._scratch[: len(seeds)]
        np.add(planes[:, None, :, None], self.steps, out=made)
        words: Words = made.view(self.view.dtype)[..., : self.block_words]
        return words.reshape(len(seeds), self.chunk_blocks, *self.view.shape[1:])

    def _index(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array

    def _count_different(self, actual: Words, expected: Words) -> int:
        if np.array_equal(actual, expected):
            return 0
        shape = (*actual.shape[:-1], -1)
        left = np.ascontiguousarray(actual).view(np.uint8).reshape(shape)
        right = np.ascontiguousarray(expected).view(np.uint8).reshape(shape)
        return int(np.count_nonzero(left != right))


def salts_of(rank: int | None, group: int, num_planes: int) -> Seeds:
    """Return a salt per plane; `rank` is None if all ranks are equal."""
    digests = [
        sha256(f"{rank}/{group}/{p}".encode()).digest() for p in range(num_planes)
    ]
    return np.frombuffer(b"".join(digest[:8] for digest in digests), "<u8")
