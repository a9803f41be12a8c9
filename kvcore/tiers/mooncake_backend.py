"""Mooncake Store: memory of many hosts as one store, moved to and from L1's own pages.

The Mooncake client runs in a process of its own (`mooncake_process`), started at the
first call and after every failure. The memory that `segment=` adds to the store belongs
to that process and is lost with it. Memory that must outlive a server belongs to a
`mooncake_client`.
"""

from __future__ import annotations

import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from urllib.parse import SplitResult

import msgspec

from kvcore.errors import DeadlineExceeded, SetupError, Unavailable
from kvcore.extents import Buffers
from kvcore.option_structs import ByteSize
from kvcore.shm import SEGMENT_PREFIX, Bytes, Segment
from kvcore.tiers.direct_io import address_of
from kvcore.tiers.mooncake_process import (
    SETUP,
    BufferSlice,
    Code,
    MooncakeRequest,
    SegmentName,
    Setup,
)
from kvcore.tiers.tier import (
    FAILED,
    HEADER_BYTES,
    MISSING,
    REJECTED,
    Backend,
    Deadline,
    LoadItem,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    Usage,
)
from kvcore.tiers.tier_url import TierOptions, host_of, register_tier

MAX_PARTS = 16
"""Parts per call, at most."""

_HEADERS, _ARENA = 0, 1
"""Segments that the process has mapped, in this order."""


class MooncakeOptions(TierOptions, frozen=True):
    """Options of `mooncake://MASTER:PORT`."""

    threads: int = 2
    prefix: str = ""
    """Of every key."""
    local: str = "127.0.0.1"
    """Address of this host as others reach it."""
    metadata: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    device: str = ""
    segment: ByteSize = ByteSize(0)
    """Memory that this server adds to the store."""


class MooncakeBackend(Backend):
    """`Backend` over a client process, which is killed when a deadline passes."""

    batch = MAX_PARTS

    def __init__(self, setup: Setup, prefix: str, num_channels: int) -> None:
        if find_spec("mooncake") is None:
            raise SetupError(
                "Mooncake Store needs its client: pip install 'kvctl[mooncake]'"
            )
        self._setup = setup
        self._prefix = prefix
        self._num_channels = num_channels
        self._lock = threading.Lock()
        self._arena: ArenaLocation | None = None
        self._client: MooncakeClient | None = None

    def attach(self, name: str, arena: Bytes) -> None:
        """Have the client register the arena when it starts."""
        start = arena.__array_interface__["data"][0]
        self._arena = ArenaLocation(SegmentName(name, arena.nbytes), start)

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Query the master for all keys at once."""
        with self._call(deadline) as call:
            return call.exist(self._names(keys))

    def load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Get all items at once."""
        names = self._names([item.key for item in items])
        with self._call(deadline) as call:
            loaded = call.get(names, items)
        yield from loaded

    def store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Put all absent items at once: a second put keeps the first."""
        names = self._names([item.key for item in items])
        with self._call(deadline) as call:
            present = call.exist(names)
            absent = [
                index for index, is_present in enumerate(present) if not is_present
            ]
            outcomes = call.put(
                tuple(names[index] for index in absent),
                [items[index] for index in absent],
            )
        stored = [StoreResult.PRESENT] * len(items)
        for index, outcome in zip(absent, outcomes, strict=True):
            stored[index] = outcome
        yield from stored

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Remove keys, even while they are read."""
        with self._call(deadline) as call:
            return call.ask(MooncakeRequest("remove", self._names(keys))).count(0)

    def usage(self, deadline: Deadline) -> Usage:
        """Query one key; only the master's metrics have the size."""
        with self._call(deadline) as call:
            call.exist((f"{self._prefix}probe",))
        return Usage()

    def close(self) -> None:
        """Kill the client process."""
        with self._lock:
            if self._client is not None:
                self._client.kill()

    def _names(self, keys: Sequence[PartKey]) -> tuple[str, ...]:
        return tuple(f"{self._prefix}{key}" for key in keys)

    @contextmanager
    def _call(self, deadline: Deadline) -> Iterator[_Call]:
        """Borrow a channel; an error kills the client, and with it all other calls."""
        client = self._running_client()
        try:
            with client.channel(deadline) as channel:
                yield _Call(client, channel, deadline)
        except BaseException:
            client.kill()
            raise

    def _running_client(self) -> MooncakeClient:
        with self._lock:
            if self._client is None or self._client.dead:
                self._client = MooncakeClient(
                    self._setup, self._arena, self._num_channels
                )
            return self._client


