"""RESP connection against a server with scripted replies."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcore.errors import DeadlineExceeded, Unavailable
from kvcore.tiers.tier import Deadline
from kvcore.tiers.tier_url import open_tier
from kvcore.tiers.valkey_backend import (
    BulkReply,
    ErrorReply,
    RespConnection,
    ServerAddress,
)
from tests.tiers.part_factory import key_of


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[[bytes], ServerAddress]:
    """Makes a server that answers the first bytes it gets with a script, and ends."""

    def make(answer: bytes) -> ServerAddress:
        path = tmp_path / "socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener:
                connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return ServerAddress(path=path)

    return make


def test_replies_of_each_kind(scripted: Callable[[bytes], ServerAddress]) -> None:
    """Numbers, texts, errors, nothing and values are told apart, split anywhere."""
    target = scripted(b"+OK\r\n:-7\r\n-ERR no\r\n$-1\r\n$5\r\nhello\r\n:1\r\n")
    deadline = Deadline.after(10)
    connection = RespConnection(target, deadline)
    connection.send(deadline, ["PING"])
    replies = [connection.receive(deadline) for _ in range(5)]
    assert replies == ["OK", -7, ErrorReply("ERR no"), None, BulkReply(5)]
    first, second = bytearray(2), bytearray(3)
    connection.receive_into([memoryview(first), memoryview(second)], deadline)
    assert (first, second) == (b"he", b"llo")
    assert connection.receive(deadline) == 1
    connection.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400\r\n",
        b":x\r\n",
        b"$\r\n",
        b":--1\r\n",
        b"$" + b"9" * 5000 + b"\r\n",
        b"x" * 70_000,
    ],
)
def test_other_protocols_are_refused(
    scripted: Callable[[bytes], ServerAddress], answer: bytes
) -> None:
    """Whatever is not RESP makes the server unavailable."""
    deadline = Deadline.after(10)
    connection = RespConnection(scripted(answer), deadline)
    with pytest.raises(Unavailable, match="does not speak RESP"):
        connection.ask(deadline, ["PING"])
    connection.close()


def test_a_value_that_ends_early_is_an_error(
    scripted: Callable[[bytes], ServerAddress],
) -> None:
    """A connection that closes inside a value does not look like a value."""
    deadline = Deadline.after(10)
    connection = RespConnection(scripted(b"$9\r\nhalf"), deadline)
    connection.send(deadline, ["GET", "key"])
    assert connection.receive(deadline) == BulkReply(9)
    with pytest.raises(Unavailable, match="closed"):
        connection.receive_into([memoryview(bytearray(9))], deadline)
    connection.close()


def test_a_refused_password_is_unavailable(
    scripted: Callable[[bytes], ServerAddress],
) -> None:
    """The error contains the server's reason."""
    target = scripted(b"-WRONGPASS no such user\r\n")
    target = ServerAddress(path=target.path, password="wrong")
    with pytest.raises(Unavailable, match="WRONGPASS"):
        RespConnection(target, Deadline.after(10))


def test_no_answer_ends_at_the_deadline(tmp_path: Path) -> None:
    """A server that accepts and says nothing is given up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        connection = RespConnection(
            ServerAddress(path=tmp_path / "socket"), Deadline.after(10)
        )
        with pytest.raises(DeadlineExceeded):
            connection.ask(Deadline.after(0.05), ["PING"])
        connection.close()


def test_a_host_that_has_no_name_is_unavailable() -> None:
    """A host name that does not resolve is reported as unreachable."""
    with pytest.raises(Unavailable, match="cannot be reached"):
        RespConnection(ServerAddress(host="a..b"), Deadline.after(10))


def test_128_keys_are_one_round_trip(tmp_path: Path) -> None:
    """A server that says nothing before it has every question has them all."""
    keys = [key_of(number) for number in range(128)]

    def answer_at_the_end(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            asked = b""
            while asked.count(b"EXISTS") < len(keys):
                asked += connection.recv(1 << 16)
            connection.sendall(b":1\r\n:0\r\n" * (len(keys) // 2))
            connection.recv(1)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        thread = threading.Thread(target=answer_at_the_end, args=(listener,))
        thread.start()
        tier = open_tier(f"valkey+unix://{tmp_path}/socket?timeout=10")
        assert tier.contains(keys).result() == [True, False] * (len(keys) // 2)
        tier.close()
        thread.join()
