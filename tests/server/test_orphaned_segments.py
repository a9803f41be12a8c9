"""Orphaned segments are removed in one search, however many processes ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcore.server import application
from kvcore.server.application import OrphanRemover


def test_many_ended_processes_need_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends during a search schedules another."""
    queue: list[Callable[[], None]] = []
    remover = OrphanRemover(queue.append)
    searches: list[int] = []

    def search(prefix: str) -> list[str]:
        searches.append(len(queue))
        if len(searches) == 1:
            remover.schedule()
        return []

    monkeypatch.setattr(application, "remove_dead", search)
    for _ in range(300):
        remover.schedule()
    assert len(queue) == 1
    queue.pop()()
    assert len(queue) == 1
    queue.pop()()
    assert len(searches) == 2
    assert not queue
