"""Attachment of a worker's memory: one transport for each kind of memory handle.

A transport turns an instance's handles into the instance's memory: a `PagedCache` for
each cache group, and the order between its copies and the worker's own work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from kvcore.copy.host_cache import HostCache
from kvcore.copy.paged_cache import PagedCache
from kvcore.errors import HandleError
from kvcore.layout import KVLayout
from kvcore.protocol import MemoryHandle, PosixShm, Private
from kvcore.shm import Segment
from kvcore.status import DeviceStatus


class AttachedMemory(Protocol):
    """One instance's memory. Copies of either direction come from one thread each."""

    @property
    def caches(self) -> tuple[PagedCache, ...]:
        """A cache for each group, in order."""

    @property
    def event(self) -> bytes:
        """Handle of the event that `record` records; empty where there is none."""

    def wait(self, event: bytes, check: Callable[[], None]) -> None:
        """Block until the worker's event is reached; call `check` at intervals.

        Raises:
            UnknownInstance: `abandon` was called.
            HandleError: no event of that handle; or what `check` raises.
        """

    def record(self) -> None:
        """Record this process's event after all copies so far."""

    def abandon(self) -> None:
        """End all waits for the worker, which is gone. Any thread."""

    def close(self) -> None:
        """Release the memory, after all copies have ended. May block."""


class Transport(Protocol):
    """Attaches one kind of memory."""

    def attach(
        self, handles: Sequence[Any], layouts: Sequence[KVLayout]
    ) -> Future[AttachedMemory]:
        """Attach an instance's memory. Never blocks: slow work runs on another thread.

        Raises:
            HandleError: the memory cannot be attached; raised here or by the future.
        """

    def devices(self) -> tuple[DeviceStatus, ...]:
        """Describe the GPUs in use."""

    def close(self) -> None:
        """Release what all instances share, after all of them are closed."""


class TransportTable:
    """The transports of this process, by kind of handle."""

    def __init__(
        self,
        others: Mapping[type[MemoryHandle], Transport] | None = None,
        *,
        copy_threads: int = 2,
    ) -> None:
        self._by_kind: dict[type[MemoryHandle], Transport] = {
            PosixShm: HostTransport(copy_threads),
            Private: PrivateTransport(),
            **(others or {}),
        }

    def attach(
        self, handles: Sequence[MemoryHandle], layouts: Sequence[KVLayout]
    ) -> Future[AttachedMemory]:
        """Attach an instance's memory; see `Transport`."""
        kinds = {type(handle) for handle in handles} or {PosixShm}
        if len(kinds) > 1:
            raise HandleError("handles: an instance's memory is all of one kind")
        transport = self._by_kind.get(kinds.pop())
        if transport is None:
            raise HandleError(
                "handles: memory of a GPU, but this server has none: it was started "
                "with --device cpu, or found no NVIDIA driver"
            )
        return transport.attach(handles, layouts)

    def devices(self) -> tuple[DeviceStatus, ...]:
        """Describe the GPUs in use."""
        return tuple(d for one in self._by_kind.values() for d in one.devices())

    def close(self) -> None:
        """Close every transport, once all instances are closed."""
        for transport in self._by_kind.values():
            transport.close()


class HostTransport:
    """Caches in POSIX shared memory; large copies use `copy_threads` threads."""

    def __init__(self, copy_threads: int) -> None:
        self._copy_threads = copy_threads

    def attach(
        self, handles: Sequence[PosixShm], layouts: Sequence[KVLayout]
    ) -> Future[AttachedMemory]:
        """Map the segments; takes no time."""
        attached: Future[AttachedMemory] = Future()
        attached.set_result(HostMemory(handles, layouts, self._copy_threads))
        return attached

    def devices(self) -> tuple[DeviceStatus, ...]:
        """Return none."""
        return ()

    def close(self) -> None:
        """Do nothing: instances share nothing."""


class HostMemory:
    """An instance's mapped segments. Copies have ended when their calls return."""

    event = b""

    def __init__(
        self,
        handles: Sequence[PosixShm],
        layouts: Sequence[KVLayout],
        copy_threads: int,
    ) -> None:
        self.caches: tuple[HostCache, ...] = ()
        self._segments: list[Segment] = []
        try:
            for handle in handles:
                segment = Segment.attach(
                    handle.name, offset=handle.offset, length=handle.length
                )
                self._segments.append(segment)
            arrays = [segment.array for segment in self._segments]
            self.caches = tuple(
                HostCache(layout, arrays, copy_threads) for layout in layouts
            )
        except BaseException:
            self.close()
            raise

    def wait(self, event: bytes, check: Callable[[], None]) -> None:
        """Do nothing: host memory is written before the request arrives."""

    def record(self) -> None:
        """Do nothing; see `wait`."""

    def abandon(self) -> None:
        """Do nothing: `wait` never blocks."""

    def close(self) -> None:
        """Unmap the segments."""
        for cache in self.caches:
            cache.close()
        self.caches = ()
        for segment in self._segments:
            segment.close()


class PrivateTransport:
    """Memory that only its worker can access; the worker copies it."""

    def attach(
        self, handles: Sequence[Private], layouts: Sequence[KVLayout]
    ) -> Future[AttachedMemory]:
        """Attach nothing."""
        del handles, layouts
        attached: Future[AttachedMemory] = Future()
        attached.set_result(HostMemory((), (), 1))
        return attached

    def devices(self) -> tuple[DeviceStatus, ...]:
        """Use none."""
        return ()

    def close(self) -> None:
        """Do nothing; see the class."""
