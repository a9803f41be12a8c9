"""Which chunk goes when room is needed.

A new policy is one class with these four methods, in a file of `policies/`, and one
line in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvcore.errors import SetupError
from kvcore.keys import ChunkHash
from kvcore.storage.policies.lru import LRU
from kvcore.storage.policies.lru_uses import UsesLRU
from kvcore.storage.policies.s3fifo import S3FIFO


class EvictionPolicy(Protocol):
    """Order of chunks by worth. Every call is made under L1's lock.

    Each method MUST cost the same however many chunks there are, amortised.
    """

    def admit(self, key: ChunkHash) -> None:
        """Take in a chunk; a known one stays where it is.

        Not a use: that is counted once, by `touch`, when the request ends. So the
        first touch of a chunk is of the request that stored it.
        """

    def touch(self, key: ChunkHash) -> None:
        """Note that a request used a chunk; take in an unknown one first."""

    def discard(self, key: ChunkHash) -> None:
        """Forget a chunk, known or not."""

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Forget and return the least worthy chunk that is `evictable`; or none.

        A chunk that is not evictable right now MUST be forgotten too: who ends its
        last hold admits it again. So a held chunk is passed over at most once a hold
        or touch, and nobody walks over the held ones at every eviction.
        """

    def coming(self, count: int) -> list[ChunkHash]:
        """Return about the next `count` that `evict` would return, changing nothing."""


POLICIES: dict[str, type[EvictionPolicy]] = {
    "lru": LRU,
    "lru-uses": UsesLRU,
    "s3fifo": S3FIFO,
}
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
