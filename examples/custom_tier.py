"""A server with a tier of its own behind L1: a dictionary in its process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from urllib.parse import SplitResult

import kvcore
from kvcore.tiers.tier import (
    MISSING,
    Backend,
    Deadline,
    LoadItem,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    Usage,
)
from kvcore.tiers.tier_url import TierOptions


class MemoryBackend(Backend):
    """Blocking calls; the server adds threads, deadlines, back-off and counters."""

    def __init__(self) -> None:
        self.records: dict[PartKey, bytes] = {}

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Return whether each part is here."""
        return [key in self.records for key in keys]

    def load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Copy records into L1's own pages."""
        for item in items:
            record = self.records.get(item.key)
            yield MISSING if record is None else item.fill(record)

    def store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Keep a copy of each part with its header."""
        for item in items:
            self.records[item.key] = item.record()
            yield StoreResult.DONE

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Remove parts; return how many were here."""
        return sum(self.records.pop(key, None) is not None for key in keys)

    def usage(self, deadline: Deadline) -> Usage:
        """Return the bytes of all records."""
        return Usage(sum(map(len, self.records.values())))


def open_memory(url: SplitResult, options: TierOptions) -> MemoryBackend:
    """Open the tier of a `memory:` URL."""
    return MemoryBackend()


kvcore.register_tier("memory", open_memory, TierOptions)


def main() -> None:
    """Serve with the tier, or start such a server and read from the tier."""
    if sys.argv[1:2] == ["serve"]:
        from kvctl.cli import main as kvctl

        kvctl()
        return
    from local_server import start_server
    from store_and_retrieve import run_engine

    command = (sys.executable, __file__, "serve")
    with start_server("--tier", "memory://here", command=command) as server:
        run_engine(server, "engine-a")
        with kvcore.KVClient(server) as client:
            while not client.status().counters["parts_written"]:
                pass  # Write-back runs after the store.
            client.clear()  # L1 is empty: what is found comes from the tier.
        run_engine(server, "engine-b")


if __name__ == "__main__":
    main()
