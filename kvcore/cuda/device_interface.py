"""Interfaces of a GPU, its streams and events, for the driver and for test fakes.

Addresses are integers in one address space; only the driver distinguishes device
memory, page-locked host memory and memory of other processes. `driver.py` imports CUDA,
this module does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int32, c_int64
from dataclasses import dataclass
from typing import Any, NewType, Protocol

import numpy as np

Addresses = np.ndarray[Any, np.dtype[np.int64]]

Integer = type[c_int32] | type[c_int64]
"""C type of a kernel's argument."""

HANDLE_BYTES = 64
"""Bytes of an IPC handle to memory or to an event (CU_IPC_HANDLE_SIZE)."""

Function = NewType("Function", int)
"""A loaded kernel: the driver's CUfunction."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel: `programs` blocks of `warps` x 32 threads."""

    programs: int
    warps: int
    shared_bytes: int
    arguments: Sequence[int]
    types: Sequence[Integer]


class Event(Protocol):
    """A point in the work of a stream. One that was never recorded counts as reached.

    Any thread may use it. Every method may raise `DeviceFailed`.
    """

    def is_done(self) -> bool:
        """Return whether all work before its last record has ended."""

    def wait(self) -> None:
        """Block until `is_done`, without holding the GIL.

        Not for events of other processes: the event of a dead process may never be
        reached.
        """

    def handle(self) -> bytes:
        """Return its IPC handle; only for an event made with `shared=True`."""

    def close(self) -> None:
        """Destroy the event. Work that waits for it is not affected."""


class Stream(Protocol):
    """Work that runs in order, concurrently with that of other streams.

    Every method returns before its work has run, and may raise `DeviceFailed` for this
    work or any before it. Memory MUST stay allocated, pinned and open until the work
    has run.
    """

    @property
    def handle(self) -> int:
        """The driver's CUstream, for launches by other libraries."""

    def record(self, event: Event) -> None:
        """Record an event after all work so far."""

    def wait_for(self, event: Event) -> None:
        """Delay all later work until the event's last record is reached."""

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Copy between any two addresses; host memory MUST be pinned."""

    def copy_many(
        self,
        destinations: Addresses,
        sources: Addresses,
        sizes: Addresses,
        *,
        batched: bool,
    ) -> None:
        """Copy pieces in any order: `[pieces]` each, contiguous.

        In one call if `batched` and the driver can do that, else one call per piece.
        """

    def launch(self, function: Function, launch: Launch) -> None:
        """Launch a kernel."""

    def close(self) -> None:
        """Destroy the stream, after its work has ended."""


@dataclass(frozen=True, slots=True)
class ExportedAllocation:
    """IPC handle of an allocation of this process, and an address's offset in it."""

    handle: bytes
    offset: int
    allocation_bytes: int


@dataclass(frozen=True, slots=True)
class OpenedAllocation:
    """Another process's allocation, mapped here."""

    address: int
    num_bytes: int


class Device(Protocol):
    """One GPU as this process sees it. Any thread may use it.

    Every method may raise `DeviceFailed`.
    """

    @property
    def uuid(self) -> str:
        """Its id in every process: `GPU-` and 32 hexadecimal digits in groups."""

    @property
    def name(self) -> str:
        """Product name."""

    @property
    def ordinal(self) -> int:
        """Its number in this process."""

    @property
    def compute_capability(self) -> int:
        """Target architecture of its kernels: 90 for Hopper."""

    def load(self, cubin: bytes, name: str, shared_bytes: int = 0) -> Function:
        """Load a kernel until the process exits."""

    def stream(self, *, urgent: bool = False) -> Stream:
        """Return a new non-blocking stream.

        Kernels of an urgent one are scheduled before those of other streams.
        """

    def event(self, *, shared: bool = False) -> Event:
        """Return a new event; a shared one has an IPC handle."""

    def open_event(self, handle: bytes) -> Event:
        """Open another process's event; raises `HandleError` if there is none."""

    def allocate(self, num_bytes: int) -> int:
        """Allocate device memory; raises `DeviceFailed` when none is left."""

    def free(self, address: int) -> None:
        """Free memory of `allocate`."""

    def allocate_host(self, num_bytes: int) -> int:
        """Allocate page-locked host memory."""

    def free_host(self, address: int) -> None:
        """Free memory of `allocate_host`."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Page-lock host memory, for all devices of this process."""

    def unpin(self, address: int) -> None:
        """Unlock memory of `pin`, before it is unmapped."""

    def export(self, address: int) -> ExportedAllocation:
        """Return the IPC handle of the allocation that contains an address.

        Raises:
            HandleError: memory without an IPC handle; the message says what to change.
        """

    def open(self, handle: bytes) -> OpenedAllocation:
        """Map another process's allocation.

        Raises:
            HandleError: no process exported it, or that process has exited.
        """

    def close_handle(self, address: int) -> None:
        """Unmap what `open` mapped."""
