"""Counters of the engine since it started."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class EngineCounters:
    """Written by the loop thread only, read by any; each only grows."""

    lookups: int = 0
    lookup_chunks: int = 0
    lookup_chunks_hit: int = 0
    stores: int = 0
    parts_stored: int = 0
    parts_present: int = 0
    parts_dropped: int = 0
    bytes_stored: int = 0
    retrieves: int = 0
    retrieves_missing: int = 0
    bytes_retrieved: int = 0
    deadlines_exceeded: int = 0
    sessions_ended: int = 0
    clients_gone: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self)
