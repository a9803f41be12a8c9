"""A connection that speaks RESP2, the protocol of Valkey and Redis.

It sends from memory and receives into memory that the caller has, in large pieces;
general clients copy every value two or three times. It does the few commands that a
tier needs, strictly one reply after another.
"""

from __future__ import annotations

import re
import select
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import DeadlineExceeded, SetupError, Unavailable
from kvcore.tiers.backend import Deadline
from kvcore.tiers.tier import num_bytes_of

_PIECE = 2 << 20
"""Bytes a system call, at most."""
_BUFFER = 64 << 10
_NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_NUMBER = re.compile(rb"-?[0-9]{1,19}")

Argument = bytes | str | int


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """TLS to the server: what it is checked against, and what we show it."""

    ca: str | None = None
    """File of certificates; the machine's own when None."""
    cert: str | None = None
    key: str | None = None
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Read the files; raises `SetupError` when they are no good."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key)
        except OSError as error:
            raise SetupError(f"TLS files of a tier: {error}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server listens and how it lets us in."""

    host: str = ""
    port: int = 6379
    path: Path | None = None
    """A Unix socket, instead of host and port."""
    tls: ssl.SSLContext | None = None
    user: str | None = None
    password: str | None = None
    db: int = 0


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """The server refused a command."""

    text: str


@dataclass(frozen=True, slots=True)
class BulkReply:
    """A value of so many bytes follows: the caller MUST take them off."""

    num_bytes: int


Reply = int | str | ErrorReply | BulkReply | None


class RespConnection:
    """One connection, used by one thread at a time; useless after an error."""

    def __init__(self, target: ServerAddress, deadline: Deadline) -> None:
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0
        with _translated():
            self._socket = _connect(target, deadline)
            # Asking first and waiting only for what is not there saves two of three
            # system calls a piece, where a timeout of the socket would wait first.
            self._socket.setblocking(False)
        try:
            self._enter(target, deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection: nothing is sent or received any more."""
        self._socket.close()

    def ask(self, deadline: Deadline, *commands: Sequence[Argument]) -> list[Reply]:
        """Send commands in one go and return their replies, none with a value."""
        self.send(deadline, *commands)
        return [self.receive(deadline) for _ in commands]

    def send(self, deadline: Deadline, *commands: Sequence[Argument]) -> None:
        """Send commands; `receive` is owed once for each."""
        self._send(memoryview(b"".join(map(_encode, commands))), deadline)

    def send_value(
        self,
        command: Sequence[Argument],
        value: Sequence[memoryview],
        deadline: Deadline,
    ) -> None:
        """Send a command whose last argument is the buffers, one after another."""
        start = _encode(command, num_more=1) + b"$%d\r\n" % num_bytes_of(value)
        self._send(memoryview(start), deadline)
        for buffer in value:
            self._send(buffer, deadline)
        self._send(memoryview(b"\r\n"), deadline)

    def receive(self, deadline: Deadline) -> Reply:
        """Return the next reply; `Unavailable` when it is none that we know."""
        line = self._line(deadline)
        mark, text = line[:1], line[1:].decode("ascii", "replace")
        if mark == b"+":
            return text
        if mark == b"-":
            return ErrorReply(text)
        if mark in (b":", b"$") and _NUMBER.fullmatch(line, 1):
            number = int(text)
            if mark == b":":
                return number
            return BulkReply(number) if number >= 0 else None
        raise Unavailable(f"the server does not speak RESP: {line[:32]!r}")

    def take_into(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        """Receive a value, or its beginning, into the buffers."""
        for buffer in buffers:
            self._receive_into(buffer, deadline)

    def skip(self, num_bytes: int, deadline: Deadline) -> None:
        """Take bytes off and drop them."""
        scratch = memoryview(bytearray(min(num_bytes, _BUFFER)))
        while num_bytes:
            piece = scratch[:num_bytes]
            self._receive_into(piece, deadline)
            num_bytes -= piece.nbytes

    def end_value(self, deadline: Deadline) -> None:
        """Take off what ends a value."""
        self.skip(2, deadline)

    # -- bytes --------------------------------------------------------------------

    def _enter(self, target: ServerAddress, deadline: Deadline) -> None:
        commands: list[Sequence[Argument]] = []
        if target.password is not None:
            user = [target.user] if target.user else []
            commands.append(["AUTH", *user, target.password])
        if target.db:
            commands.append(["SELECT", target.db])
        for reply in self.ask(deadline, *commands):
            if isinstance(reply, ErrorReply):
                raise Unavailable(f"the server does not let us in: {reply.text}")

    def _send(self, data: memoryview, deadline: Deadline) -> None:
        with _translated():
            while data.nbytes:
                deadline.left()
                try:
                    data = data[self._socket.send(data[:_PIECE]) :]
                except _NOT_YET as error:
                    self._wait(error, select.POLLOUT, deadline)

    def _receive_into(self, buffer: memoryview, deadline: Deadline) -> None:
        held = min(self._end - self._start, buffer.nbytes)
        buffer[:held] = self._buffer[self._start : self._start + held]
        self._start += held
        buffer = buffer[held:]
        while buffer.nbytes:
            deadline.left()
            buffer = buffer[self._receive_some(buffer[:_PIECE], deadline) :]

    def _receive_some(self, buffer: memoryview, deadline: Deadline) -> int:
        with _translated():
            while True:
                try:
                    received = self._socket.recv_into(buffer)
                    break
                except _NOT_YET as error:
                    self._wait(error, select.POLLIN, deadline)
        if not received:
            raise Unavailable("the server closed the connection")
        return received

    def _wait(self, error: OSError, event: int, deadline: Deadline) -> None:
        """Wait until the socket can go on; TLS may want the other direction first."""
        if isinstance(error, ssl.SSLWantReadError):
            event = select.POLLIN
        elif isinstance(error, ssl.SSLWantWriteError):
            event = select.POLLOUT
        poller = select.poll()
        poller.register(self._socket, event)
        poller.poll(deadline.left() * 1000)

    def _line(self, deadline: Deadline) -> bytes:
        while True:
            held = bytes(self._buffer[self._start : self._end])
            line, found, _ = held.partition(b"\r\n")
            if found:
                self._start += len(line) + 2
                return line
            if len(held) == _BUFFER:
                raise Unavailable(f"the server does not speak RESP: {held[:32]!r}")
            self._buffer[: len(held)] = held
            self._start, self._end = 0, len(held)
            self._end += self._receive_some(self._buffer[self._end :], deadline)


def _connect(target: ServerAddress, deadline: Deadline) -> socket.socket:
    if target.path is not None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(deadline.left())
        try:
            connection.connect(str(target.path))
        except BaseException:
            connection.close()
            raise
        return connection
    address = (target.host, target.port)
    connection = socket.create_connection(address, deadline.left())
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if target.tls is None:
        return connection
    try:
        connection.settimeout(deadline.left())
        return target.tls.wrap_socket(connection, server_hostname=target.host)
    except BaseException:
        connection.close()
        raise


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded("the server has not answered in time") from None
    except (OSError, UnicodeError) as error:  # A host's name may be none.
        reason = getattr(error, "strerror", None) or str(error)
        raise Unavailable(f"the server cannot be reached: {reason}") from error


def _encode(command: Sequence[Argument], num_more: int = 0) -> bytes:
    words = [b"*%d\r\n" % (len(command) + num_more)]
    for argument in command:
        word = argument if isinstance(argument, bytes) else str(argument).encode()
        words.append(b"$%d\r\n%b\r\n" % (len(word), word))
    return b"".join(words)
