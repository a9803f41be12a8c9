"""One line for each request of a run, in columns that merge across processes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

RECORD = np.dtype(
    [
        ("due_s", "f8"),
        ("begun_s", "f8"),
        ("ended_s", "f8"),
        ("lag_s", "f8"),
        ("ttft_s", "f8"),
        ("tokens", "i8"),
        ("tokens_hit", "i8"),
        ("session", "u8"),
        ("engine", "i4"),
        ("step", "i4"),
        ("preemptions", "i4"),
        ("outcome", "u1"),
        ("warm_up", "u1"),
    ]
)
"""Times are of the host's monotonic clock, `ttft_s` a duration; NaN: there is none."""

Records = npt.NDArray[np.void]


class Outcome(IntEnum):
    """How a request ended."""

    DONE = 0
    FAILED = 1
    ABORTED = 2


@dataclass(slots=True)
class RequestEntry:
    """One request, in the order of `RECORD`."""

    due_s: float
    begun_s: float
    ended_s: float
    lag_s: float
    ttft_s: float
    tokens: int
    tokens_hit: int
    session: int
    engine: int
    step: int = 0
    preemptions: int = 0
    outcome: Outcome = Outcome.DONE
    warm_up: bool = False


class RequestLog:
    """Collects entries; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[tuple[object, ...]] = []

    def add(self, entry: RequestEntry) -> None:
        """Take note of a request that has ended."""
        row = astuple(entry)
        with self._lock:
            self._rows.append(row)

    def packed(self) -> bytes:
        """Return all entries as bytes of `RECORD`."""
        with self._lock:
            return np.array(self._rows, RECORD).tobytes()


def unpack(many: Iterable[bytes]) -> Records:
    """Put the journals of several processes together, in the order of their ends."""
    records = np.frombuffer(b"".join(many), RECORD)
    return records[np.argsort(records["ended_s"], kind="stable")]
