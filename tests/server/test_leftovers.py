"""What the dead left is searched for once, however many died."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcore.server import leftovers
from kvcore.server.leftovers import Leftovers


def test_many_deaths_are_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A death is searched after by what has not begun; by another, if that has."""
    queue: list[Callable[[], None]] = []
    found = Leftovers(queue.append)
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
