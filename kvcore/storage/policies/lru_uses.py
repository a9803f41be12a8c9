"""LRU in which a chunk that several requests used may lie longer.

A chunk's worth is the time of its last use, in touches, plus a bonus for each doubling
of its uses. Levels by the logarithm of the uses are those of the Multi-Queue algorithm
(Zhou et al., USENIX ATC 2001); comparing their oldest chunks replaces its timers.
Levels, bonus and memory were chosen on public traces: docs/performance.md.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from math import inf

from kvcore.keys import ChunkHash

LEVELS = (0, 0, 1, 1, 2)
"""Level of a chunk by its uses; the last one is for so many and more. 0 uses: its own
request has not ended yet."""
MAX_USES = len(LEVELS) - 1
BONUS = 1.0
"""What a level is worth, in touches of every resident chunk."""


class UsesLRU:
    """The least worthy of each level's oldest chunks goes first."""

    def __init__(self) -> None:
        self._uses: dict[ChunkHash, int] = {}
        self._levels: tuple[OrderedDict[ChunkHash, int], ...] = tuple(
            OrderedDict() for _ in range(LEVELS[-1] + 1)
        )
        """Chunk to the time of its last use, oldest first."""
        self._ghosts: OrderedDict[ChunkHash, int] = OrderedDict()
        """Uses of as many evicted chunks as there are resident ones."""
        self._now = 0

    def admit(self, key: ChunkHash) -> None:
        """Enter an unknown chunk as just used; its uses count on where they were."""
        if key not in self._uses:
            self._uses[key] = uses = self._ghosts.pop(key, 0)
            self._levels[LEVELS[uses]][key] = self._now

    def touch(self, key: ChunkHash) -> None:
        """Count a use, and make the chunk the most recent of its level."""
        self._now = now = self._now + 1
        uses = self._uses.get(key)
        if uses is None:
            uses = self._ghosts.pop(key, 0)
        else:
            del self._levels[LEVELS[uses]][key]
        if uses < MAX_USES:
            uses += 1
        self._uses[key] = uses
        self._levels[LEVELS[uses]][key] = now

    def discard(self, key: ChunkHash) -> None:
        """Forget a chunk, known or not, and that it was ever here."""
        self._ghosts.pop(key, None)
        uses = self._uses.pop(key, None)
        if uses is not None:
            del self._levels[LEVELS[uses]][key]

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Pop the least worthy until one may go; what is held counts on later."""
        uses, ghosts = self._uses, self._ghosts
        while uses:
            key, _ = self._least().popitem(last=False)
            ghosts[key] = uses.pop(key)
            while len(ghosts) > len(uses) + 1:
                ghosts.popitem(last=False)
            if evictable(key):
                return key
        return None

    def coming(self, count: int) -> list[ChunkHash]:
        """Merge the old ends of the levels by worth."""
        bonus = BONUS * len(self._uses)
        old = [
            (time + number * bonus, number, key)
            for number, level in enumerate(self._levels)
            for key, time in islice(level.items(), count)
        ]
        old.sort(key=lambda each: each[:2])
        return [key for _, _, key in old[:count]]

    def _least(self) -> OrderedDict[ChunkHash, int]:
        """Return the level whose oldest chunk is worth least, the lowest of equals."""
        bonus = BONUS * len(self._uses)
        least, least_worth, above = self._levels[0], inf, 0.0
        for level in self._levels:
            for oldest in level.values():
                if oldest + above < least_worth:
                    least, least_worth = level, oldest + above
                break
            above += bonus
        return least
