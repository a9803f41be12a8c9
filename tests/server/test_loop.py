"""The event loop, over a fake socket."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import zmq

from kvcore.errors import Overloaded
from kvcore.protocol import PROTOCOL_VERSION, BootToken, Hello, Ping
from kvcore.server.client_table import ClientTable
from kvcore.server.event_loop import MAX_SKIPPED, EventLoop
from kvcore.wire import RequestEnvelope, decode_reply


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
    loop = EventLoop(socket, BootToken(1), table, 8, 1 << 20)  # type: ignore[arg-type]
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


def test_a_clients_unanswered_requests_have_a_limit_of_bytes() -> None:
    """One more is refused; the first is accepted whatever its size."""
    table = ClientTable(1, list[int]().append, list[int]().remove)
    loop = EventLoop(ScriptedSocket(), BootToken(1), table, 8, 1000)  # type: ignore[arg-type]
    client = table.add(b"me", Hello(PROTOCOL_VERSION, 1, 1, 1))
    envelope = RequestEnvelope(1, "PING", "", BootToken(1), 0, msgspec.Raw())
    assert loop._admit(b"me", envelope, Ping(), 2000) is client
    client.num_running, client.running_bytes = 1, 900
    assert loop._admit(b"me", envelope, Ping(), 100) is client
    with pytest.raises(Overloaded, match="1001 bytes"):
        loop._admit(b"me", envelope, Ping(), 101)
    loop.close()
