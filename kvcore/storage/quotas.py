"""Quotas of L1 by cache salt or model.

Free room may be used by any of them. When a chunk must be evicted, an account over its
quota loses its own chunks first, and evicts its own chunks for its own stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcore.keys import ChunkHash, SaltedKey, SessionKey
from kvcore.status import QuotaStatus
from kvcore.storage.eviction import EvictionPolicy, make_policy

if TYPE_CHECKING:
    from kvcore.storage.chunk import Chunk


@dataclass(slots=True, eq=False)
class QuotaAccount:
    """The chunks of one cache salt or model, and their order of eviction."""

    max_bytes: int
    order: EvictionPolicy
    used_bytes: int = 0
    """Bytes of its chunks' parts, those being written included."""

    def is_over(self, more_bytes: int = 0) -> bool:
        """Return whether it exceeds its quota, or would with `more_bytes`."""
        return self.used_bytes + more_bytes > self.max_bytes


def owner_salt(owner: SessionKey) -> str | None:
    """Return the cache salt that an owner carries."""
    return owner.salt if isinstance(owner, SaltedKey) else None


def make_order(
    policy: str,
    limits: Mapping[str, int],
    salt_of: Callable[[SessionKey], str | None] = owner_salt,
) -> EvictionPolicy:
    """Make the named policy, with quotas where there are any.

    Raises:
        SetupError: there is no such policy.
    """
    if not limits:
        return make_policy(policy)
    return Quotas(lambda: make_policy(policy), limits, salt_of)


class Quotas:
    """An eviction policy over all chunks, and one more per account with a quota.

    Limits are in bytes, by `salt:NAME` and `model:NAME`. A chunk is on its salt's
    account, else on its model's: those of the session that stored it first.
    """

    def __init__(
        self,
        make: Callable[[], EvictionPolicy],
        limits: Mapping[str, int],
        salt_of: Callable[[SessionKey], str | None],
    ) -> None:
        self._order = make()
        self._accounts = {
            name: QuotaAccount(size, make()) for name, size in limits.items()
        }
        self._salt_of = salt_of
        self.index: Mapping[ChunkHash, Chunk] = {}
        """Every chunk that the policy knows; set by the chunks' owner."""

    def account(self, model: str, owner: SessionKey | None) -> QuotaAccount | None:
        """Return the account of a session's chunks; None without a quota."""
        salt = self._salt_of(owner) if owner is not None else None
        salted = self._accounts.get(f"salt:{salt}") if salt is not None else None
        return salted or self._accounts.get(f"model:{model}")

    def status(self) -> tuple[QuotaStatus, ...]:
        """Describe each account."""
        return tuple(
            QuotaStatus(name, each.used_bytes, int(each.max_bytes))
            for name, each in self._accounts.items()
        )

    # -- the policy -------------------------------------------------------------------

    def admit(self, key: ChunkHash) -> None:
        """Enter a chunk here and on its account."""
        for order in self._orders(key):
            order.admit(key)

    def touch(self, key: ChunkHash) -> None:
        """Count a use of a chunk here and on its account."""
        for order in self._orders(key):
            order.touch(key)

    def discard(self, key: ChunkHash) -> None:
        """Remove a chunk here and from its account."""
        for order in self._orders(key):
            order.discard(key)

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Evict from accounts over quota, the furthest over first; then from all."""
        for account in self._over():
            victim = self.evict_from(account, evictable)
            if victim is not None:
                return victim

        def forgotten(key: ChunkHash) -> bool:
            account = self.index[key].account
            if account is not None:
                account.order.discard(key)
            return evictable(key)

        return self._order.evict(forgotten)

    def evict_from(
        self, account: QuotaAccount, evictable: Callable[[ChunkHash], bool]
    ) -> ChunkHash | None:
        """Evict a chunk of one account, as `evict` does."""

        def forgotten(key: ChunkHash) -> bool:
            self._order.discard(key)
            return evictable(key)

        return account.order.evict(forgotten)

    def coming(self, count: int) -> list[ChunkHash]:
        """Return about the next `count` that `evict` would return."""
        found: dict[ChunkHash, None] = {}
        for order in (*(account.order for account in self._over()), self._order):
            found.update(dict.fromkeys(order.coming(count)))
        return list(found)[:count]

    def _orders(self, key: ChunkHash) -> Iterator[EvictionPolicy]:
        yield self._order
        account = self.index[key].account
        if account is not None:
            yield account.order

    def _over(self) -> list[QuotaAccount]:
        over = [account for account in self._accounts.values() if account.is_over()]
        over.sort(key=lambda account: account.max_bytes - account.used_bytes)
        return over
