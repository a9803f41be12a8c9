"""The host buffer of all parts, and the allocator of its pages."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from typing import NewType

from kvcore.errors import Internal, SetupError
from kvcore.extents import Allocation, Extent
from kvcore.shm import SEGMENT_PREFIX, Bytes, Segment

PageRun = NewType("PageRun", tuple[int, int])
"""First page and number of pages."""


class PageAllocator:
    """Runs of free pages, found by size and merged with their neighbours.

    Free runs lie in bins by the bit length of their page count. A request takes the
    newest run of its own bin if that is large enough, else splits a run of the next
    higher non-empty bin (where every run is large enough), and gathers several runs,
    largest first, only if no such bin is left. Cost depends on the number of runs
    returned, not on the number of pages, parts or free runs.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._count_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        # Dicts as ordered sets: the newest run is the warmest in the CPU's caches.
        self._bins: list[dict[int, None]] = [
            {} for _ in range(num_pages.bit_length() + 1)
        ]
        self._filled = 0
        if num_pages:
            self._insert(0, num_pages)

    def allocate(self, count: int) -> list[PageRun] | None:
        """Allocate `count` pages (at least 1) in few runs.

        Returns None, and allocates nothing, if fewer than `count` are free.
        """
        if count > self.num_free:
            return None
        self.num_free -= count
        start = self._find(count)
        if start is not None:
            return [self._take(start, count)]
        return self._gather(count)

    def free(self, runs: Iterable[PageRun]) -> None:
        """Free pages, each exactly once."""
        for start, count in runs:
            self.num_free += count
            left = self._start_before.get(start)
            if left is not None:
                count += self._remove(left)
                start = left
            if start + count in self._count_at:
                count += self._remove(start + count)
            self._insert(start, count)

    def claim(self, runs: Iterable[PageRun]) -> None:
        """Allocate given runs; only before any other allocation.

        Raises:
            Internal: they overlap or are out of range.
        """
        for start, count in sorted(runs):
            last = self._start_before.get(self.num_pages, self.num_pages)
            if start < last or start + count > self.num_pages:
                raise Internal(f"pages {start} to {start + count} cannot be claimed")
            self._remove(last)
            self.num_free -= count
            if start > last:
                self._insert(last, start - last)
            if start + count < self.num_pages:
                rest = self.num_pages - start - count
                self._insert(start + count, rest)

    def free_runs(self) -> list[PageRun]:
        """Return every free run by first page; for tests and inspection."""
        return [PageRun(run) for run in sorted(self._count_at.items())]

    def _find(self, count: int) -> int | None:
        own = count.bit_length()
        if self._bins[own]:
            newest = next(reversed(self._bins[own]))
            if self._count_at[newest] >= count:
                return newest
        higher = self._filled >> (own + 1)
        if not higher:
            return None
        lowest = (higher & -higher).bit_length() + own
        return next(reversed(self._bins[lowest]))

    def _gather(self, count: int) -> list[PageRun]:
        runs = []
        while count:
            start = next(reversed(self._bins[self._filled.bit_length() - 1]))
            run = self._take(start, min(count, self._count_at[start]))
            runs.append(run)
            count -= run[1]
        return runs

    def _take(self, start: int, count: int) -> PageRun:
        have = self._remove(start)
        if have > count:
            self._insert(start + count, have - count)
        return PageRun((start, count))

    def _insert(self, start: int, count: int) -> None:
        self._count_at[start] = count
        self._start_before[start + count] = start
        size = count.bit_length()
        self._bins[size][start] = None
        self._filled |= 1 << size

    def _remove(self, start: int) -> int:
        count = self._count_at.pop(start)
        del self._start_before[start + count]
        size = count.bit_length()
        del self._bins[size][start]
        if not self._bins[size]:
            self._filled &= ~(1 << size)
        return count


class Arena:
    """Shared memory in pages, allocated and touched once, owned by this process.

    A `kept` arena outlives the process once `keep` is called: a later run that opens
    the same name with the same size gets the same bytes.

    Every part starts on a page boundary, so it wastes less than one page. Not
    thread-safe: L1's lock guards it. The bytes need no lock: only the holder of a
    reservation writes them, and committed bytes do not change.
    """

    def __init__(
        self,
        num_bytes: int,
        page_bytes: int,
        name: str | None = None,
        *,
        kept: bool = False,
    ) -> None:
        num_pages = num_bytes // page_bytes
        if num_pages <= 0:
            raise SetupError(
                f"an arena of {num_bytes:,} bytes holds no page of {page_bytes:,}: "
                "make it larger or its pages smaller"
            )
        self.page_bytes = page_bytes
        self.total_bytes = num_pages * page_bytes
        self.name = name or f"{SEGMENT_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        self._pages = PageAllocator(num_pages)
        earlier = Segment.adopt(self.name, self.total_bytes) if kept else None
        self.was_found = earlier is not None
        """Whether it is an earlier run's, with its bytes."""
        self._is_kept = self.was_found
        self._may_keep = kept
        self._segment = earlier or Segment.create(
            self.name, self.total_bytes, touch=True
        )

    @property
    def array(self) -> Bytes:
        """All bytes, `[total_bytes]`; raises `Closed` after `close`."""
        return self._segment.array

    @property
    def used_bytes(self) -> int:
        """Bytes of the allocated pages."""
        return (self._pages.num_pages - self._pages.num_free) * self.page_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the free pages."""
        return self._pages.num_free * self.page_bytes

    def num_pages_for(self, num_bytes: int) -> int:
        """Return the number of pages for `num_bytes`."""
        return -(-num_bytes // self.page_bytes)

    def allocate(self, num_bytes: int) -> Allocation | None:
        """Allocate `num_bytes` (at least 1), in one extent if possible.

        Returns None if there is no room. The last extent is cut to the requested size.
        """
        runs = self._pages.allocate(self.num_pages_for(num_bytes))
        if runs is None:
            return None
        page = self.page_bytes
        if len(runs) == 1:
            return (Extent(runs[0][0] * page, num_bytes),)
        extents = [Extent(start * page, count * page) for start, count in runs]
        spare = sum(extent.length for extent in extents) - num_bytes
        last = extents[-1]
        extents[-1] = Extent(last.offset, last.length - spare)
        return tuple(extents)

    def free(self, allocation: Allocation) -> None:
        """Free an allocation, exactly once."""
        page = self.page_bytes
        self._pages.free(
            PageRun((extent.offset // page, self.num_pages_for(extent.length)))
            for extent in allocation
        )

    def claim(self, allocations: Iterable[Allocation]) -> None:
        """Allocate given extents; only before any other allocation."""
        page = self.page_bytes
        self._pages.claim(
            PageRun((extent.offset // page, self.num_pages_for(extent.length)))
            for extents in allocations
            for extent in extents
        )

    def keep(self) -> None:
        """Keep a `kept` arena for a later run from now on.

        Until then `close` removes a new one, so that a failed start leaves none.
        """
        self._is_kept = self._may_keep

    def close(self) -> None:
        """Unlink and unmap the memory; views of it keep their bytes.

        A kept arena's name stays, for a later run.
        """
        if not self._is_kept:
            self._segment.unlink()
        self._segment.close()

    def __repr__(self) -> str:
        return f"<Arena {self.name} {self.used_bytes} of {self.total_bytes} bytes>"
