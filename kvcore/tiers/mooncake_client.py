"""Our end of the process with the Mooncake client: start it, ask it, kill it."""

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
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import msgspec
import numpy as np

from kvcore.errors import DeadlineExceeded, SetupError, Unavailable
from kvcore.extents import Buffers
from kvcore.shm import SEGMENT_PREFIX, Segment
from kvcore.tiers.backend import Deadline
from kvcore.tiers.mooncake_process import (
    SETUP,
    BufferSlice,
    Code,
    MooncakeRequest,
    SegmentName,
    Setup,
)
from kvcore.tiers.tier import HEADER_BYTES

MAX_PARTS = 16
"""Parts that one call may move."""

_HEADERS, _ARENA = 0, 1
"""Segments that the process has mapped, in this order."""


@dataclass(frozen=True, slots=True)
class ArenaLocation:
    """L1's memory: its name, and its address in this process."""

    name: SegmentName
    start: int

    def offset_of(self, buffer: memoryview) -> int | None:
        """Return where a buffer lies in the arena; None when it does not."""
        offset = _address(buffer) - self.start
        inside = 0 <= offset <= self.name.num_bytes - buffer.nbytes
        return offset if inside else None


@dataclass(frozen=True, slots=True)
class Channel:
    """A pipe to one thread of the process, and room for the headers of its calls."""

    pipe: Connection
    headers_at: int


class MooncakeClient:
    """The process and its channels; of no use after `kill`."""

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
            self._drop_headers()
            raise
        self._channels: queue.LifoQueue[Channel] = queue.LifoQueue()
        for index, (ours, _) in enumerate(pipes):
            self._channels.put(Channel(ours, index * MAX_PARTS * HEADER_BYTES))

    @contextmanager
    def channel(self, deadline: Deadline) -> Iterator[Channel]:
        """Lend a channel; after an error the client is to be killed."""
        try:
            channel = self._channels.get(timeout=deadline.left())
        except queue.Empty:
            raise DeadlineExceeded("all channels to the client are busy") from None
        yield channel
        self._channels.put(channel)

    def ask(
        self, channel: Channel, request: MooncakeRequest, deadline: Deadline
    ) -> list[int]:
        """Have one call made; `Unavailable` when process or master are gone."""
        try:
            channel.pipe.send_bytes(msgspec.msgpack.encode(request))
            if not channel.pipe.poll(deadline.left()):
                raise DeadlineExceeded(f"no answer to {request.call} in time")
            reply = channel.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise Unavailable("the client process ended") from error
        codes = msgspec.msgpack.decode(reply, type=list[int])
        if Code.NOT_STARTED in codes:
            raise Unavailable("the client finds no master")
        if Code.RPC_FAILED in codes or Code.RPC_TIMEOUT in codes:
            raise Unavailable("the master is gone")
        return codes

    def kill(self) -> None:
        """End the process: at return it touches no memory any more."""
        with self._lock:
            if self.dead:
                return
            self._process.kill()
            self._process.wait()
            self._drop_headers()
            self.dead = True

    def _drop_headers(self) -> None:
        self.headers.unlink()
        self.headers.close()


class StagedTransfer:
    """Where the records of one call lie for the process: headers, then payloads.

    Buffers in the arena are used in place; any other goes through shared memory made
    for this call alone, which is slow and needed only without an arena.
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
        pieces = []
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
            pieces.append(tuple(record))
        self.pieces = tuple(pieces)
        self._extra = _new_segment(end) if end else None

    @property
    def extra(self) -> SegmentName | None:
        """The memory made for this call."""
        return _name_of(self._extra) if self._extra else None

    def header(self, index: int) -> memoryview:
        """The header of one record."""
        return self._headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES]

    def put_in(self) -> None:
        """Copy what does not lie in the arena to where the process sees it."""
        for view, buffer in self._pairs():
            view[:] = buffer

    def take_out(self) -> None:
        """Copy it back."""
        for view, buffer in self._pairs():
            buffer[:] = view

    def end(self) -> None:
        """Let go of the memory made for this call."""
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
            stderr=subprocess.DEVNULL,  # It logs every call; what matters is answered.
            start_new_session=True,  # Ctrl-C is for the server, which then ends it.
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


def _address(buffer: memoryview) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
