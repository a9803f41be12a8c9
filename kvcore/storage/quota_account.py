"""What one cache salt or model keeps of its quota."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.storage.eviction import EvictionPolicy


@dataclass(slots=True, eq=False)
class QuotaAccount:
    """One space: what it may keep, what it has, and the order in which that goes."""

    max_bytes: int
    order: EvictionPolicy
    used_bytes: int = 0
    """Of its chunks' parts, those being written included."""

    def is_over(self, more_bytes: int = 0) -> bool:
        """Say whether it has more than it may, or would with so many more."""
        return self.used_bytes + more_bytes > self.max_bytes
