"""Threads that share one large copy with the lane that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class CopyThreads:
    """`num_threads` at one copy, the caller's own among them.

    Nobody waits for a helper that has not begun: whoever is free takes the next item,
    and a caller whose helpers are busy elsewhere does all of it.
    """

    def __init__(self, num_threads: int = 1, name: str = "copy") -> None:
        self._num_helpers = num_threads - 1
        self._pool = ThreadPoolExecutor(max(1, self._num_helpers), name)

    def each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """Do `work` once for every item, in any order; return when all is done.

        Raises:
            Exception: what `work` raised; no thread is at it any more.
        """
        todo = [*items]
        # Taking the next of a list's iterator is one step under the GIL.
        left = iter(todo)

        def take() -> None:
            for item in left:
                work(item)

        num_helpers = min(self._num_helpers, len(todo) - 1)
        helpers = [self._pool.submit(take) for _ in range(num_helpers)]
        try:
            take()
        finally:
            # All of them are waited for before any is heard: one may fail while
            # another still copies.
            errors = [h.exception() for h in helpers if not h.cancel()]
        for error in filter(None, errors):
            raise error

    def close(self) -> None:
        """End the threads; no copy is under way."""
        self._pool.shutdown()


CALLING_THREAD = CopyThreads()
"""The caller's thread and no other."""
