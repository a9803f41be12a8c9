"""A GPU that runs its work as late, and in as unlucky an order, as it may.

Addresses are real ones of this process, so wrong bytes show as wrong bytes. Work is
queued and run only when somebody waits or asks, one step at a time, of a stream that
is chosen at random; a copy may be run in pieces. What a real device would answer with
silent corruption is a `Misuse` here: work on memory that is not (or no longer)
allocated, opened or pinned, and memory given back while queued work uses it.

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
"""What fresh device memory holds."""
_HANDLE = struct.Struct("<QQ16s")


class Misuse(AssertionError):
    """The code under test did what a real device would not have told it of."""


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
    """One thing in a stream's queue. `step` answers whether it has ended."""

    step: Callable[[], bool]
    touches: Sequence[Touch] = ()
    after: Callable[[], bool] = field(default=lambda: True)


class FakeTimeline:
    """The devices of one process, and the one clock that runs their queues.

    `eager` runs work as soon as it is queued: for processes that wait for another.
    """

    def __init__(self, seed: int = 0, *, eager: bool = False) -> None:
        self.random = Random(seed)
        self.lock = RLock()
        self.streams: list[FakeStream] = []
        self.regions: dict[int, int] = {}
        """Memory that work may touch: address to bytes."""
        self.pinned: set[int] = set()
        self.eager = eager
        self.num_done = 0
        self.breaks_after: int | None = None
        """Steps until the devices fail for good, as after a kernel's bad access."""
        self.on_step: Callable[[], None] = lambda: None

    def step(self) -> bool:
        """Run one piece of work; False when none is ready."""
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
        """Run a few pieces, or none."""
        for _ in range(self.random.randrange(3)):
            self.step()

    def run(self) -> None:
        """Run everything that is queued."""
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
        """Queue work whose memory is all there."""
        with self.lock:
            self.check_broken()
            self._require(work.touches)
            stream.queue.append(work)
            if self.eager:
                self.run()

    def check_broken(self) -> None:
        """Raise `DeviceFailed` once the devices have failed, without ageing them."""
        if self.breaks_after == 0:
            raise DeviceFailed("the fake device has failed", status=700)

    def enter(self, address: int, num_bytes: int, *, pinned: bool = False) -> None:
        """Let work touch this memory."""
        with self.lock:
            for base, size in self.regions.items():
                if address < base + size and base < address + num_bytes:
                    raise Misuse(f"{address:#x} is known already")
            self.regions[address] = num_bytes
            if pinned:
                self.pinned.add(address)

    def leave(self, address: int) -> int:
        """Let no work touch this memory any more; `Misuse` if some still would."""
        with self.lock:
            size = self.regions.pop(address, None)
            self.pinned.discard(address)
            if size is None:
                raise Misuse(f"{address:#x} is not known, or was given back before")
            for stream in self.streams:
                for work in stream.queue:
                    if any(_overlap(t, address, size) for t in work.touches):
                        raise Misuse(f"{address:#x} is given back while work uses it")
            return size

    def _require(self, touches: Sequence[Touch]) -> None:
        """Check that memory is there; pinned neighbours count as one."""
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
    """An `Event` of this process, or another's that was opened."""

    def __init__(
        self, world: FakeTimeline, shared: _Shared | None, *, ours: bool
    ) -> None:
        self._world = world
        self._mark = _Mark()
        self._mark.is_done = True
        self._shared = shared
        self._ours = ours

    def mark(self) -> _Work:
        """Return the work of reaching it."""
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
        """Return a question: has what was recorded by now ended?"""
        if self._ours:
            mark = self._mark
            return lambda: mark.is_done
        shared = self._shared
        return lambda: shared is None or shared.is_reached()

    def is_done(self) -> bool:
        self._world.check_broken()
        self._world.step_some()
        return self.reached()()

    def wait(self) -> None:
        if not self._ours:
            raise Misuse("another process's event may never be reached")
        reached = self.reached()
        while not reached():
            if not self._world.step() and not reached():
                raise Misuse("what the event waits for never runs")
        self._world.check_broken()

    def handle(self) -> bytes:
        if self._shared is None or not self._ours:
            raise Misuse("only one's own shared event has a handle")
        return self._shared.handle

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        self._world = _CLOSED


