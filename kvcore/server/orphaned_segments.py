"""What dead processes shared and nobody took away."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvcore.shm import SEGMENT_PREFIX, remove_dead

log = logging.getLogger(__name__)


def remove_orphans() -> None:
    """Remove the segments whose owners live no more."""
    for name in remove_dead(SEGMENT_PREFIX):
        log.info("removed %s, left behind by a dead process", name)


class OrphanRemover:
    """One search for however many die at once, by whoever `do_behind` has do it."""

    def __init__(self, do_behind: Callable[[Callable[[], None]], None]) -> None:
        self._do_behind = do_behind
        self._is_asked_for = False

    def remove_soon(self) -> None:
        """Have what a process left removed that is dead by now."""
        if not self._is_asked_for:
            self._is_asked_for = True
            self._do_behind(self._remove)

    def _remove(self) -> None:
        # First: who dies during the search may be missed by it.
        self._is_asked_for = False
        remove_orphans()
