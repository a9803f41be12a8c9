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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from urllib.parse import SplitResult

import msgspec

from kvcore.errors import DeadlineExceeded, SetupError, Unavailable
from kvcore.option_structs import ByteSize
from kvcore.shm import SEGMENT_PREFIX, Bytes, Segment
from kvcore.tiers.direct_io import address_of
from kvcore.tiers.mooncake_process import (
    SETUP,
    Code,
    MooncakeRequest,
    SegmentName,
    Setup,
    Slices,
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
    PartItem,
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
        with self._channel(deadline) as channel:
            return channel.exist(self._names(keys), deadline)

    def load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Get all items at once."""
        names = self._names([item.key for item in items])
        with self._channel(deadline) as channel:
            loaded = channel.get(names, items, deadline)
        yield from loaded

    def store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Put all absent items at once: a second put keeps the first."""
        names = self._names([item.key for item in items])
        with self._channel(deadline) as channel:
            present = channel.exist(names, deadline)
            absent = [
                (name, item)
                for name, item, has in zip(names, items, present, strict=True)
                if not has
            ]
            stored = iter(
                channel.put(
                    [name for name, _ in absent], [item for _, item in absent], deadline
                )
            )
        for has in present:
            yield StoreResult.PRESENT if has else next(stored)

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Remove keys, even while they are read."""
        request = MooncakeRequest("remove", self._names(keys))
        with self._channel(deadline) as channel:
            return channel.ask(request, deadline).count(0)

    def usage(self, deadline: Deadline) -> Usage:
        """Query one key; only the master's metrics have the size."""
        with self._channel(deadline) as channel:
            channel.exist([f"{self._prefix}probe"], deadline)
        return Usage()

    def close(self) -> None:
        """Kill the client process."""
        with self._lock:
            if self._client is not None:
                self._client.kill()

    def _names(self, keys: Sequence[PartKey]) -> tuple[str, ...]:
        return tuple(f"{self._prefix}{key}" for key in keys)

    def _channel(self, deadline: Deadline) -> AbstractContextManager[Channel]:
        """Borrow a channel of the client, which is started if there is none."""
        with self._lock:
            if self._client is None or self._client.dead:
                if self._arena is None:
                    raise Unavailable("no memory was attached")
                self._client = MooncakeClient(
                    self._setup, self._arena, self._num_channels
                )
            return self._client.channel(deadline)


@dataclass(frozen=True, slots=True)
class ArenaLocation:
    """L1's memory: its name, and its address in this process."""

    name: SegmentName
    start: int

    def offset_of(self, buffer: memoryview) -> int:
        """Return a buffer's offset in the arena; raises `ValueError` elsewhere."""
        offset = address_of(buffer) - self.start
        if not 0 <= offset <= self.name.num_bytes - buffer.nbytes:
            raise ValueError("a buffer is outside the memory that was attached")
        return offset


class MooncakeClient:
    """The client process and its channels; unusable after `kill`."""

    def __init__(self, setup: Setup, arena: ArenaLocation, num_channels: int) -> None:
        self.arena = arena
        self.dead = False
        self._lock = threading.Lock()
        self.headers = _new_segment(num_channels * MAX_PARTS * HEADER_BYTES)
        headers = SegmentName(self.headers.name, self.headers.num_bytes)
        setup = msgspec.structs.replace(setup, mapped=(headers, arena.name))
        pipes = [Pipe() for _ in range(num_channels)]
        try:
            self._process = _start(setup, [theirs for _, theirs in pipes])
        except BaseException:
            self._free_headers()
            raise
        self._channels: queue.LifoQueue[Channel] = queue.LifoQueue()
        for index, (ours, _) in enumerate(pipes):
            self._channels.put(Channel(self, ours, index * MAX_PARTS * HEADER_BYTES))

    @contextmanager
    def channel(self, deadline: Deadline) -> Iterator[Channel]:
        """Borrow a channel; an error kills the client, and with it all other calls."""
        try:
            channel = self._channels.get(timeout=deadline.remaining())
            yield channel
        except queue.Empty:
            self.kill()
            raise DeadlineExceeded("all channels to the client are busy") from None
        except BaseException:
            self.kill()
            raise
        self._channels.put(channel)

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


@dataclass(frozen=True, slots=True)
class Channel:
    """A pipe to one thread of the process, and the offset of its calls' headers."""

    client: MooncakeClient
    pipe: Connection
    headers_at: int

    def ask(self, request: MooncakeRequest, deadline: Deadline) -> list[int]:
        """Return a number per key; raises `Unavailable` if the store is gone."""
        try:
            self.pipe.send_bytes(msgspec.msgpack.encode(request))
            if not self.pipe.poll(deadline.remaining()):
                raise DeadlineExceeded(f"no answer to {request.call} in time")
            reply = self.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise Unavailable("the client process ended") from error
        codes = msgspec.msgpack.decode(reply, type=list[int])
        if Code.NOT_STARTED in codes:
            raise Unavailable("the client cannot reach the master")
        if Code.RPC_FAILED in codes or Code.RPC_TIMEOUT in codes:
            raise Unavailable("the master is gone")
        return codes

    def exist(self, names: Sequence[str], deadline: Deadline) -> list[bool]:
        """Return for each name whether the master has it."""
        request = MooncakeRequest("exists", tuple(names))
        return [code == 1 for code in self.ask(request, deadline)]

    def get(
        self, names: Sequence[str], items: Sequence[LoadItem], deadline: Deadline
    ) -> list[LoadResult]:
        """Fill items."""
        request = MooncakeRequest("get", tuple(names), self._slices(items))
        codes = self.ask(request, deadline)
        headers = [bytes(self._header(index)) for index in range(len(items))]
        results = []
        for name, item, code, header in zip(names, items, codes, headers, strict=True):
            if code == item.record_bytes:
                results.append(item.result_of(header))
            elif code == Code.NOT_FOUND:
                results.append(MISSING)
            else:
                # The code of a dead owner, and of a value of another size.
                size = MooncakeRequest("size", (name,))
                [stored] = self.ask(size, deadline)
                is_foreign = stored >= 0 and stored != item.record_bytes
                results.append(REJECTED if is_foreign else FAILED)
        return results

    def put(
        self, names: Sequence[str], items: Sequence[StoreItem], deadline: Deadline
    ) -> list[StoreResult]:
        """Store absent items."""
        for index, item in enumerate(items):
            self._header(index)[:] = item.header()
        request = MooncakeRequest("put", tuple(names), self._slices(items))
        codes = self.ask(request, deadline) if items else []
        return [_STORED.get(code, StoreResult.FAILED) for code in codes]

    def _header(self, index: int) -> memoryview:
        start = self.headers_at + index * HEADER_BYTES
        return self.client.headers.array.data[start : start + HEADER_BYTES]

    def _slices(self, items: Sequence[PartItem]) -> tuple[Slices, ...]:
        """Return where the process finds each item's record."""
        return tuple(
            (
                (_HEADERS, self.headers_at + index * HEADER_BYTES, HEADER_BYTES),
                *(
                    (_ARENA, self.client.arena.offset_of(buffer), buffer.nbytes)
                    for buffer in item.buffers
                ),
            )
            for index, item in enumerate(items)
        )


_STORED = {0: StoreResult.DONE, Code.NO_ROOM: StoreResult.FULL}


def _start(setup: Setup, channels: list[Connection]) -> subprocess.Popen[bytes]:
    fds = [channel.fileno() for channel in channels]
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "kvcore.tiers.mooncake_process", *map(str, fds)],
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
