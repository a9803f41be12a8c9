"""The event loop, over a fake socket."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import zmq

from kvcore.protocol import BootToken
from kvcore.server.client_table import ClientTable
from kvcore.server.event_loop import MAX_SKIPPED, EventLoop
from kvcore.wire import decode_reply


@dataclass
class Frame:
    """One frame of a message."""

    buffer: bytes
    more: bool


class ScriptedSocket:
    """A fake ROUTER socket with received messages and sent replies."""

    def __init__(self) -> None:
        self.frames: deque[Frame] = deque()
        self.sent: list[bytes] = []

    def add(self, *message: bytes) -> None:
        """Queue a received message."""
        last = len(message) - 1
        self.frames += [Frame(part, at < last) for at, part in enumerate(message)]

    def recv(self, _flags: int, copy: bool = True) -> Any:
        """Receive a frame."""
        if not self.frames:
            raise zmq.Again
        frame = self.frames.popleft()
        return frame.buffer if copy else frame

    def send(self, frame: bytes, _flags: int) -> None:
        """Send a frame."""
        self.sent.append(frame)


def test_a_message_of_many_frames_is_dropped_in_turns() -> None:
    """It gets one error; other requests are served between its frames and after it."""
    socket = ScriptedSocket()
    table = ClientTable(1, list[int]().append, list[int]().remove)
    loop = EventLoop(socket, BootToken(1), table, 8)  # type: ignore[arg-type]
    socket.add(b"liar", *[b"x"] * (3 * MAX_SKIPPED))
    socket.add(b"next", b"junk")
    turns = 0
    while socket.frames:
        before = len(socket.frames)
        loop._receive()
        assert before - len(socket.frames) <= MAX_SKIPPED
        turns += 1
    assert turns == 1 + 3 + 1
    assert socket.sent[::2] == [b"liar", b"next"]
    errors = [decode_reply(frame).code for frame in socket.sent[1::2]]
    assert errors == ["bad_request", "bad_request"]
    loop.close()
