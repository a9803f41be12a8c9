"""The one place where KV's bytes move, between paged caches and the arena.

The server's lanes call it, and workers that copy themselves. Whoever calls has
reserved or held the parts, and settles that afterwards, whatever happens here.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcore.copy.block_arrays import BlockArray, TokenRange, spans_in, whole_spans
from kvcore.copy.paged_cache import PagedCache
from kvcore.extents import Checksum, PartLocation, buffers_of, checksum_of
from kvcore.shm import Bytes

PartLocations = Sequence[Sequence[PartLocation]]
"""Parts to copy, one list a cache group."""


class ChunkCopier:
    """Copies into and out of one arena. Any thread, one call a cache and direction."""

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
        """Fill whole parts from blocks; return their checksums, group after group.

        None at all where no checksums are wanted.
        """
        checksums: list[Checksum] = []
        for cache, rows, parts in zip(caches, blocks, places, strict=True):
            spans = whole_spans(rows, parts, self._chunk_size)
            checksums += cache.gather(spans, self._arena, checksums=self._checksums)
        return checksums

    def find_wrong(self, places: PartLocations) -> list[int]:
        """Return the indexes of chunks whose bytes are not those of their checksum.

        Parts without a checksum pass.
        """
        return sorted(
            {
                place.index
                for parts in places
                for place in parts
                if place.checksum and self._checksum(place) != place.checksum
            }
        )

    def _checksum(self, place: PartLocation) -> Checksum:
        return checksum_of(buffers_of(self._arena.data, place.extents))

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
            spans = spans_in(rows, parts, tokens)
            cache.scatter(spans, self._arena)
            num_tokens = sum(span.end_token - span.first_token for span in spans)
            num_bytes += num_tokens * cache.layout.part.num_bytes // self._chunk_size
        return num_bytes
