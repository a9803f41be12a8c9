"""S3-FIFO: three queues that keep what is used once from pushing out the rest.

Source: Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023; the
sizes and thresholds are the paper's. Queues are sized by what is resident, since
chunks of several sizes share the memory and no count of them is its capacity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from kvcore.keys import ChunkHash

SMALL_SHARE = 0.1
"""Of the resident chunks, those on probation."""
MAIN_SHARE = 1 - SMALL_SHARE
"""Of the resident chunks, the others; as many evicted ones are remembered."""
PROMOTED_USES = 2
"""Uses after the first that take a chunk from probation into the main queue."""
MAX_USES = 3
NEW = -1
"""Uses of a chunk whose own request has not ended: that touch is not a second use."""

Uses = OrderedDict[ChunkHash, int]


class S3FIFO:
    """New chunks are on probation; those used again stay for some rounds more."""

    def __init__(self) -> None:
        self._small: Uses = OrderedDict()
        self._main: Uses = OrderedDict()
        self._ghosts: OrderedDict[ChunkHash, None] = OrderedDict()

    def admit(self, key: ChunkHash) -> None:
        """Enter on probation; into the main queue what was evicted not long ago."""
        if key in self._small or key in self._main:
            return
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = NEW
        else:
            self._small[key] = NEW

    def touch(self, key: ChunkHash) -> None:
        """Count a use; the order stays."""
        queue = self._main
        uses = queue.get(key)
        if uses is None:
            queue = self._small
            uses = queue.get(key)
        if uses is None:
            self.admit(key)
            self.touch(key)
        elif uses < MAX_USES:
            queue[key] = uses + 1

    def discard(self, key: ChunkHash) -> None:
        """Forget a chunk, known or not, and that it was ever here."""
        self._small.pop(key, None)
        self._main.pop(key, None)
        self._ghosts.pop(key, None)

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Pop whichever queue is over its share; used ones go round once more."""
        small, main, ghosts = self._small, self._main, self._ghosts
        while small or main:
            on_probation = len(small) >= SMALL_SHARE * (len(small) + len(main))
            if on_probation:
                key, uses = small.popitem(last=False)
                if uses >= PROMOTED_USES:
                    main[key] = 0
                    continue
            else:
                key, uses = main.popitem(last=False)
                if uses > 0:
                    main[key] = uses - 1
                    continue
            may_go = evictable(key)
            if on_probation or not may_go:  # What is held is in use: it comes back.
                ghosts[key] = None
                while len(ghosts) > MAIN_SHARE * (len(small) + len(main)) + 1:
                    ghosts.popitem(last=False)
            if may_go:
                return key
        return None

    def coming(self, count: int) -> list[ChunkHash]:
        """Return the old end of both queues, less what would go round again."""
        old = [
            *(k for k, n in islice(self._small.items(), count) if n < PROMOTED_USES),
            *(k for k, n in islice(self._main.items(), count) if n <= 0),
        ]
        return old[:count]
