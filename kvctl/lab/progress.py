"""How far a run is, on the console."""

from __future__ import annotations

from kvctl.console import Progress
from kvctl.lab.process_messages import Tally
from kvctl.lab.runner import RunWatcher
from kvctl.lab.workload.access_generators import Survey


class ConsoleProgress(RunWatcher):
    """Shows requests done, hit rate and errors."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._share = 0.0

    def phase(self, name: str) -> None:
        """Show the phase beside the share reached."""
        self._progress.update(self._share, name)

    def progress(self, done: Tally, planned: Survey) -> None:
        """Show the counts."""
        self._share = done.requests / planned.num_requests
        rate = done.tokens_hit / done.tokens if done.tokens else 0.0
        self._progress.update(
            self._share,
            f"{done.requests:,} of {planned.num_requests:,} requests, hit rate "
            f"{rate:.3f}, {done.errors} errors, {done.bytes_wrong} bytes wrong",
        )
