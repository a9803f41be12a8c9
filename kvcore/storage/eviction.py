"""Which chunk goes when room is needed.

A new policy is one class with these three methods and one line in `POLICIES`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Protocol

from kvcore.errors import SetupError
from kvcore.keys import ChunkHash


class EvictionPolicy(Protocol):
    """Order of chunks by worth. Every call is made under L1's lock.

    Each method MUST cost the same however many chunks there are, amortised.
    """

    def touch(self, key: ChunkHash) -> None:
        """Take in a chunk, or note that it was used."""

    def discard(self, key: ChunkHash) -> None:
        """Forget a chunk, known or not."""

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Forget and return the least worthy chunk that is `evictable`; or none.

        A chunk that is not evictable right now MUST be forgotten too: who ends its
        last hold touches it again. So a held chunk is passed over at most once a
        hold or touch, and nobody walks over the held ones at every eviction.
        """

    def coming(self, count: int) -> list[ChunkHash]:
        """Return about the next `count` that `evict` would return, changing nothing."""


class LRU:
    """The least recently touched chunk goes first.

    With a request's chunks touched tail to head this gives the hits of an LRU over
    leaves only: a chunk never outlives its prefix for want of a touch.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkHash, None] = OrderedDict()

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


POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRU}
"""Name in the configuration to policy."""


def make_policy(name: str) -> EvictionPolicy:
    """Make the policy that the configuration names.

    Raises:
        SetupError: there is no such policy.
    """
    if name not in POLICIES:
        known = ", ".join(sorted(POLICIES))
        raise SetupError(f"l1.eviction = {name!r}: known policies are {known}")
    return POLICIES[name]()