class _Call:
    """Requests of one thread over one channel until one deadline."""

    def __init__(
        self, client: MooncakeClient, channel: Channel, deadline: Deadline
    ) -> None:
        self._client = client
        self._channel = channel
        self._deadline = deadline

    def ask(self, request: MooncakeRequest) -> list[int]:
        """Return a number for each key."""
        return self._client.ask(self._channel, request, self._deadline)

    def exist(self, names: tuple[str, ...]) -> list[bool]:
        """Return for each name whether the master has it."""
        return [code == 1 for code in self.ask(MooncakeRequest("exists", names))]

    def get(
        self, names: tuple[str, ...], items: Sequence[LoadItem]
    ) -> list[LoadResult]:
        """Fill items."""
        with self._staged_transfer([item.buffers for item in items]) as transfer:
            codes = self.ask(
                MooncakeRequest("get", names, transfer.slices, transfer.extra)
            )
            transfer.copy_out()
            headers = [bytes(transfer.header(index)) for index in range(len(items))]
        found = zip(names, items, codes, headers, strict=True)
        return [self._loaded(*one) for one in found]

    def put(
        self, names: tuple[str, ...], items: Sequence[StoreItem]
    ) -> list[StoreResult]:
        """Store absent items."""
        if not items:
            return []
        with self._staged_transfer([item.buffers for item in items]) as transfer:
            for index, item in enumerate(items):
                transfer.header(index)[:] = item.header()
            transfer.copy_in()
            codes = self.ask(
                MooncakeRequest("put", names, transfer.slices, transfer.extra)
            )
        return [_stored(code) for code in codes]

    @contextmanager
    def _staged_transfer(self, parts: Sequence[Buffers]) -> Iterator[StagedTransfer]:
        transfer = StagedTransfer(self._client, self._channel, parts)
        try:
            yield transfer
        except BaseException:
            self._client.kill()  # Before memory that it may write to is unmapped.
            raise
        finally:
            transfer.end()

    def _loaded(
        self, name: str, item: LoadItem, code: int, header: bytes
    ) -> LoadResult:
        size = item.record_bytes
        if code == size:
            return item.result_of(header)
        if code == Code.NOT_FOUND:
            return MISSING
        # The code of a dead owner, and of a value of another size.
        stored = self.ask(MooncakeRequest("size", (name,)))[0]
        if stored >= 0 and stored != size:
            return REJECTED
        return FAILED


def _stored(code: int) -> StoreResult:
    if code == 0:
        return StoreResult.DONE
    return StoreResult.FULL if code == Code.NO_ROOM else StoreResult.FAILED


@dataclass(frozen=True, slots=True)
class ArenaLocation:
    """L1's memory: its name, and its address in this process."""

    name: SegmentName
    start: int

    def offset_of(self, buffer: memoryview) -> int | None:
        """Return a buffer's offset in the arena; None if it is elsewhere."""
        offset = address_of(buffer) - self.start
        inside = 0 <= offset <= self.name.num_bytes - buffer.nbytes
        return offset if inside else None


@dataclass(frozen=True, slots=True)
class Channel:
    """A pipe to one thread of the process, and the offset of its calls' headers."""

    pipe: Connection
    headers_at: int


class MooncakeClient:
    """The client process and its channels; unusable after `kill`."""

    def __init__(
        self, setup: Setup, arena: ArenaLocation | None, num_channels: int
    ) -> None:
        self.arena = arena
        self.dead = False
        self._lock = threading.Lock()
        self.headers = _new_segment(num_channels * MAX_PARTS * HEADER_BYTES)
        names = [_name_of(self.headers), *([arena.name] if arena else [])]
        setup = msgspec.structs.replace(setup, mapped=tuple(names))
        pipes = [Pipe() for _ in range(num_channels)]
        try:
            self._process = _start(setup, [theirs for _, theirs in pipes])
        except BaseException:
            self._free_headers()
            raise
        self._channels: queue.LifoQueue[Channel] = queue.LifoQueue()
        for index, (ours, _) in enumerate(pipes):
            self._channels.put(Channel(ours, index * MAX_PARTS * HEADER_BYTES))

    @contextmanager
    def channel(self, deadline: Deadline) -> Iterator[Channel]:
        """Borrow a channel; after an error the caller MUST kill the client."""
        try:
            channel = self._channels.get(timeout=deadline.remaining())
        except queue.Empty:
            raise DeadlineExceeded("all channels to the client are busy") from None
        yield channel
        self._channels.put(channel)

    def ask(
        self, channel: Channel, request: MooncakeRequest, deadline: Deadline
    ) -> list[int]:
        """Make one call; raises `Unavailable` if process or master are gone."""
        try:
            channel.pipe.send_bytes(msgspec.msgpack.encode(request))
            if not channel.pipe.poll(deadline.remaining()):
                raise DeadlineExceeded(f"no answer to {request.call} in time")
            reply = channel.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise Unavailable("the client process ended") from error
        codes = msgspec.msgpack.decode(reply, type=list[int])
        if Code.NOT_STARTED in codes:
            raise Unavailable("the client cannot reach the master")
        if Code.RPC_FAILED in codes or Code.RPC_TIMEOUT in codes:
            raise Unavailable("the master is gone")
        return codes

    def kill(self) -> None:
        """End the process: after return it accesses no memory."""
        with self._lock:
            if self.dead:
                return
            self._process.kill()
            self._process.wait()
            self._free_headers()
            self.dead = True

    def _free_headers(self) -> None:
        self.headers.unlink()
        self.headers.close()


