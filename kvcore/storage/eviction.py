"""Eviction policies: the order in which chunks leave L1 when room is needed.

A policy is a class with the methods of `EvictionPolicy`; `register_policy` makes it
available to the option `l1.eviction` and to `kvctl bench simulate`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from math import inf
from typing import Protocol

from kvcore.errors import SetupError
from kvcore.keys import ChunkHash


class EvictionPolicy(Protocol):
    """Order of chunks by worth. Every call is made under L1's lock.

    Each method MUST cost the same however many chunks there are, amortised.
    """

    def admit(self, key: ChunkHash) -> None:
        """Enter a chunk; a known one keeps its place.

        Not a use: that is counted once, by `touch`, when the request ends. So the
        first touch of a chunk is that of the request that stored it.
        """

    def touch(self, key: ChunkHash) -> None:
        """Count a request's use of a chunk; enter an unknown one first."""

    def discard(self, key: ChunkHash) -> None:
        """Remove a chunk, known or not."""

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Remove and return the least worthy chunk that is `evictable`, or None.

        A chunk that is not evictable now MUST be removed too: the end of its last hold
        admits it again. So a held chunk is skipped at most once per hold or touch, and
        evictions never walk over the held ones.
        """

    def coming(self, count: int) -> list[ChunkHash]:
        """Return about the next `count` that `evict` would return; changes nothing."""


class LRU:
    """Least recently used: the chunk touched longest ago goes first.

    With a request's chunks touched tail to head this gives the hits of an LRU over
    leaves only: a chunk never outlives its prefix for lack of a touch.
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
        """Remove a chunk, known or not."""
        self._order.pop(key, None)

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Pop from the old end until one is evictable."""
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


_USE_LEVELS = (0, 0, 1, 1, 2)
"""Level of a chunk by its uses, the last for that many and more. 0 uses: the request
that stored it has not ended."""
_MAX_LEVEL_USES = len(_USE_LEVELS) - 1
_LEVEL_BONUS = 1.0
"""Worth of a level, in touches per resident chunk."""


class UsesLRU:
    """LRU that keeps chunks used by several requests longer.

    A chunk's worth is the time of its last use, in touches, plus a bonus for each
    doubling of its uses. Levels by the logarithm of the uses are those of the
    Multi-Queue algorithm (Zhou et al., USENIX ATC 2001); comparing their oldest chunks
    replaces its timers. Levels, bonus and memory were chosen on public traces:
    docs/performance.md.
    """

    def __init__(self) -> None:
        self._uses: dict[ChunkHash, int] = {}
        self._levels: tuple[OrderedDict[ChunkHash, int], ...] = tuple(
            OrderedDict() for _ in range(_USE_LEVELS[-1] + 1)
        )
        """Chunk to the time of its last use, oldest first."""
        self._ghosts: OrderedDict[ChunkHash, int] = OrderedDict()
        """Uses of as many evicted chunks as there are resident ones."""
        self._now = 0

    def admit(self, key: ChunkHash) -> None:
        """Enter an unknown chunk as just used; a ghost keeps its uses."""
        if key not in self._uses:
            self._uses[key] = uses = self._ghosts.pop(key, 0)
            self._levels[_USE_LEVELS[uses]][key] = self._now

    def touch(self, key: ChunkHash) -> None:
        """Count a use, and make the chunk the most recent of its level."""
        self._now = now = self._now + 1
        uses = self._uses.get(key)
        if uses is None:
            uses = self._ghosts.pop(key, 0)
        else:
            del self._levels[_USE_LEVELS[uses]][key]
        if uses < _MAX_LEVEL_USES:
            uses += 1
        self._uses[key] = uses
        self._levels[_USE_LEVELS[uses]][key] = now

    def discard(self, key: ChunkHash) -> None:
        """Remove a chunk, known or not, and its ghost."""
        self._ghosts.pop(key, None)
        uses = self._uses.pop(key, None)
        if uses is not None:
            del self._levels[_USE_LEVELS[uses]][key]

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Pop the least worthy until one is evictable; held ones become ghosts."""
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
        bonus = _LEVEL_BONUS * len(self._uses)
        old = [
            (time + number * bonus, number, key)
            for number, level in enumerate(self._levels)
            for key, time in islice(level.items(), count)
        ]
        old.sort(key=lambda each: each[:2])
        return [key for _, _, key in old[:count]]

    def _least(self) -> OrderedDict[ChunkHash, int]:
        """Return the level whose oldest chunk is worth least, the lowest on a tie."""
        bonus = _LEVEL_BONUS * len(self._uses)
        least, least_worth, above = self._levels[0], inf, 0.0
        for level in self._levels:
            for oldest in level.values():
                if oldest + above < least_worth:
                    least, least_worth = level, oldest + above
                break
            above += bonus
        return least


SMALL_SHARE = 0.1
"""Share of the resident chunks in the small (probationary) queue."""
MAIN_SHARE = 1 - SMALL_SHARE
"""Share in the main queue; as many evicted chunks are remembered as ghosts."""
PROMOTED_USES = 2
"""Uses after the first that promote a chunk to the main queue."""
_MAX_S3_USES = 3
NEW = -1
"""Uses of a chunk whose own request has not ended: that touch is not a second use."""

Uses = OrderedDict[ChunkHash, int]


class S3FIFO:
    """S3-FIFO: a small queue filters chunks that are used once.

    Source: Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023;
    sizes and thresholds are the paper's. Queues are sized by the resident chunks, since
    chunks of several sizes share the memory and no count of them is its capacity.
    """

    def __init__(self) -> None:
        self._small: Uses = OrderedDict()
        self._main: Uses = OrderedDict()
        self._ghosts: OrderedDict[ChunkHash, None] = OrderedDict()

    def admit(self, key: ChunkHash) -> None:
        """Enter the small queue, or the main queue if evicted recently."""
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
        elif uses < _MAX_S3_USES:
            queue[key] = uses + 1

    def discard(self, key: ChunkHash) -> None:
        """Remove a chunk, known or not, and its ghost."""
        self._small.pop(key, None)
        self._main.pop(key, None)
        self._ghosts.pop(key, None)

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Pop from the queue over its share; used chunks are reinserted."""
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
            if on_probation or not may_go:  # A held chunk is in use and returns.
                ghosts[key] = None
                while len(ghosts) > MAIN_SHARE * (len(small) + len(main)) + 1:
                    ghosts.popitem(last=False)
            if may_go:
                return key
        return None

    def coming(self, count: int) -> list[ChunkHash]:
        """Return the old end of both queues without what would be reinserted."""
        old = [
            *(k for k, n in islice(self._small.items(), count) if n < PROMOTED_USES),
            *(k for k, n in islice(self._main.items(), count) if n <= 0),
        ]
        return old[:count]


POLICIES: dict[str, type[EvictionPolicy]] = {
    "lru": LRU,
    "lru-uses": UsesLRU,
    "s3fifo": S3FIFO,
}
"""Policy by its name in the configuration."""


def register_policy(name: str, policy: type[EvictionPolicy]) -> None:
    """Make a policy available under a name; before the server starts.

    Raises:
        SetupError: the name is taken.
    """
    if name in POLICIES:
        raise SetupError(f"l1.eviction = {name!r}: this policy exists already")
    POLICIES[name] = policy


def make_policy(name: str) -> EvictionPolicy:
    """Make the policy that the configuration names.

    Raises:
        SetupError: there is no such policy.
    """
    if name not in POLICIES:
        known = ", ".join(sorted(POLICIES))
        raise SetupError(f"l1.eviction = {name!r}: known policies are {known}")
    return POLICIES[name]()
