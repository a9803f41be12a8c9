"""A fake GPU that runs work as late as allowed, and in a random order.

Addresses are real ones of this process, so that a wrong copy produces wrong bytes. Work
is queued and runs only when a caller waits or polls, one step at a time, from a stream
chosen at random; a copy may run in pieces. Errors that a real device would not report
raise `Misuse` here: work on memory that is not (or no longer) allocated, opened or
pinned, and memory freed while queued work uses it.

Memory and events are memfds: handles work between processes, as CUDA's do.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from secrets import token_hex
from threading import RLock
from weakref import finalize

import numpy as np

from kvcore.cuda.device_interface import (
    HANDLE_BYTES,
    Addresses,
    Event,
    ExportedAllocation,
    Function,
    Launch,
    OpenedAllocation,
)
from kvcore.errors import DeviceFailed, HandleError

POISON = 0xA5
"""Content of fresh device memory."""
_HANDLE = struct.Struct("<QQ16s")


class Misuse(AssertionError):
    """The code under test made an error that a real device would not report."""


@dataclass(frozen=True, slots=True)
class Touch:
    """Bytes that queued work reads or writes."""

    address: int
    num_bytes: int


class _Mark:
    """One record of an event."""

    def __init__(self) -> None:
        self.is_done = False


@dataclass(slots=True)
class _Work:
    """One item of a stream's queue. `step` returns whether it has ended."""

    step: Callable[[], bool]
    touches: Sequence[Touch] = ()
    after: Callable[[], bool] = field(default=lambda: True)


class FakeTimeline:
    """Runs the queues of all devices of one process.

    `eager` runs work as soon as it is queued: for processes that wait for another one.
    """

    def __init__(self, seed: int = 0, *, eager: bool = False) -> None:
        self.random = Random(seed)
        self.lock = RLock()
        self.streams: list[FakeStream] = []
        self.regions: dict[int, int] = {}
        """Memory that work may use: number of bytes by address."""
        self.pinned: set[int] = set()
        self.eager = eager
        self.num_done = 0
        self.breaks_after: int | None = None
        """Steps until the devices fail for good, as after a kernel's illegal access."""
        self.on_step: Callable[[], None] = lambda: None

    def step(self) -> bool:
        """Run one step of work; return whether any was ready."""
        with self.lock:
            ready = [s for s in self.streams if s.queue and s.queue[0].after()]
            if not ready:
                return False
            stream = self.random.choice(ready)
            self.check()
            if stream.queue[0].step():
                stream.queue.popleft()
                self.num_done += 1
            self.on_step()
            return True

    def step_some(self) -> None:
        """Run 0 to 2 steps."""
        for _ in range(self.random.randrange(3)):
            self.step()

    def run(self) -> None:
        """Run all queued work."""
        while self.step():
            pass

    def check(self) -> None:
        """Raise `DeviceFailed` once the devices have failed."""
        if self.breaks_after is None:
            return
        if self.breaks_after == 0:
            raise DeviceFailed("the fake device has failed", status=700)
        self.breaks_after -= 1

    def add(self, stream: FakeStream, work: _Work) -> None:
        """Queue work; `Misuse` if it uses memory that is not known."""
        with self.lock:
            self.check_broken()
            self._require(work.touches)
            stream.queue.append(work)
            if self.eager:
                self.run()

    def check_broken(self) -> None:
        """Raise `DeviceFailed` once the devices have failed; counts no step."""
        if self.breaks_after == 0:
            raise DeviceFailed("the fake device has failed", status=700)

    def enter(self, address: int, num_bytes: int, *, pinned: bool = False) -> None:
        """Allow work to use this memory."""
        with self.lock:
            for base, size in self.regions.items():
                if address < base + size and base < address + num_bytes:
                    raise Misuse(f"{address:#x} is known already")
            self.regions[address] = num_bytes
            if pinned:
                self.pinned.add(address)

    def leave(self, address: int) -> int:
        """Forbid work to use this memory; `Misuse` if queued work still does."""
        with self.lock:
            size = self.regions.pop(address, None)
            self.pinned.discard(address)
            if size is None:
                raise Misuse(f"{address:#x} is not known, or was freed before")
            for stream in self.streams:
                for work in stream.queue:
                    if any(_overlap(t, address, size) for t in work.touches):
                        raise Misuse(f"{address:#x} is freed while work uses it")
            return size

    def _require(self, touches: Sequence[Touch]) -> None:
        """Check that all memory is known; adjacent pinned regions count as one."""
        starts: list[int] = []
        ends: list[int] = []
        for address, size in sorted(self.regions.items()):
            if ends and ends[-1] == address and {starts[-1], address} <= self.pinned:
                ends[-1] += size
            else:
                starts.append(address)
                ends.append(address + size)
        for touch in touches:
            at = bisect_right(starts, touch.address) - 1
            if at < 0 or touch.address + touch.num_bytes > ends[at]:
                raise Misuse(
                    f"{touch.num_bytes} bytes at {touch.address:#x} are not all "
                    "allocated, opened or pinned"
                )


