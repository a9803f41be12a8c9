"""Driver resources with several users: opened for the first, closed by the last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Generic, TypeVar

from kvcore.errors import DeviceFailed

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SharedResources(Generic[K, V]):
    """Open resources by key. Any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: dict[K, V] = {}
        self._num_users: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def use(
        self, key: K, open_one: Callable[[], V], close: Callable[[V], None]
    ) -> Iterator[V]:
        """Return the open resource of a key; open it for the first user.

        `close` is called after the last user; its `DeviceFailed` is logged.

        Raises:
            Exception: what `open_one` raises.
        """
        with self._lock:
            if key not in self._open:
                self._open[key] = open_one()
                self._num_users[key] = 0
            self._num_users[key] += 1
            resource = self._open[key]
        try:
            yield resource
        finally:
            with self._lock:
                self._num_users[key] -= 1
                if not self._num_users[key]:
                    del self._open[key], self._num_users[key]
                    quietly(partial(close, resource))


def quietly(close: Callable[[], None]) -> None:
    """Call `close`; log a `DeviceFailed` instead of raising it."""
    try:
        close()
    except DeviceFailed as error:
        log.warning("closing: %s", error.message)
