"""Valkey and Redis: a string per part, over a RESP2 connection.

The connection sends from and receives into L1's pages in large blocks; general clients
copy every value two or three times. It implements the few commands that a tier needs,
strictly one reply after another.
"""

from __future__ import annotations

import logging
import re
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import SplitResult, unquote

from kvcore.errors import DeadlineExceeded, SetupError, Unavailable
from kvcore.tiers.tier import (
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

log = logging.getLogger(__name__)

_MAX_BLOCK = 2 << 20
"""Bytes per system call, at most."""
_BUFFER = 64 << 10
_TLS_EVENTS: dict[type[OSError], int] = {
    ssl.SSLWantReadError: select.POLLIN,
    ssl.SSLWantWriteError: select.POLLOUT,
}
_NOT_READY: tuple[type[OSError], ...] = (BlockingIOError, *_TLS_EVENTS)
_NUMBER = re.compile(rb"-?[0-9]{1,19}")
_READ_ONLY = ("OOM", "READONLY", "MISCONF", "NOREPLICAS", "NOPERM")
"""Errors on a write from a server that still serves reads: full, a replica, one that
cannot save or has lost its replicas, a user without write permission."""

Argument = bytes | str | int


class ValkeyOptions(TierOptions, frozen=True):
    """Options of `valkey://HOST:PORT/DB` and its variants."""

    prefix: str = ""
    """Of every key."""
    db: int = 0
    """With `+unix` only; otherwise the URL's path."""
    ca: str = ""
    """File of CA certificates; the system's if empty."""
    cert: str = ""
    key: str = ""
    insecure: bool = False
    """Do not verify the server's certificate."""

    def tls_context(self) -> ssl.SSLContext:
        """Read the certificates; raises `SetupError`."""
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            if self.cert:
                context.load_cert_chain(self.cert, self.key or None)
        except OSError as error:
            raise SetupError(f"TLS files of a tier: {error}") from error
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server listens, and the credentials for it."""

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
    """A value of `num_bytes` follows, which the caller MUST receive or skip."""

    num_bytes: int


Reply = int | str | ErrorReply | BulkReply | None


class RespConnection:
    """One connection, used by one thread at a time; useless after an error."""

    def __init__(self, address: ServerAddress, deadline: Deadline) -> None:
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0
        with _translated_errors():
            self._socket = _connect(address, deadline)
            # To try first and wait only when not ready saves two of three system calls
            # per block; a socket with a timeout waits first.
            self._socket.setblocking(False)
        try:
            self._authenticate(address, deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the socket; no later call is allowed."""
        self._socket.close()

    def ask(self, deadline: Deadline, *commands: Sequence[Argument]) -> list[Reply]:
        """Send commands together and return their replies, none of them a value."""
        self.send(deadline, *commands)
        return [self.receive(deadline) for _ in commands]

    def send(self, deadline: Deadline, *commands: Sequence[Argument]) -> None:
        """Send commands; `receive` MUST follow once for each."""
        self._send(memoryview(b"".join(map(_encode, commands))), deadline)

    def send_value(
        self,
        command: Sequence[Argument],
        value: Sequence[memoryview],
        deadline: Deadline,
    ) -> None:
        """Send a command whose last argument is the concatenated buffers."""
        start = _encode(command, num_more=1) + b"$%d\r\n" % sum(map(len, value))
        self._send(memoryview(start), deadline)
        for buffer in value:
            self._send(buffer, deadline)
        self._send(memoryview(b"\r\n"), deadline)

    def receive(self, deadline: Deadline) -> Reply:
        """Return the next reply; raises `Unavailable` if it is not RESP."""
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

    def receive_into(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        """Receive a value into buffers of exactly its size."""
        for buffer in (*buffers, memoryview(bytearray(2))):
            self._receive_into(buffer, deadline)

    def skip(self, reply: BulkReply, deadline: Deadline) -> None:
        """Receive and discard a value."""
        whole, rest = divmod(reply.num_bytes, _BUFFER)
        scratch = memoryview(bytearray(_BUFFER))
        self.receive_into((*[scratch] * whole, scratch[:rest]), deadline)

    # -- bytes --------------------------------------------------------------------

    def _authenticate(self, address: ServerAddress, deadline: Deadline) -> None:
        commands: list[Sequence[Argument]] = []
        if address.password is not None:
            user = [address.user] if address.user else []
            commands.append(["AUTH", *user, address.password])
        if address.db:
            commands.append(["SELECT", address.db])
        for reply in self.ask(deadline, *commands):
            if isinstance(reply, ErrorReply):
                raise Unavailable(f"the server refused the login: {reply.text}")

    def _send(self, data: memoryview, deadline: Deadline) -> None:
        with _translated_errors():
            while data.nbytes:
                send = partial(self._socket.send, data[:_MAX_BLOCK])
                data = data[self._when_ready(send, select.POLLOUT, deadline) :]

    def _receive_into(self, buffer: memoryview, deadline: Deadline) -> None:
        held = min(self._end - self._start, buffer.nbytes)
        buffer[:held] = self._buffer[self._start : self._start + held]
        self._start += held
        buffer = buffer[held:]
        while buffer.nbytes:
            buffer = buffer[self._receive_some(buffer[:_MAX_BLOCK], deadline) :]

    def _receive_some(self, buffer: memoryview, deadline: Deadline) -> int:
        receive = partial(self._socket.recv_into, buffer)
        with _translated_errors():
            received = self._when_ready(receive, select.POLLIN, deadline)
        if not received:
            raise Unavailable("the server closed the connection")
        return received

    def _when_ready(
        self, move: Callable[[], int], event: int, deadline: Deadline
    ) -> int:
        """Return the bytes moved; TLS may need the other direction first."""
        while True:
            remaining = deadline.remaining()
            try:
                return move()
            except _NOT_READY as error:
                poller = select.poll()
                poller.register(self._socket, _TLS_EVENTS.get(type(error), event))
                poller.poll(remaining * 1000)

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


def _connect(address: ServerAddress, deadline: Deadline) -> socket.socket:
    if address.path is None:
        place = (address.host, address.port)
        connection = socket.create_connection(place, deadline.remaining())
    else:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(deadline.remaining())
        if address.path is not None:
            connection.connect(str(address.path))
            return connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.tls is None:
            return connection
        return address.tls.wrap_socket(connection, server_hostname=address.host)
    except BaseException:
        connection.close()
        raise


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded("the server has not answered in time") from None
    except (OSError, UnicodeError) as error:  # An invalid host name is a UnicodeError.
        reason = getattr(error, "strerror", None) or str(error)
        raise Unavailable(f"the server cannot be reached: {reason}") from error


def _encode(command: Sequence[Argument], num_more: int = 0) -> bytes:
    words = [b"*%d\r\n" % (len(command) + num_more)]
    for argument in command:
        word = argument if isinstance(argument, bytes) else str(argument).encode()
        words.append(b"$%d\r\n%b\r\n" % (len(word), word))
    return b"".join(words)


class ValkeyBackend(Backend):
    """`Backend` over one server, with one connection per concurrent call."""

    batch = 8

    def __init__(self, address: ServerAddress, prefix: str) -> None:
        self._address = address
        self._prefix = prefix
        self._lock = threading.Lock()
        self._idle: list[RespConnection] = []
        self._refusal = ""
        """The last refusal of a write that was logged."""

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Send all keys in one round trip."""
        with self._connection(deadline) as connection:
            return self._present(connection, keys, deadline)

    def load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Send all keys in one round trip, and receive into the items' buffers."""
        with self._connection(deadline) as connection:
            connection.send(deadline, *(["GET", self._name(i.key)] for i in items))
            for item in items:
                yield _receive_part(connection, item, deadline)

    def store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Send the absent items."""
        with self._connection(deadline) as connection:
            keys = [item.key for item in items]
            present = self._present(connection, keys, deadline)
            for item, is_present in zip(items, present, strict=True):
                if is_present:
                    yield StoreResult.PRESENT
                else:
                    yield self._set(connection, item, deadline)

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Unlink keys: the server frees their memory in the background."""
        if not keys:
            return 0
        with self._connection(deadline) as connection:
            names = map(self._name, keys)
            (reply,) = connection.ask(deadline, ["UNLINK", *names])
            return _number(reply)

    def usage(self, deadline: Deadline) -> Usage:
        """Return the memory of the whole server, for all its users."""
        with self._connection(deadline) as connection:
            connection.send(deadline, ["INFO", "memory"])
            reply = connection.receive(deadline)
            if not isinstance(reply, BulkReply):
                return Usage()
            text = memoryview(bytearray(reply.num_bytes))
            connection.receive_into([text], deadline)
        used = _info_field(bytes(text), b"used_memory")
        return Usage(used, _info_field(bytes(text), b"maxmemory") or None)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _name(self, key: PartKey) -> str:
        return f"{self._prefix}{key}"

    def _present(
        self, connection: RespConnection, keys: Sequence[PartKey], deadline: Deadline
    ) -> list[bool]:
        commands = (["EXISTS", self._name(key)] for key in keys)
        return [_number(reply) == 1 for reply in connection.ask(deadline, *commands)]

    def _set(
        self, connection: RespConnection, item: StoreItem, deadline: Deadline
    ) -> StoreResult:
        value = [memoryview(item.header()), *item.buffers]
        connection.send_value(["SET", self._name(item.key)], value, deadline)
        reply = connection.receive(deadline)
        if reply == "OK":
            return StoreResult.DONE
        if isinstance(reply, ErrorReply) and reply.text.startswith(_READ_ONLY):
            if reply.text != self._refusal:
                self._refusal = reply.text
                place = self._address.path or self._address.host
                log.warning("%s accepts no writes: %s", place, reply.text)
            return StoreResult.FULL
        raise _refused(reply)

    @contextmanager
    def _connection(self, deadline: Deadline) -> Iterator[RespConnection]:
        """Borrow a connection; after an error close it and every idle one."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = RespConnection(self._address, deadline)
        try:
            yield connection
        except BaseException:
            connection.close()
            self.close()
            raise
        with self._lock:
            self._idle.append(connection)


def _receive_part(
    connection: RespConnection, item: LoadItem, deadline: Deadline
) -> LoadResult:
    reply = connection.receive(deadline)
    if reply is None:
        return MISSING
    if isinstance(reply, ErrorReply) and reply.text.startswith("WRONGTYPE"):
        return REJECTED
    if not isinstance(reply, BulkReply):
        raise _refused(reply)
    if reply.num_bytes != item.record_bytes:
        connection.skip(reply, deadline)
        return REJECTED
    header = memoryview(bytearray(HEADER_BYTES))
    connection.receive_into([header, *item.buffers], deadline)
    return item.result_of(header)


def _number(reply: Reply) -> int:
    if not isinstance(reply, int):
        raise _refused(reply)
    return reply


def _refused(reply: Reply) -> Unavailable:
    text = reply.text if isinstance(reply, ErrorReply) else repr(reply)
    return Unavailable(f"the server refused: {text}")


def _info_field(info: bytes, name: bytes) -> int | None:
    found = re.search(rb"^%b:(\d+)\r?$" % name, info, re.MULTILINE)
    return int(found[1]) if found else None


def open_valkey(url: SplitResult, options: ValkeyOptions) -> ValkeyBackend:
    """Open a URL of any of the schemes below; raises `SetupError`."""
    unix = url.scheme.endswith("+unix")
    if unix and not url.path.strip("/"):
        raise SetupError(f"must read {url.scheme}:///PATH")
    database = url.path.strip("/") or "0"
    if not unix and not database.isdecimal():
        raise SetupError(f"{database!r} is not the number of a database")
    secure = url.scheme in ("valkeys", "rediss")
    address = ServerAddress(
        host="" if unix else host_of(url),
        port=url.port or 6379,
        path=Path(unquote(url.path)) if unix else None,
        tls=options.tls_context() if secure else None,
        user=unquote(url.username) if url.username else None,
        password=None if url.password is None else unquote(url.password),
        db=options.db if unix else int(database),
    )
    return ValkeyBackend(address, options.prefix)


for _scheme in ("valkey", "valkeys", "valkey+unix", "redis", "rediss", "redis+unix"):
    register_tier(_scheme, open_valkey, ValkeyOptions)
