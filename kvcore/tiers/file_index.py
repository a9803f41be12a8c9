"""Which files a directory holds, in the order of their use, within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReservedSpace:
    """Answer to a claim; unless `granted`, nothing was claimed."""

    granted: bool
    evicted: tuple[str, ...] = ()
    """Least recently used names, forgotten to make room: the caller removes them."""


class FileIndex:
    """Names with their sizes, and claims of files that are being written.

    Thread-safe; claims count as used, so the bound holds at every moment.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.num_evicted = 0
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used = 0
        self._removed: set[str] | None = None
        """While old files are listed: what went since the listing began."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the files known and claimed."""
        return self._used

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def touch(self, name: str) -> None:
        """Note a use."""
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)

    def add_old(self, files: Iterable[tuple[str, int]]) -> tuple[str, ...]:
        """Add files, latest used first, as older than all known; return evicted.

        Those that were removed since `clear` are there no longer.
        """
        with self._lock:
            removed, self._removed = self._removed or (), None
            for name, size in files:
                if name not in self._sizes and name not in removed:
                    self._sizes[name] = size
                    self._sizes.move_to_end(name, last=False)
                    self._used += size
            return self._evict(0)

    def claim(self, size: int) -> ReservedSpace:
        """Make room for a file that is about to be written."""
        with self._lock:
            if self.max_bytes is not None and size > self.max_bytes:
                return ReservedSpace(False)
            evicted = self._evict(size)
            bound = self.max_bytes
            if bound is not None and self._used + size > bound:  # Others claim it.
                return ReservedSpace(False, evicted)
            self._used += size
            return ReservedSpace(True, evicted)

    def settle(self, name: str, size: int) -> None:
        """Turn a claim into a file, the latest used."""
        with self._lock:
            self._used -= self._sizes.pop(name, 0)
            self._sizes[name] = size

    def release(self, size: int) -> None:
        """Give up a claim."""
        with self._lock:
            self._used -= size

    def remove(self, name: str) -> bool:
        """Forget a file; return whether it was known."""
        with self._lock:
            size = self._sizes.pop(name, None)
            self._used -= size or 0
            if self._removed is not None:
                self._removed.add(name)
            return size is not None

    def shrink(self, num_bytes: int) -> tuple[str, ...]:
        """Forget at least so many bytes of the least recently used files."""
        with self._lock:
            return self._evict_to(max(0, self._used - num_bytes))

    def clear(self) -> None:
        """Forget all files, before those that are there are listed; claims stay."""
        with self._lock:
            self._removed = set()
            self._used -= sum(self._sizes.values())
            self._sizes.clear()

    def _evict(self, size: int) -> tuple[str, ...]:
        if self.max_bytes is None:
            return ()
        return self._evict_to(self.max_bytes - size)

    def _evict_to(self, bound: int) -> tuple[str, ...]:
        evicted = []
        while self._used > bound and self._sizes:
            name, size = self._sizes.popitem(last=False)
            self._used -= size
            evicted.append(name)
        self.num_evicted += len(evicted)
        return tuple(evicted)