class FakeStream:
    """A `Stream`; `call` stands for a kernel, in numpy."""

    def __init__(self, world: FakeTimeline, number: int) -> None:
        self.queue: deque[_Work] = deque()
        self.handle = number
        self._world = world
        self.num_copies = 0

    def record(self, event: Event) -> None:
        self._world.add(self, _fake(event).mark())

    def wait_for(self, event: Event) -> None:
        reached = _fake(event).reached()
        self._world.add(self, _Work(lambda: True, after=reached))

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
                raise Misuse("addresses go to the driver as contiguous int64")
        pieces = list(
            zip(destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True)
        )
        self._world.random.shuffle(pieces)
        self._copies(pieces)

    def call(self, kernel: Callable[[], None], touches: Iterable[Touch]) -> None:
        """Queue a function; `touches` is all the memory that it reads and writes."""

        def run() -> bool:
            kernel()
            return True

        self._world.add(self, _Work(run, tuple(touches)))

    def launch(self, function: Function, launch: Launch) -> None:
        raise Misuse("no fake device runs machine code: queue a function by `call`")

    def close(self) -> None:
        if self.queue:
            raise Misuse("a stream is closed before its work has ended")
        self._world.streams.remove(self)

    def _copies(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        left = deque(piece for piece in pieces if piece[2])
        random = self._world.random
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
        self._world.add(self, _Work(step, touches))


class FakeDevice:
    """A `Device`. Two of one UUID are one GPU seen by two processes."""

    def __init__(
        self,
        world: FakeTimeline,
        uuid: str = "GPU-0",
        ordinal: int = 0,
        name: str = "fake",
    ) -> None:
        self.uuid, self.ordinal, self.name = uuid, ordinal, name
        self.compute_capability = 90
        self.world = world
        self.allocations: dict[int, _Shared] = {}
        self.opened: dict[int, _Shared] = {}
        self.no_ipc: set[int] = set()
        """Allocations that are to be refused, as expandable segments are."""
        self._num_streams = 0

    def stream(self, *, urgent: bool = False) -> FakeStream:
        self.world.check_broken()
        self._num_streams += 1
        stream = FakeStream(self.world, (self.ordinal + 1) << 16 | self._num_streams)
        self.world.streams.append(stream)
        return stream

    def event(self, *, shared: bool = False) -> FakeEvent:
        self.world.check_broken()
        memory = _Shared.create(mmap.PAGESIZE) if shared else None
        return FakeEvent(self.world, memory, ours=True)

    def open_event(self, handle: bytes) -> FakeEvent:
        return FakeEvent(self.world, _Shared.open(handle), ours=False)

    def allocate(self, num_bytes: int) -> int:
        self.world.check_broken()
        memory = _Shared.create(num_bytes)
        memory.array[:] = POISON
        self.allocations[memory.address] = memory
        self.world.enter(memory.address, num_bytes)
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
        self.world.check_broken()
        self.world.leave(address)
        self.allocations.pop(address).close()

    def pin(self, address: int, num_bytes: int) -> None:
        self.world.check_broken()
        self.world.enter(address, num_bytes, pinned=True)

    def unpin(self, address: int) -> None:
        self.world.check_broken()
        self.world.leave(address)

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
        self.world.enter(memory.address, memory.num_bytes)
        return OpenedAllocation(memory.address, memory.num_bytes)

    def close_handle(self, address: int) -> None:
        self.world.check_broken()
        self.world.leave(address)
        self.opened.pop(address).close()


def array_at(address: int, num_bytes: int) -> np.ndarray:
    """Return the memory at an address as uint8."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


class _Shared:
    """Some memory with a handle by which another process can map it."""

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
                raise HandleError("nobody has exported this handle")
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise HandleError(f"the handle cannot be opened: {error}") from None
        return cls(fd, os.fstat(fd).st_size, handle)

    def count(self, at: int) -> int:
        """Count up one of the two counters of an event: recorded, reached."""
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
    """Where a closed event's world is: nothing may be asked of it any more."""

    def check_broken(self) -> None:
        raise Misuse("the event is closed")

    step_some = check_broken  # type: ignore[assignment]


_CLOSED = _Closed()


def _fake(event: Event) -> FakeEvent:
    if not isinstance(event, FakeEvent):
        raise Misuse(f"{event} is no event of this device")
    return event
