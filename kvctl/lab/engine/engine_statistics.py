"""What the slots of an engine count and measure together."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from msgspec.structs import replace

from kvctl.lab.engine.request_log import RequestEntry, RequestLog
from kvctl.lab.latency_samples import LatencyRecorder
from kvctl.lab.process_messages import EngineReport, Tally

MAX_ERRORS_TOLD = 10
HEAD_BYTES = 8
COUNTED_IN_TIME = (
    "requests",
    "errors",
    "tokens",
    "tokens_hit",
    "tokens_from_tiers",
    "store_bytes",
    "retrieve_bytes",
)
"""Of a tally, what a result shows over time."""


class EngineStatistics:
    """Counts, durations and a journal; any thread may add.

    Of what is played to warm up, only wrong bytes and errors count, and that its
    chunks have been seen.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tally = Tally()
        self._recorder = LatencyRecorder()
        self._heads: set[bytes] = set()
        self._warm_heads: set[bytes] = set()
        self._document_heads: set[bytes] = set()
        self._errors: list[str] = []
        self.journal = RequestLog()

    def add(
        self,
        tally: Tally,
        durations: dict[str, float],
        heads: Sequence[bytes] = (),
        errors: Sequence[str] = (),
        *,
        warm_up: bool = False,
    ) -> None:
        """Count something in; each error counts as one."""
        if warm_up:
            tally, durations = _of_warm_up(tally), {}
        with self._lock:
            self._tally.add(tally)
            self._tally.errors += len(errors)
            (self._warm_heads if warm_up else self._heads).update(heads)
            self._errors += errors[: MAX_ERRORS_TOLD - len(self._errors)]
        self._recorder.add(durations)

    def add_documents(self, tally: Tally, heads: Sequence[bytes]) -> None:
        """Count in how a request's documents were reused."""
        with self._lock:
            self._document_heads.update(heads)
            self._tally.add(tally)

    def note(self, entry: RequestEntry) -> None:
        """Enter a request in the journal."""
        self.journal.add(entry)

    def tally(self) -> Tally:
        """Return a copy of the counts so far."""
        with self._lock:
            return replace(self._tally)

    def end_window(self) -> None:
        """End a window of time, or a turn, and begin the next."""
        tally = self.tally()
        counts = {name: int(getattr(tally, name)) for name in COUNTED_IN_TIME}
        self._recorder.roll(counts)

    def report(self, next_index: int = 0, host: int = 0) -> EngineReport:
        """Return everything, and where in the workload the engine was."""
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
                journal=self.journal.packed(),
            )


def heads_of(packed: bytes) -> set[bytes]:
    """Unpack the heads of a report."""
    return {packed[at : at + HEAD_BYTES] for at in range(0, len(packed), HEAD_BYTES)}


def _of_warm_up(tally: Tally) -> Tally:
    return Tally(
        errors=tally.errors, bytes_wrong=tally.bytes_wrong, warm_ups=tally.requests
    )
