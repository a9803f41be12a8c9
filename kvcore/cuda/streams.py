"""Streams and events of the driver's."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np

from kvcore.cuda.device import Addresses, Event, Function, Launch
from kvcore.cuda.driver_bindings import RESULT, check, cu, handle_of
from kvcore.cuda.memcpy_batch import BatchCopy
from kvcore.errors import DeviceFailed


class CudaEvent:
    """An `Event` of the driver's."""

    def __init__(self, enter: Callable[[], None], handle: Any) -> None:
        self._enter = enter
        self.cu_event = handle

    def is_done(self) -> bool:
        self._enter()
        (status,) = cu.cuEventQuery(self.cu_event)
        if status == RESULT.CUDA_ERROR_NOT_READY:
            return False
        check((status,), "work on the GPU")
        return True

    def wait(self) -> None:
        self._enter()
        check(cu.cuEventSynchronize(self.cu_event), "work on the GPU")

    def handle(self) -> bytes:
        self._enter()
        handle = check(cu.cuIpcGetEventHandle(self.cu_event), "naming an event")
        return handle_of(handle)

    def close(self) -> None:
        self._enter()
        check(cu.cuEventDestroy(self.cu_event), "closing an event")


class CudaStream:
    """A `Stream` of the driver's."""

    def __init__(
        self,
        enter: Callable[[], None],
        handle: Any,
        pins: Pins,
        batch: BatchCopy | None,
    ) -> None:
        self._enter = enter
        self._stream = handle
        self.handle = int(handle)
        self._pins = pins
        self._batch = batch

    def record(self, event: Event) -> None:
        self._enter()
        check(cu.cuEventRecord(_own(event), self._stream), "recording an event")

    def wait_for(self, event: Event) -> None:
        self._enter()
        flags = cu.CUevent_wait_flags.CU_EVENT_WAIT_DEFAULT
        waited = cu.cuStreamWaitEvent(self._stream, _own(event), flags)
        check(waited, "waiting for an event")

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        self._enter()
        for first, size in self._pins.split(destination, source, num_bytes):
            copied = cu.cuMemcpyAsync(
                destination + first, source + first, size, self._stream
            )
            check(copied, "a copy")

    def copy_many(
        self, destinations: Addresses, sources: Addresses, sizes: Addresses
    ) -> None:
        if self._batch is None:
            self._copy_each(destinations, sources, sizes)
            return
        whole = self._pins.whole(destinations, sources, sizes)
        if not whole.all():
            cut = ~whole
            self._copy_each(destinations[cut], sources[cut], sizes[cut])
            destinations, sources = destinations[whole], sources[whole]
            sizes = sizes[whole]
        if len(sizes):
            self._enter()
            status = self._batch(destinations, sources, sizes, self.handle)
            check((RESULT(status),), "a batch of copies")

    def _copy_each(
        self, destinations: Addresses, sources: Addresses, sizes: Addresses
    ) -> None:
        pieces = (destinations.tolist(), sources.tolist(), sizes.tolist())
        for destination, source, size in zip(*pieces, strict=True):
            self.copy(destination, source, size)

    def launch(self, function: Function, launch: Launch) -> None:
        self._enter()
        arguments = (tuple(launch.arguments), tuple(launch.types))
        grid, block = (launch.programs, 1, 1), (launch.warps * 32, 1, 1)
        shared = launch.shared_bytes
        launched = cu.cuLaunchKernel(
            function, *grid, *block, shared, self._stream, arguments, 0
        )
        check(launched, "launching a kernel")

    def close(self) -> None:
        self._enter()
        check(cu.cuStreamDestroy(self._stream), "closing a stream")


class Pins:
    """Where pinned pieces begin: a driver may refuse one copy across two of them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._starts: list[int] = []
        self._borders: Addresses = np.empty(0, np.int64)

    def add(self, address: int) -> None:
        """Enter a piece."""
        with self._lock:
            insort(self._starts, address)
            self._borders = np.array(self._starts, np.int64)

    def remove(self, address: int) -> None:
        """Take a piece out."""
        with self._lock:
            self._starts.remove(address)
            self._borders = np.array(self._starts, np.int64)

    def split(
        self, destination: int, source: int, num_bytes: int
    ) -> list[tuple[int, int]]:
        """Cut a copy at the borders that lie in either side: (offset, bytes) each."""
        starts = self._starts
        cuts = {0, num_bytes}
        for address in (destination, source):
            first = bisect_right(starts, address)
            end = bisect_left(starts, address + num_bytes)
            cuts.update(start - address for start in starts[first:end])
        places = sorted(cuts)
        return [(at, to - at) for at, to in pairwise(places)]

    def whole(
        self, destinations: Addresses, sources: Addresses, sizes: Addresses
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Say which copies cross no border."""
        borders = self._borders
        crossed = np.zeros(len(sizes), np.bool_)
        for addresses in (destinations, sources):
            first = np.searchsorted(borders, addresses, "right")
            crossed |= first != np.searchsorted(borders, addresses + sizes, "left")
        return ~crossed


def _own(event: Event) -> Any:
    if not isinstance(event, CudaEvent):
        raise DeviceFailed(f"{event} is no event of the driver's")
    return event.cu_event
