"""A cache that this process copies itself, between its own memory and the arena."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Lock
from typing import Any

from kvcore.errors import Closed, Unavailable, UnknownInstance
from kvcore.layout import CacheGroup, KVLayout
from kvcore.parts import Checksum
from kvcore.protocol import Retrieve, Store
from kvcore.shm import Segment
from kvcore.transport.moves import Mover, Places
from kvcore.transport.paged import PagedCache
from kvcore.transport.plan import Range, read_blocks

Memory = Sequence[Any]
"""What a registration's handles stand for, in their order; flat bytes on a host."""
MakeCache = Callable[[KVLayout, Memory], PagedCache]
"""Makes the cache of one group, for memory of whatever kind."""


class Mapped:
    """A cache and the arena of one run of the server. Used as long as it is held."""

    def __init__(
        self,
        layouts: Sequence[KVLayout],
        caches: Sequence[PagedCache],
        arena: Segment,
        chunk_size: int,
        *,
        checksums: bool,
    ) -> None:
        self._layouts = layouts
        self._caches = caches
        self._chunk_size = chunk_size
        self.arena = arena.name
        self._mover = Mover(arena.array, chunk_size, checksums=checksums)

    def gather(self, request: Store, places: Places) -> list[Checksum]:
        """Fill the parts that were reserved for a store."""
        tokens = Range.to_store(request.start, request.end, self._chunk_size)
        blocks = read_blocks(self._layouts, request.blocks, tokens)
        return self._mover.gather(self._caches, blocks, places)

    def find_wrong(self, places: Places) -> list[int]:
        """Return which chunks are not as they were stored, where that is asked."""
        return self._mover.find_wrong(places)

    def scatter(self, request: Retrieve, places: Places) -> int:
        """Write the parts that are held for a retrieve; return the bytes."""
        skip = request.skip_first_n_tokens
        tokens = Range.to_retrieve(request.start, request.end, skip, self._chunk_size)
        blocks = read_blocks(self._layouts, request.blocks, tokens)
        return self._mover.scatter(self._caches, blocks, places, tokens)


class Direction:
    """A thread for what was submitted, and one copy at a time whoever makes it."""

    def __init__(self, name: str) -> None:
        self.lane = ThreadPoolExecutor(1, name)
        self._turn = Lock()
        self._is_closed = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one's turn; `UnknownInstance` when the cache has gone meanwhile."""
        with self._turn:
            if self._is_closed:
                raise UnknownInstance("unregistered before the copy's turn came")
            yield

    def close(self) -> None:
        """Wait for who has the turn; nobody has another."""
        self._is_closed = True
        with self._turn:
            self.lane.shutdown(wait=False)


class UnderWay:
    """Copies that touch the arena just now."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._count = 0
        self._is_closed = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """Touch the arena; `Closed` when that is over."""
        with self._changed:
            if self._is_closed:
                raise Closed("the client was closed")
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody begin, and wait for those who have."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._count)


class OwnCache:
    """Memory of this process that was registered as private."""

    def __init__(
        self,
        instance_id: str,
        groups: Sequence[CacheGroup],
        memory: Memory,
        make_cache: MakeCache,
    ) -> None:
        self._groups = groups
        self._memory = memory
        self._make_cache = make_cache
        self._mapped: Mapped | None = None
        self.stores = Direction(f"store-{instance_id[:40]}")
        self.retrieves = Direction(f"retrieve-{instance_id[:40]}")

    def map(self, arena: Segment, chunk_size: int, *, checksums: bool) -> None:
        """Meet a run of the server, whose chunks may be of another size."""
        sizes = [part.nbytes for part in self._memory]
        layouts = [KVLayout.derive(group, sizes, chunk_size) for group in self._groups]
        caches = [self._make_cache(layout, self._memory) for layout in layouts]
        self._mapped = Mapped(layouts, caches, arena, chunk_size, checksums=checksums)

    def unmap(self) -> None:
        """Forget the arena; a copy under way keeps it to its end."""
        self._mapped = None

    def mapped(self, arena: str) -> Mapped:
        """Return the arena that places were handed out of.

        Raises:
            Unavailable: that run of the server is gone.
        """
        mapped = self._mapped
        if mapped is None or mapped.arena != arena:
            raise Unavailable("the server went before its copy began")
        return mapped

    def close(self) -> None:
        """Wait for copies under way; no other begins."""
        self.stores.close()
        self.retrieves.close()
        self._mapped = None
