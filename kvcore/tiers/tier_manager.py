"""The tiers below an L1, with their prefetch, write-back and timer thread."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

import msgspec

from kvcore.config import PrefetchConfig, ServerConfig, WriteBackConfig
from kvcore.engine.tiering import OpenTiering, Tiering
from kvcore.errors import SetupError
from kvcore.keys import ChunkHash, SessionKey
from kvcore.status import PrefetchStatus, TierStatus
from kvcore.storage.arena import Arena
from kvcore.storage.l1 import L1, Chunk
from kvcore.storage.required_parts import RequiredParts
from kvcore.tiers.prefetch import Prefetcher, PrefetchJob
from kvcore.tiers.tier import Tier
from kvcore.tiers.tier_url import open_tier
from kvcore.tiers.timer_thread import TimerThread
from kvcore.tiers.write_back import WriteBack


def open_tiers(urls: Sequence[str]) -> list[Tier]:
    """Open a server's tiers, in order; all or none.

    Raises:
        SetupError: one cannot be opened, or two have one name.
    """
    tiers: list[Tier] = []
    with ExitStack() as stack:
        for url in urls:
            tier = open_tier(url)
            stack.callback(tier.close)
            if any(other.name == tier.name for other in tiers):
                raise SetupError(f"two tiers are called {tier.name}: give one ?name=")
            tiers.append(tier)
        stack.pop_all()
    return tiers


def open_tiering(urls: Sequence[str], config: ServerConfig) -> OpenTiering:
    """Open tiers by URL; return what puts them behind an L1.

    Raises:
        SetupError: as of `open_tiers`.
    """
    tiers = open_tiers(urls)

    def put_behind(l1: L1, arena: Arena) -> TierManager:
        return TierManager(l1, arena, tiers, config.prefetch, config.write_back)

    return put_behind


PROBE_S = 1.0
"""Period of probes of tiers that are down."""


class TierManager(Tiering):
    """The tiers of one L1, and the thread that schedules transfers between them.

    It owns the tiers.
    """

    has_tiers = True

    def __init__(
        self,
        l1: L1,
        arena: Arena,
        tiers: Sequence[Tier],
        prefetch: PrefetchConfig,
        write_back: WriteBackConfig,
        coordinator: TimerThread | None = None,
    ) -> None:
        self._tiers = tiers
        self._max_bytes = arena.total_bytes
        for tier in tiers:
            tier.attach(arena.name, arena.array)
        self._timer_thread = coordinator or TimerThread("manager")
        self.write_back = WriteBack(
            l1, arena.array, tiers, self._timer_thread, write_back
        )
        self.prefetcher = Prefetcher(
            l1, arena.array, tiers, self.write_back, self._timer_thread, prefetch
        )
        self._timer_thread.post(self._probe)
        if coordinator is None:
            self._timer_thread.start()

    def prefetch(
        self,
        hashes: Sequence[ChunkHash],
        parts: RequiredParts,
        *,
        chunk_size: int,
        deadline: float,
        owner: SessionKey,
    ) -> PrefetchJob:
        """Load the leading chunks of `hashes` missing in L1; see `Tiering.prefetch`.

        `parts` names every part of a chunk; `deadline` is a time of the timer
        thread's clock.
        """
        most = self._max_bytes // max(parts.chunk_bytes, 1) + 1
        job = PrefetchJob(
            self.prefetcher, owner, hashes[:most], parts, chunk_size, deadline
        )
        self.prefetcher.submit(job)
        return job

    def used(self, chunks: Sequence[Chunk]) -> None:
        """Apply the write policy to chunks that a lookup hit."""
        self.write_back.used(chunks)

    def num_prefetches(self) -> int:
        """Return the number of prefetch jobs in progress."""
        return self.prefetcher.num_jobs

    def stored(self, chunks: Sequence[Chunk]) -> None:
        """Write back chunks of which parts were committed."""
        self.write_back.stored(chunks)

    def _probe(self) -> None:
        for tier in self._tiers:
            if not tier.health().up:
                tier.probe()
        self._timer_thread.at(self._timer_thread.clock() + PROBE_S, self._probe)

    def status(self) -> tuple[TierStatus, ...]:
        """Describe the tiers and their write queues, as known so far.

        Each is probed asynchronously, for the next call.
        """
        for tier in self._tiers:
            tier.probe()
        return tuple(
            TierStatus(**msgspec.to_builtins(tier.health()), write_back=queue)
            for tier, queue in zip(self._tiers, self.write_back.status(), strict=True)
        )

    def prefetches(self, limit: int) -> tuple[PrefetchStatus, ...]:
        """Describe the `limit` oldest prefetch jobs."""
        return self.prefetcher.status(limit)

    def counters(self) -> dict[str, int]:
        """Return all counters by name."""
        return asdict(self.prefetcher.counters) | asdict(self.write_back.counters)

    def close(self) -> None:
        """End every job, the tiers, and the thread; after the last copy."""
        self._timer_thread.post(self.prefetcher.close)
        self._timer_thread.post(self.write_back.close)
        with ExitStack() as stack:
            # Calls in progress still post their results to the timer thread.
            stack.callback(self._timer_thread.close)
            for tier in self._tiers:
                stack.callback(tier.close)
