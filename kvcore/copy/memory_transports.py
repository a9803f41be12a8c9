"""Attachment of a worker's memory: one transport for each kind of memory handle.

A transport turns an instance's handles into the instance's memory: a `PagedCache` for
each cache group, and the order between its copies and the worker's own work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol

from kvcore.copy.host_cache import HostCache
from kvcore.copy.paged_cache import PagedCache
from kvcore.errors import HandleError
from kvcore.layout import KVLayout
from kvcore.protocol import MemoryHandle, PosixShm, Private
from kvcore.shm import Segment
from kvcore.status import DeviceStatus


class AttachedMemory:
    """One instance's memory. Copies of either direction come from one thread each.

    This class is memory that only its worker can access: it has no caches. Host memory
    needs no events: it is written before the request arrives, and copies have ended
    when their calls return.
    """

    caches: tuple[PagedCache, ...] = ()
    """A cache for each group, in order."""
    event = b""
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


class HostMemory(AttachedMemory):
    """Memory in POSIX shared memory; large copies use `copy_threads` threads."""

    def __init__(
        self,
        handles: Sequence[PosixShm],
        layouts: Sequence[KVLayout],
        copy_threads: int,
    ) -> None:
        with ExitStack() as stack:
            arrays, self._segments = [], []
            for handle in handles:
                segment = Segment.attach(
                    handle.name, offset=handle.offset, length=handle.length
                )
                stack.callback(segment.close)
                self._segments.append(segment)
                arrays.append(segment.array)
            self.caches = tuple(
                HostCache(layout, arrays, copy_threads) for layout in layouts
            )
            self._stack = stack.pop_all()

    def wait(self, event: bytes, check: Callable[[], None]) -> None:
        """Check that the pages are there: touching one that is not ends the process.

        Raises:
            HandleError: a segment has shrunk, or there is no room for its pages.
        """
        for segment in self._segments:
            segment.check_pages()

    def close(self) -> None:
        """Unmap the segments."""
        for cache in self.caches:
            cache.close()
        self.caches = ()
        self._stack.close()


Attach = Callable[[Sequence[Any], Sequence[KVLayout]], Future[AttachedMemory]]


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
    """How this process attaches memory, by kind of handle.

    `others` are the transports of memory that the core cannot reach.
    """

    def __init__(
        self,
        others: Mapping[type[MemoryHandle], Transport] | None = None,
        *,
        copy_threads: int = 2,
    ) -> None:
        self._others = [*(others or {}).values()]
        self._attach: dict[type[MemoryHandle], Attach] = {
            PosixShm: lambda handles, layouts: _attached(
                HostMemory(handles, layouts, copy_threads)
            ),
            Private: lambda *_: _attached(AttachedMemory()),
            **{kind: other.attach for kind, other in (others or {}).items()},
        }

    def attach(
        self, handles: Sequence[MemoryHandle], layouts: Sequence[KVLayout]
    ) -> Future[AttachedMemory]:
        """Attach an instance's memory; see `Transport`."""
        kinds = {type(handle) for handle in handles} or {PosixShm}
        if len(kinds) > 1:
            raise HandleError("handles: an instance's memory is all of one kind")
        attach = self._attach.get(kinds.pop())
        if attach is None:
            raise HandleError(
                "handles: memory of a GPU, but this server has none: it was started "
                "with --device cpu, or found no NVIDIA driver"
            )
        return attach(handles, layouts)

    def devices(self) -> tuple[DeviceStatus, ...]:
        """Describe the GPUs in use."""
        return tuple(d for other in self._others for d in other.devices())

    def close(self) -> None:
        """Close every transport, once all instances are closed."""
        for other in self._others:
            other.close()


def _attached(memory: AttachedMemory) -> Future[AttachedMemory]:
    attached: Future[AttachedMemory] = Future()
    attached.set_result(memory)
    return attached
