"""LRU: what was not used for the longest time goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from kvcore.keys import ChunkHash


class LRU:
    """The least recently touched chunk goes first.

    With a request's chunks touched tail to head this gives the hits of an LRU over
    leaves only: a chunk never outlives its prefix for want of a touch.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkHash, None] = OrderedDict()

    def admit(self, key: ChunkHash) -> None:
        """Enter an unknown chunk as the most recent one."""
        self._order.setdefault(key)

    def touch(self, key: ChunkHash) -> None:
        """Make the chunk the most recent one."""
        order = self._order
        if key in order:
            order.move_to_end(key)
        else:
            order[key] = None

    def discard(self, key: ChunkHash) -> None:
        """Forget a chunk, known or not."""
        self._order.pop(key, None)

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Pop from the old end until one may go."""
        order = self._order
        while order:
            key, _ = order.popitem(last=False)
            if evictable(key):
                return key
        return None

    def coming(self, count: int) -> list[ChunkHash]:
        """Return the old end."""
        return list(islice(self._order, count))

    def __len__(self) -> int:
        return len(self._order)
