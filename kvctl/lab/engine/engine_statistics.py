"""The request log, counts and latencies of one simulated engine."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from kvctl.lab.latency import LatencyRecorder
from kvctl.lab.process_messages import EngineReport, Tally

MAX_ERROR_MESSAGES = 10
HEAD_BYTES = 8
"""Leading bytes of a chunk hash that a report contains."""

Records = npt.NDArray[np.void]


class Outcome(IntEnum):
    """How a request ended."""

    DONE = 0
    FAILED = 1
    ABORTED = 2


@dataclass(slots=True)
class RequestEntry:
    """One request. Times are of the host's monotonic clock."""

    due_s: float
    begun_s: float
    ended_s: float
    lag_s: float
    ttft_s: float
    """A duration; NaN if unknown."""
    tokens: int
    tokens_hit: int
    session: int
    engine: int
    step: int = 0
    preemptions: int = 0
    outcome: Outcome = Outcome.DONE
    warm_up: bool = False


TYPES = {"float": "f8", "int": "i8", "Outcome": "u1", "bool": "u1"}
RECORD = np.dtype([(one.name, TYPES[str(one.type)]) for one in fields(RequestEntry)])
"""A request in a packed log."""


def unpack(logs: Iterable[bytes]) -> Records:
    """Return the records of several packed logs, in order of their ends."""
    records = np.frombuffer(b"".join(logs), RECORD)
    return records[np.argsort(records["ended_s"], kind="stable")]


class EngineStatistics:
    """Counts, durations and the request log. Thread-safe.

    Of the warm-up only errors, wrong bytes and seen chunks are kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tally = Tally()
        self._recorder = LatencyRecorder()
        self._heads: set[bytes] = set()
        self._warm_heads: set[bytes] = set()
        self._document_heads: set[bytes] = set()
        self._errors: list[str] = []
        self._rows: list[tuple[object, ...]] = []

    def add(
        self,
        tally: Tally,
        durations: dict[str, float],
        heads: Sequence[bytes] = (),
        errors: Sequence[str] = (),
        *,
        warm_up: bool = False,
    ) -> None:
        """Add counts, durations in seconds, chunk heads, and errors."""
        if warm_up:
            durations = {}
            tally = Tally(
                errors=tally.errors,
                bytes_wrong=tally.bytes_wrong,
                warm_ups=tally.requests,
            )
        with self._lock:
            self._tally.add(tally)
            self._tally.errors += len(errors)
            (self._warm_heads if warm_up else self._heads).update(heads)
            self._errors += errors[: MAX_ERROR_MESSAGES - len(self._errors)]
        self._recorder.add(durations)

    def add_documents(self, tally: Tally, heads: Sequence[bytes]) -> None:
        """Add the reuse of a request's documents."""
        with self._lock:
            self._document_heads.update(heads)
            self._tally.add(tally)

    def add_entry(self, entry: RequestEntry) -> None:
        """Add a request that has ended to the log."""
        row = astuple(entry)
        with self._lock:
            self._rows.append(row)

    def tally(self) -> Tally:
        """Return a copy of the counts so far."""
        with self._lock:
            return replace(self._tally)

    def end_window(self) -> None:
        """Close a window of time, or of an interleaved run's turn."""
        tally = self.tally()
        self._recorder.roll(
            {
                "requests": tally.requests,
                "errors": tally.errors,
                "tokens": tally.tokens,
                "tokens_hit": tally.tokens_hit,
                "tokens_from_tiers": tally.tokens_from_tiers,
                "store_bytes": tally.store_bytes,
                "retrieve_bytes": tally.retrieve_bytes,
            }
        )

    def report(self, next_index: int = 0, host: int = 0) -> EngineReport:
        """Return all measurements, and the engine's position in the workload."""
        self.end_window()
        with self._lock:
            return EngineReport(
                tally=self._tally,
                samples=self._recorder.samples(),
                chunk_heads=b"".join(sorted(self._heads)),
                errors=tuple(self._errors),
                next_index=next_index,
                warm_heads=b"".join(sorted(self._warm_heads)),
                document_heads=b"".join(sorted(self._document_heads)),
                host=host,
                journal=np.array(self._rows, RECORD).tobytes(),
            )


def heads_of(packed: bytes) -> set[bytes]:
    """Return the chunk heads of a report's packed field."""
    return {packed[at : at + HEAD_BYTES] for at in range(0, len(packed), HEAD_BYTES)}
