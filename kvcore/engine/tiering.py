"""Interface of the engine to the tiers behind L1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from kvcore.keys import ChunkHash, SessionKey
from kvcore.status import PrefetchStatus, TierStatus
from kvcore.storage.arena import Arena
from kvcore.storage.l1 import L1, Chunk
from kvcore.storage.required_parts import RequiredParts


class PrefetchTask(Protocol):
    """One lookup's prefetch. Its future is done at the deadline at the latest."""

    @property
    def future(self) -> Future[None]:
        """Done when L1 has what can be loaded; its result says nothing."""

    @property
    def outcome(self) -> str:
        """Why no more was loaded: "failed", "refused", "missing" or "late"."""

    @property
    def missing(self) -> Sequence[ChunkHash]:
        """The first chunk that every tier said it lacks, if any; after the future."""

    def settle(self) -> None:
        """Release what was loaded for this task; once, after the future."""

    def cancel(self) -> None:
        """Load nothing more; the future is done soon."""


class Tiering:
    """The tiers behind one L1; this base class is that of a server without tiers.

    Loop thread, except `stored`: any thread.
    """

    has_tiers = False
    """Whether chunks that L1 lacks may be elsewhere."""

    def prefetch(
        self,
        hashes: Sequence[ChunkHash],
        parts: RequiredParts,
        *,
        chunk_size: int,
        deadline: float,
        owner: SessionKey,
    ) -> PrefetchTask:
        """Load the leading chunks of `hashes` that L1 lacks; `settle` must follow.

        Raises:
            RuntimeError: there are no tiers.
        """
        raise RuntimeError("prefetch without tiers")

    def stored(self, chunks: Sequence[Chunk]) -> None:
        """Write back chunks of which parts were committed."""

    def used(self, chunks: Sequence[Chunk]) -> None:
        """Note that a lookup hit these chunks."""

    def status(self) -> tuple[TierStatus, ...]:
        """Describe each tier."""
        return ()

    def prefetches(self, limit: int) -> tuple[PrefetchStatus, ...]:
        """Describe the `limit` oldest prefetches."""
        return ()

    def num_prefetches(self) -> int:
        """Return the number of prefetches under way."""
        return 0

    def counters(self) -> dict[str, int]:
        """Return counters by name; each only grows."""
        return {}

    def close(self) -> None:
        """End all prefetches and writes, then the tiers; after the last copy."""


OpenTiering = Callable[[L1, Arena], Tiering]


def no_tiering(l1: L1, arena: Arena) -> Tiering:
    """Return the tiering of a server without tiers."""
    del l1, arena
    return Tiering()
