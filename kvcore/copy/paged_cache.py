"""A worker's paged cache, and copies of chunks between caches and the arena.

Prefix and blend requests differ only in how they make chunk spans. The server's copy
lanes and workers that copy their own caches use the same copier. The caller has
reserved or held the parts, and commits, aborts or releases them whatever the copy does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Protocol

from kvcore.copy.block_arrays import BlockArray, ChunkSpans, TokenRange
from kvcore.extents import Checksum, PartLocation, buffers_of, checksum_of
from kvcore.layout import KVLayout
from kvcore.shm import Bytes

PartLocations = Sequence[Sequence[PartLocation]]
"""Parts to copy, one sequence per cache group."""


class PagedCache(Protocol):
    """One cache group of one instance, in memory of any kind.

    An implementation MUST check every span before it copies the first byte, MUST
    write no byte outside the spans' extents (gather) or outside the units of the given
    blocks and tokens (scatter), and MUST allow one gather and one scatter at a time
    from different threads. All bytes are copied when a call returns. No two spans of
    one call share bytes.
    """

    layout: KVLayout

    def gather(
        self, spans: ChunkSpans, arena: Bytes, *, checksums: bool = False
    ) -> list[Checksum]:
        """Copy blocks into parts; return the parts' checksums in order, if wanted.

        Raises:
            BadRequest: a block id or token range out of bounds, or a null block.
        """

    def scatter(self, spans: ChunkSpans, arena: Bytes) -> None:
        """Copy parts into blocks; null blocks are skipped.

        Raises:
            BadRequest: a block id or token range out of bounds.
        """

    def close(self) -> None:
        """Release the resources of the copies, once all have ended; not the memory."""


class ChunkCopier:
    """Copies into and out of one arena.

    Any thread; one call at a time per cache and direction.
    """

    def __init__(self, arena: Bytes, chunk_size: int, *, checksums: bool) -> None:
        self._arena = arena
        self._chunk_size = chunk_size
        self._checksums = checksums

    def gather(
        self,
        caches: Sequence[PagedCache],
        blocks: Sequence[BlockArray],
        places: PartLocations,
    ) -> list[Checksum]:
        """Copy whole chunks into parts; return the checksums, group after group.

        The list is empty where no checksums are wanted.
        """
        checksums: list[Checksum] = []
        for cache, rows, parts in zip(caches, blocks, places, strict=True):
            whole = TokenRange(0, len(rows) * self._chunk_size, 0, self._chunk_size)
            spans = ChunkSpans.of(rows, parts, whole)
            checksums += cache.gather(spans, self._arena, checksums=self._checksums)
        return checksums

    def find_wrong(self, places: PartLocations) -> list[int]:
        """Return the indexes of chunks whose bytes do not match their checksum.

        Parts without a checksum pass.
        """
        memory = self._arena.data
        return sorted(
            {
                place.index
                for place in chain.from_iterable(places)
                if place.checksum
                and checksum_of(buffers_of(memory, place.extents)) != place.checksum
            }
        )

    def scatter(
        self,
        caches: Sequence[PagedCache],
        blocks: Sequence[BlockArray],
        places: PartLocations,
        tokens: TokenRange,
    ) -> int:
        """Copy a token range from parts into blocks; return the bytes copied."""
        num_bytes = 0
        for cache, rows, parts in zip(caches, blocks, places, strict=True):
            spans = ChunkSpans.of(rows, parts, tokens)
            cache.scatter(spans, self._arena)
            part_bytes = cache.layout.part.num_bytes
            num_bytes += spans.num_tokens * part_bytes // self._chunk_size
        return num_bytes