def _overlap(touch: Touch, address: int, size: int) -> bool:
    return touch.address < address + size and address < touch.address + touch.num_bytes


class FakeEvent:
    """An `Event` of this process, or an opened one of another process."""

    def __init__(
        self, timeline: FakeTimeline, shared: _Shared | None, *, ours: bool
    ) -> None:
        self._timeline = timeline
        self._mark = _Mark()
        self._mark.is_done = True
        self._shared = shared
        self._ours = ours

    def mark(self) -> _Work:
        """Return the work that reaches the event."""
        self._mark = mark = _Mark()
        shared = self._shared
        number = shared.count(0) if shared else 0

        def reach() -> bool:
            mark.is_done = True
            if shared:
                shared.reach(number)
            return True

        return _Work(reach)

    def reached(self) -> Callable[[], bool]:
        """Return a function that returns whether the records so far are reached."""
        if self._ours:
            mark = self._mark
            return lambda: mark.is_done
        shared = self._shared
        return lambda: shared is None or shared.is_reached()

    def is_done(self) -> bool:
        self._timeline.check_broken()
        self._timeline.step_some()
        return self.reached()()

    def wait(self) -> None:
        if not self._ours:
            raise Misuse("another process's event may never be reached")
        reached = self.reached()
        while not reached():
            if not self._timeline.step() and not reached():
                raise Misuse("the work before the event never runs")
        self._timeline.check_broken()

    def handle(self) -> bytes:
        if self._shared is None or not self._ours:
            raise Misuse("only a shared event of this process has a handle")
        return self._shared.handle

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        self._timeline = _CLOSED


