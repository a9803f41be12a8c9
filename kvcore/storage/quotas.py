"""What one cache salt or model may keep when others need the room.

Room that nobody needs may be used by anyone. Once something must go, a space that is
over its quota loses its own chunks first, and what it asks for is at its own expense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from kvcore.keys import ChunkHash, SessionKey
from kvcore.status import QuotaStatus
from kvcore.storage.chunk import Chunk
from kvcore.storage.eviction import EvictionPolicy, make_policy
from kvcore.storage.quota_account import QuotaAccount


def make_order(
    policy: str, limits: Mapping[str, int], salt_of: Callable[[SessionKey], str | None]
) -> EvictionPolicy:
    """Make the named policy, with quotas where there are any.

    Raises:
        SetupError: there is no such policy.
    """
    if not limits:
        return make_policy(policy)
    return Quotas(lambda: make_policy(policy), limits, salt_of)


class Quotas:
    """An eviction policy over all chunks, and one more for each space with a quota.

    Limits are in bytes, by `salt:NAME` and `model:NAME`. A chunk is on its salt's
    account, or else on its model's, as those of the session that stored it first.
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
        """Every chunk that the policy is told of; set by who owns the chunks."""

    def account(self, model: str, owner: SessionKey | None) -> QuotaAccount | None:
        """Find whose account a session's chunks are on; none without a quota."""
        salt = self._salt_of(owner) if owner is not None else None
        salted = self._accounts.get(f"salt:{salt}") if salt is not None else None
        return salted or self._accounts.get(f"model:{model}")

    def status(self) -> tuple[QuotaStatus, ...]:
        """Describe each space."""
        return tuple(
            QuotaStatus(name, each.used_bytes, int(each.max_bytes))
            for name, each in self._accounts.items()
        )

    # -- the policy -------------------------------------------------------------------

    def admit(self, key: ChunkHash) -> None:
        """Take in a chunk, here and on its account."""
        for order in self._orders(key):
            order.admit(key)

    def touch(self, key: ChunkHash) -> None:
        """Note a use of a chunk, here and on its account."""
        for order in self._orders(key):
            order.touch(key)

    def discard(self, key: ChunkHash) -> None:
        """Forget a chunk, here and on its account."""
        for order in self._orders(key):
            order.discard(key)

    def evict(self, evictable: Callable[[ChunkHash], bool]) -> ChunkHash | None:
        """Evict from the spaces over their quota, the furthest first; then from all."""
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
