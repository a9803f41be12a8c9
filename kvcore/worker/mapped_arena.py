"""A worker's mapping of the server's arena, and the caches that it copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
    """One instance's memory, opened for copies to and from one arena."""

    @property
    def caches(self) -> tuple[PagedCache, ...]:
        """One cache per group, in order."""

    def close(self) -> None:
        """Release the resources of the copies. No copy is running. May block."""


OpenWorkerMemory = Callable[[Sequence[KVLayout], Sequence[Any], Bytes], WorkerMemory]
"""Opens a `WorkerMemory` from layouts, memory and arena. May be slow: never called in a
thread that serves requests. The copies that wait for it raise its exceptions."""


class HostWorkerMemory:
    """Memory of this process, flat and writable; see `WorkerMemory`."""

    def __init__(
        self, layouts: Sequence[KVLayout], memory: Sequence[Bytes], arena: Bytes
    ) -> None:
        del arena  # Host memory needs no preparation.
        self.caches = tuple(HostCache(layout, memory) for layout in layouts)

    def close(self) -> None:
        """Stop the copy threads."""
        for cache in self.caches:
            cache.close()


R = TypeVar("R")

Memory = Sequence[Any]
"""The buffers of a registration's handles, in order; flat byte arrays on a host."""


@dataclass(frozen=True, slots=True)
class MappedArena:
    """A cache and the arena of one server process, open until the last copy."""

    memory: WorkerMemory
    layouts: Sequence[KVLayout]
    chunk_size: int
    copier: ChunkCopier
    copies: RunningCopies
    """Copies that keep the mapping open."""

    def gather(self, request: Store, places: PartLocations) -> list[Checksum]:
        """Copy a store's blocks to its parts; return one checksum per chunk."""
        tokens = TokenRange.to_store(request.start, request.end, self.chunk_size)
        blocks = read_blocks(self.layouts, request.blocks, tokens)
        return self.copier.gather(self.memory.caches, blocks, places)

    def find_wrong(self, places: PartLocations) -> list[int]:
        """Return the indexes of chunks whose bytes do not match their checksum."""
        return self.copier.find_wrong(places)

    def scatter(self, request: Retrieve, places: PartLocations) -> int:
        """Copy a retrieve's parts to its blocks; return the number of bytes."""
        skip = request.skip_first_n_tokens
        tokens = TokenRange.to_retrieve(
            request.start, request.end, skip, self.chunk_size
        )
        blocks = read_blocks(self.layouts, request.blocks, tokens)
        return self.copier.scatter(self.memory.caches, blocks, places, tokens)

    def close(self) -> None:
        """Wait for running copies, then release the memory."""
        self.copies.close()
        self.memory.close()


class CopyQueue:
    """Runs submitted copies on one thread, and allows one copy at a time."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)
        self._lock = Lock()
        self._is_closed = False

    def submit(self, copy: Callable[[], R]) -> Future[R]:
        """Run a copy on the queue's thread."""
        try:
            return self._executor.submit(copy)
        except RuntimeError:  # Shut down by another thread.
            raise UnknownInstance("unregistered before the submission") from None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Exclude other copies; raises `UnknownInstance` if closed meanwhile."""
        with self._lock:
            if self._is_closed:
                raise UnknownInstance("unregistered before the copy started")
            yield

    def close(self) -> None:
        """Wait for the running copy and refuse new ones."""
        self._is_closed = True
        with self._lock:
            self._executor.shutdown(wait=False)


class RunningCopies:
    """Running copies. Once closed, a new one raises `error(closed_message)`."""

    def __init__(self, closed_message: str, error: type[KVError]) -> None:
        self._closed_message = closed_message
        self._error = error
        self._changed = Condition()
        self._count = 0
        self._is_closed = False

    @contextmanager
    def track(self) -> Iterator[None]:
        """Count one running copy; raises the error once closed."""
        with self._changed:
            if self._is_closed:
                raise self._error(self._closed_message)
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
    """A registered cache of this process, and its mapping of the current arena.

    A separate thread opens and closes the mapping after every server restart, since
    page-locking an arena and waiting for the last copy are slow.
    """

    def __init__(
        self,
        instance_id: str,
        groups: Sequence[CacheGroup],
        memory: Memory,
        open_memory: OpenWorkerMemory,
    ) -> None:
        self._groups = groups
        self._memory = memory
        self._open_memory = open_memory
        self._arena = ""
        self._mapped: Future[MappedArena] | None = None
        self._mapper = ThreadPoolExecutor(1, f"map-{instance_id[:40]}")
        self.stores = CopyQueue(f"store-{instance_id[:40]}")
        self.retrieves = CopyQueue(f"retrieve-{instance_id[:40]}")

    def map(self, arena: Segment, chunk_size: int, *, checksums: bool) -> None:
        """Replace the mapping by one of a new arena, whose chunk size may differ.

        Raises:
            UnknownInstance: the cache was closed meanwhile.
        """
        try:
            self.unmap()
            mapped = self._mapper.submit(
                self._open_mapping, arena.array, chunk_size, checksums=checksums
            )
        except RuntimeError:  # Shut down.
            raise UnknownInstance("unregistered before the arena was mapped") from None
        self._arena, self._mapped = arena.name, mapped

    def _open_mapping(
        self, arena: Bytes, chunk_size: int, *, checksums: bool
    ) -> MappedArena:
        sizes = [part.nbytes for part in self._memory]
        layouts = [KVLayout.derive(group, sizes, chunk_size) for group in self._groups]
        return MappedArena(
            self._open_memory(layouts, self._memory, arena),
            layouts,
            chunk_size,
            ChunkCopier(arena, chunk_size, checksums=checksums),
            RunningCopies("the server restarted before the copy started", Unavailable),
        )

    def unmap(self) -> None:
        """Release the arena after the running copies.

        Blocks only while the interpreter exits or after `close`, when no thread accepts
        work.
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
            Unavailable: the server has restarted.
        """
        mapped = self._mapped
        if mapped is None or self._arena != arena:
            raise Unavailable("the server restarted before the copy started")
        return mapped.result()

    def wait(self) -> None:
        """Wait until the mapping is open; raises the exception of `open_memory`."""
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
