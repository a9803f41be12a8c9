"""What the dead left is searched for once, however many died."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcore.server import orphaned_segments as leftovers
from kvcore.server.orphaned_segments import OrphanRemover


def test_many_deaths_are_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A death is searched after by what has not begun; by another, if that has."""
    queue: list[Callable[[], None]] = []
    found = OrphanRemover(queue.append)
    searches: list[int] = []

    def search(prefix: str) -> list[str]:
        searches.append(len(queue))
        if len(searches) == 1:
            found.remove_soon()
        return []

    monkeypatch.setattr(leftovers, "remove_dead", search)
    for _ in range(300):
        found.remove_soon()
    assert len(queue) == 1
    queue.pop()()
    assert len(queue) == 1
    queue.pop()()
    assert len(searches) == 2
    assert not queue