class StagedTransfer:
    """The records of one call in segments that the process maps.

    Buffers in the arena are used in place; others are copied through a segment of this
    call, which is slow and only needed without an arena.
    """

    def __init__(
        self, client: MooncakeClient, channel: Channel, parts: Sequence[Buffers]
    ) -> None:
        self._parts = parts
        first = channel.headers_at
        self._headers = client.headers.array.data[
            first : first + len(parts) * HEADER_BYTES
        ]
        self._staged: list[tuple[int, memoryview]] = []
        arena = client.arena
        extra_index = 1 if arena is None else 2
        end = 0
        slices = []
        for index, buffers in enumerate(parts):
            record = [BufferSlice(_HEADERS, first + index * HEADER_BYTES, HEADER_BYTES)]
            for buffer in buffers:
                offset = arena.offset_of(buffer) if arena else None
                if offset is not None:
                    record.append(BufferSlice(_ARENA, offset, buffer.nbytes))
                    continue
                record.append(BufferSlice(extra_index, end, buffer.nbytes))
                self._staged.append((end, buffer))
                end += buffer.nbytes
            slices.append(tuple(record))
        self.slices = tuple(slices)
        self._extra = _new_segment(end) if end else None

    @property
    def extra(self) -> SegmentName | None:
        """The segment of this call."""
        return _name_of(self._extra) if self._extra else None

    def header(self, index: int) -> memoryview:
        """The header of one record."""
        return self._headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES]

    def copy_in(self) -> None:
        """Copy buffers outside the arena to the segment."""
        for view, buffer in self._pairs():
            view[:] = buffer

    def copy_out(self) -> None:
        """Copy the segment back to buffers outside the arena."""
        for view, buffer in self._pairs():
            buffer[:] = view

    def end(self) -> None:
        """Free the segment of this call."""
        self._headers.release()
        if self._extra:
            self._extra.unlink()
            self._extra.close()

    def _pairs(self) -> Iterator[tuple[memoryview, memoryview]]:
        if self._extra is None:
            return
        extra = self._extra.array.data
        for start, buffer in self._staged:
            yield extra[start : start + buffer.nbytes], buffer


def _start(setup: Setup, channels: list[Connection]) -> subprocess.Popen[bytes]:
    fds = [channel.fileno() for channel in channels]
    try:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "kvcore.tiers.mooncake_process",
                *map(str, fds),
            ],
            env=os.environ | {SETUP: msgspec.json.encode(setup).decode()},
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # It logs every call; errors are in the replies.
            start_new_session=True,  # Ctrl-C is for the server, which ends it.
        )
    except OSError as error:
        raise Unavailable(f"cannot start the client: {error}") from error
    finally:
        for channel in channels:
            channel.close()


def _new_segment(num_bytes: int) -> Segment:
    name = f"{SEGMENT_PREFIX}{os.getpid()}-mooncake-{secrets.token_hex(4)}"
    try:
        return Segment.create(name, num_bytes, touch=True)
    except SetupError as error:
        raise Unavailable(error.message) from error


def _name_of(segment: Segment) -> SegmentName:
    return SegmentName(segment.name, segment.num_bytes)


def open_mooncake(url: SplitResult, options: MooncakeOptions) -> MooncakeBackend:
    """Open `mooncake://MASTER:PORT`; raises `SetupError`."""
    setup = Setup(
        master=f"{host_of(url)}:{url.port or 50051}",
        local=options.local,
        metadata=options.metadata,
        protocol=options.protocol,
        device=options.device,
        segment_bytes=int(options.segment),
    )
    # Loads, stores and one query at once.
    return MooncakeBackend(setup, options.prefix, 2 * options.threads + 1)


register_tier("mooncake", open_mooncake, MooncakeOptions)
