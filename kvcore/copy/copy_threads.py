"""Threads that share one large copy with the thread that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class CopyThreads:
    """`num_threads` threads for one copy, including the calling one.

    Each free thread takes the next item. The caller never waits for a helper that has
    not started: if all are busy, it does every item.
    """

    def __init__(self, num_threads: int = 1, name: str = "copy") -> None:
        self._num_helpers = num_threads - 1
        self._pool = ThreadPoolExecutor(max(1, self._num_helpers), name)

    def each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """Call `work` once per item, in any order; return when all are done.

        Raises:
            Exception: what `work` raised, after every thread has stopped.
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
            # Wait for all before raising: one may fail while another still copies.
            errors = [h.exception() for h in helpers if not h.cancel()]
        for error in filter(None, errors):
            raise error

    def close(self) -> None:
        """Stop the threads; no copy is running."""
        self._pool.shutdown()


CALLING_THREAD = CopyThreads()
"""Runs everything in the calling thread."""