class FakeStream:
    """A `Stream`; `call` queues a Python function in place of a kernel."""

    def __init__(self, timeline: FakeTimeline, number: int) -> None:
        self.queue: deque[_Work] = deque()
        self.handle = number
        self._timeline = timeline
        self.num_copies = 0

    def record(self, event: Event) -> None:
        self._timeline.add(self, _fake(event).mark())

    def wait_for(self, event: Event) -> None:
        reached = _fake(event).reached()
        self._timeline.add(self, _Work(lambda: True, after=reached))

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        self._copies([(destination, source, num_bytes)])

    def copy_many(
        self,
        destinations: Addresses,
        sources: Addresses,
        sizes: Addresses,
        *,
        batched: bool,
    ) -> None:
        del batched
        for one in (destinations, sources, sizes):
            if one.dtype != np.int64 or not one.flags.c_contiguous:
                raise Misuse("the driver takes addresses as contiguous int64")
        pieces = list(
            zip(destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True)
        )
        self._timeline.random.shuffle(pieces)
        self._copies(pieces)

    def call(self, kernel: Callable[[], None], touches: Iterable[Touch]) -> None:
        """Queue a function; `touches` lists all memory that it reads and writes."""

        def run() -> bool:
            kernel()
            return True

        self._timeline.add(self, _Work(run, tuple(touches)))

    def launch(self, function: Function, launch: Launch) -> None:
        raise Misuse("the fake device runs no machine code: queue a function by `call`")

    def close(self) -> None:
        if self.queue:
            raise Misuse("a stream is closed before its work has ended")
        self._timeline.streams.remove(self)

    def _copies(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        left = deque(piece for piece in pieces if piece[2])
        random = self._timeline.random
        self.num_copies += len(left)

        def step() -> bool:
            for _ in range(random.randint(1, 8)):
                if not left:
                    break
                destination, source, size = left.popleft()
                part = random.randint(1, size)
                ctypes.memmove(destination, source, part)
                if part < size:
                    left.appendleft((destination + part, source + part, size - part))
            return not left

        touches = [Touch(p[0], p[2]) for p in left] + [Touch(p[1], p[2]) for p in left]
        self._timeline.add(self, _Work(step, touches))


class FakeDevice:
    """A `Device`. Two with one UUID are the views of two processes on one GPU."""

    def __init__(
        self,
        timeline: FakeTimeline,
        uuid: str = "GPU-0",
        ordinal: int = 0,
        name: str = "fake",
    ) -> None:
        self.uuid, self.ordinal, self.name = uuid, ordinal, name
        self.compute_capability = 90
        self.timeline = timeline
        self.allocations: dict[int, _Shared] = {}
        self.opened: dict[int, _Shared] = {}
        self.no_ipc: set[int] = set()
        """Allocations whose export is refused, as that of expandable segments."""
        self._num_streams = 0

    def stream(self, *, urgent: bool = False) -> FakeStream:
        self.timeline.check_broken()
        self._num_streams += 1
        stream = FakeStream(self.timeline, (self.ordinal + 1) << 16 | self._num_streams)
        self.timeline.streams.append(stream)
        return stream

    def event(self, *, shared: bool = False) -> FakeEvent:
        self.timeline.check_broken()
        memory = _Shared.create(mmap.PAGESIZE) if shared else None
        return FakeEvent(self.timeline, memory, ours=True)

    def open_event(self, handle: bytes) -> FakeEvent:
        return FakeEvent(self.timeline, _Shared.open(handle), ours=False)

    def allocate(self, num_bytes: int) -> int:
        self.timeline.check_broken()
        memory = _Shared.create(num_bytes)
        memory.array[:] = POISON
        self.allocations[memory.address] = memory
        self.timeline.enter(memory.address, num_bytes)
        return memory.address

    def allocate_host(self, num_bytes: int) -> int:
        memory = _Shared.create(num_bytes)
        self.allocations[memory.address] = memory
        self.pin(memory.address, num_bytes)
        return memory.address

    def free_host(self, address: int) -> None:
        self.free(address)

    def load(self, cubin: bytes, name: str, shared_bytes: int = 0) -> Function:
        raise Misuse("no fake device runs machine code")

    def free(self, address: int) -> None:
        self.timeline.check_broken()
        self.timeline.leave(address)
        self.allocations.pop(address).close()

    def pin(self, address: int, num_bytes: int) -> None:
        self.timeline.check_broken()
        self.timeline.enter(address, num_bytes, pinned=True)

    def unpin(self, address: int) -> None:
        self.timeline.check_broken()
        self.timeline.leave(address)

    def export(self, address: int) -> ExportedAllocation:
        for base, memory in self.allocations.items():
            if base <= address < base + memory.num_bytes:
                if base in self.no_ipc:
                    raise HandleError("memory of this kind has no handle")
                return ExportedAllocation(
                    memory.handle, address - base, memory.num_bytes
                )
        raise HandleError(f"{address:#x} is not memory of {self.uuid}")

    def open(self, handle: bytes) -> OpenedAllocation:
        memory = _Shared.open(handle)
        if any(handle == other.handle for other in self.opened.values()):
            raise Misuse("an allocation is opened twice")
        self.opened[memory.address] = memory
        self.timeline.enter(memory.address, memory.num_bytes)
        return OpenedAllocation(memory.address, memory.num_bytes)

    def close_handle(self, address: int) -> None:
        self.timeline.check_broken()
        self.timeline.leave(address)
        self.opened.pop(address).close()


def array_at(address: int, num_bytes: int) -> np.ndarray:
    """Return the memory at an address as uint8."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


class _Shared:
    """Memory with a handle by which another process can map it."""

    def __init__(self, fd: int, num_bytes: int, handle: bytes) -> None:
        self._close_fd = finalize(self, os.close, fd)
        self.num_bytes = num_bytes
        self.handle = handle
        self._mapping = mmap.mmap(fd, num_bytes)
        self.array = np.frombuffer(self._mapping, np.uint8)
        self.address = self.array.ctypes.data

    @classmethod
    def create(cls, num_bytes: int) -> _Shared:
        name = token_hex(8)
        fd = os.memfd_create(name)
        os.ftruncate(fd, num_bytes)
        handle = _HANDLE.pack(os.getpid(), fd, name.encode())
        return cls(fd, num_bytes, handle.ljust(HANDLE_BYTES, b"\0"))

    @classmethod
    def open(cls, handle: bytes) -> _Shared:
        if len(handle) != HANDLE_BYTES:
            raise HandleError(f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        pid, number, name = _HANDLE.unpack_from(handle)
        path = f"/proc/{pid}/fd/{number}"
        try:
            if name.decode("latin1") not in os.readlink(path):
                raise HandleError("no process has exported this handle")
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise HandleError(f"the handle cannot be opened: {error}") from None
        return cls(fd, os.fstat(fd).st_size, handle)

    def count(self, at: int) -> int:
        """Increment one of the two counters of an event: recorded, reached."""
        counters = self.array[:16].view(np.int64)
        counters[at] += 1
        return int(counters[at])

    def reach(self, number: int) -> None:
        counters = self.array[:16].view(np.int64)
        counters[1] = max(counters[1], number)

    def is_reached(self) -> bool:
        recorded, reached = self.array[:16].view(np.int64)
        return bool(reached >= recorded)

    def close(self) -> None:
        del self.array
        self._mapping.close()
        self._close_fd()


class _Closed(FakeTimeline):
    """The timeline of a closed event; every use is a `Misuse`."""

    def check_broken(self) -> None:
        raise Misuse("the event is closed")

    step_some = check_broken  # type: ignore[assignment]


_CLOSED = _Closed()


def _fake(event: Event) -> FakeEvent:
    if not isinstance(event, FakeEvent):
        raise Misuse(f"{event} is no event of this device")
    return event
