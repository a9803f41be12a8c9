"""A worker's mapping of the server's arena, and the caches that it copies itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from threading import Condition, Lock
from typing import Any, Protocol, TypeVar

from kvcore.copy.block_arrays import TokenRange, read_blocks
from kvcore.copy.host_cache import HostCache
from kvcore.copy.paged_cache import ChunkCopier, PagedCache, PartLocations
from kvcore.errors import KVError, Unavailable, UnknownInstance
from kvcore.extents import Checksum
from kvcore.layout import CacheGroup, KVLayout
from kvcore.protocol import Retrieve, Store
from kvcore.shm import Bytes, Segment


class WorkerMemory(Protocol):
    """One instance's memory beside one run's arena."""

    @property
    def caches(self) -> tuple[PagedCache, ...]:
        """A cache for each group, in order."""

    def close(self) -> None:
        """Release the resources of the copies, after all have ended. May block."""


OpenWorkerMemory = Callable[[Sequence[KVLayout], Sequence[Any], Bytes], WorkerMemory]
"""Makes it, of layouts, memory and arena. May take its time: not in a thread that
serves requests. What it raises, the copies that wait for it raise."""


class HostWorkerMemory:
    """Memory of this process, flat and writable; see `WorkerMemory`."""

    def __init__(
        self, layouts: Sequence[KVLayout], memory: Sequence[Bytes], arena: Bytes
    ) -> None:
        del arena  # Needs no preparation.
        self.caches = tuple(HostCache(layout, memory) for layout in layouts)

    def close(self) -> None:
        """Stop the copy threads."""
        for cache in self.caches:
            cache.close()


R = TypeVar("R")

Memory = Sequence[Any]
"""What a registration's handles stand for, in their order; flat bytes on a host."""


class MappedArena:
    """A cache and the arena of one server run, until the last copy between them."""

    def __init__(
        self,
        opened: WorkerMemory,
        layouts: Sequence[KVLayout],
        arena: Bytes,
        chunk_size: int,
        *,
        checksums: bool,
    ) -> None:
        self._opened = opened
        self._layouts = layouts
        self._chunk_size = chunk_size
        self._mover = ChunkCopier(arena, chunk_size, checksums=checksums)
        self._copies = RunningCopies(
            "the server went before its copy began", Unavailable
        )

    def copy(self) -> AbstractContextManager[None]:
        """Return a context that keeps it open; `Unavailable` when it is closed."""
        return self._copies.one()

    def gather(self, request: Store, places: PartLocations) -> list[Checksum]:
        """Fill the parts that were reserved for a store."""
        tokens = TokenRange.to_store(request.start, request.end, self._chunk_size)
        blocks = read_blocks(self._layouts, request.blocks, tokens)
        return self._mover.gather(self._opened.caches, blocks, places)

    def find_wrong(self, places: PartLocations) -> list[int]:
        """Return the indexes of chunks whose bytes do not match their checksum."""
        return self._mover.find_wrong(places)

    def scatter(self, request: Retrieve, places: PartLocations) -> int:
        """Write the parts that are held for a retrieve; return the bytes."""
        skip = request.skip_first_n_tokens
        tokens = TokenRange.to_retrieve(
            request.start, request.end, skip, self._chunk_size
        )
        blocks = read_blocks(self._layouts, request.blocks, tokens)
        return self._mover.scatter(self._opened.caches, blocks, places, tokens)

    def close(self) -> None:
        """Wait for running copies, then release the memory."""
        self._copies.close()
        self._opened.close()


class CopyQueue:
    """A thread for what was submitted, and one copy at a time whoever makes it."""

    def __init__(self, name: str) -> None:
        self._lane = ThreadPoolExecutor(1, name)
        self._turn = Lock()
        self._is_closed = False

    def submit(self, copy: Callable[[], R]) -> Future[R]:
        """Make a copy on the queue's thread."""
        try:
            return self._lane.submit(copy)
        except RuntimeError:  # Shut down by another thread.
            raise UnknownInstance("unregistered before it was submitted") from None

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
            self._lane.shutdown(wait=False)


class RunningCopies:
    """Copies that go on just now; once closed, `error` says `why` there is no other."""

    def __init__(self, why: str, error: type[KVError]) -> None:
        self._why = why
        self._error = error
        self._changed = Condition()
        self._count = 0
        self._is_closed = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count one running copy; raises `error` once closed."""
        with self._changed:
            if self._is_closed:
                raise self._error(self._why)
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse new copies, and wait for the running ones."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._count)


class MappedCache:
    """Memory of this process that was registered as private.

    A separate thread attaches it to one server run after the other: page-locking an
    arena and waiting for the last copy to the previous one are slow.
    """

    def __init__(
        self,
        instance_id: str,
        groups: Sequence[CacheGroup],
        memory: Memory,
        open_own: OpenWorkerMemory,
    ) -> None:
        self._groups = groups
        self._memory = memory
        self._open = open_own
        self._arena = ""
        self._mapped: Future[MappedArena] | None = None
        self._mapper = ThreadPoolExecutor(1, f"map-{instance_id[:40]}")
        self.stores = CopyQueue(f"store-{instance_id[:40]}")
        self.retrieves = CopyQueue(f"retrieve-{instance_id[:40]}")

    def map(self, arena: Segment, chunk_size: int, *, checksums: bool) -> None:
        """Attach to a server run, whose chunk size may differ.

        Raises:
            UnknownInstance: the cache was closed meanwhile.
        """
        try:
            self.unmap()
            mapped = self._mapper.submit(
                self._make, arena.array, chunk_size, checksums=checksums
            )
        except RuntimeError:  # Shut down.
            raise UnknownInstance("unregistered before a server was met") from None
        self._arena, self._mapped = arena.name, mapped

    def _make(self, arena: Bytes, chunk_size: int, *, checksums: bool) -> MappedArena:
        sizes = [part.nbytes for part in self._memory]
        layouts = [KVLayout.derive(group, sizes, chunk_size) for group in self._groups]
        opened = self._open(layouts, self._memory, arena)
        return MappedArena(opened, layouts, arena, chunk_size, checksums=checksums)

    def unmap(self) -> None:
        """Release the arena after the running copies.

        Blocks only while the interpreter exits or after `close`: no thread takes work
        then, so the calling one waits.
        """
        mapped, self._mapped = self._mapped, None
        if mapped is None:
            return
        try:
            self._mapper.submit(_close, mapped)
        except RuntimeError:
            _close(mapped)

    def mapped(self, arena: str) -> MappedArena:
        """Return the mapping of the arena with this name.

        Raises:
            Unavailable: that run of the server is gone.
        """
        mapped = self._mapped
        if mapped is None or self._arena != arena:
            raise Unavailable("the server went before its copy began")
        return mapped.result()

    def wait(self) -> None:
        """Wait until `map` has ended; raises what it raised."""
        mapped = self._mapped
        if mapped is not None:
            mapped.result()

    def close(self) -> None:
        """Refuse new copies, wait for the running ones, and release the arena."""
        self.stores.close()
        self.retrieves.close()
        self.unmap()
        self._mapper.shutdown(wait=True)


def _close(mapped: Future[MappedArena]) -> None:
    if mapped.exception() is None:
        mapped.result().close()
