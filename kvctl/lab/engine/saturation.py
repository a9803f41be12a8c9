"""Ends a sweep when the system no longer keeps up with a step."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from kvctl.lab.workload.load_config import Load, Sweep

GRACE = 0.1
"""Of a step's length, for its last requests to end."""


@dataclass(slots=True)
class _StepCount:
    begun: int = 0
    kept: int = 0
    """Ended before the step and its grace did."""


@dataclass(slots=True)
class SaturationDetector:
    """Counts how many of each step's requests end in time; any thread may call."""

    load: Load
    _steps: dict[int, _StepCount] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, step: int) -> None:
        """Count a request that begins."""
        if isinstance(self.load, Sweep):
            with self._lock:
                self._steps.setdefault(step, _StepCount()).begun += 1

    def end(self, step: int, at_s: float) -> bool:
        """Count one that ended, so long after the start; say whether to go no further.

        A step is judged by the first request that ends after its grace.
        """
        if not isinstance(self.load, Sweep):
            return False
        step_s, grace_s = self.load.step_s, self.load.step_s * GRACE
        with self._lock:
            if at_s <= (step + 1) * step_s + grace_s:
                self._steps.setdefault(step, _StepCount()).kept += 1
            judged = int((at_s - grace_s) // step_s) - 1
            count = self._steps.get(judged)
            return count is not None and count.kept < self.load.kept_up * count.begun
