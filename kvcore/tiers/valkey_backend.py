"""Valkey and Redis: a string a part, moved between the socket and L1's own pages."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvcore.errors import Unavailable
from kvcore.shm import Bytes
from kvcore.tiers.backend import Deadline, Usage
from kvcore.tiers.resp import (
    BulkReply,
    ErrorReply,
    Reply,
    RespConnection,
    ServerAddress,
)
from kvcore.tiers.tier import (
    HEADER_BYTES,
    MISSING,
    REJECTED,
    LoadItem,
    LoadOutcome,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    pack_header,
    read_header,
    record_bytes,
)

log = logging.getLogger(__name__)

_TAKES_NOTHING = ("OOM", "READONLY", "MISCONF", "NOREPLICAS", "NOPERM")
"""Refusals to write of a server that answers all else: full, a replica, one that cannot
save or has lost its replicas, a user who may only read."""


class ValkeyBackend:
    """`Backend` over one server, with as many connections as threads ask at once."""

    batch = 8
    num_evicted = 0
    """The server evicts by its own policy, and does not tell which keys were ours."""

    def __init__(self, target: ServerAddress, prefix: str) -> None:
        self._target = target
        self._prefix = prefix
        self._lock = threading.Lock()
        self._idle: list[RespConnection] = []
        self._refusal = ""
        """Why it last took no part."""

    def attach(self, name: str, arena: Bytes) -> None:
        """Nothing to do: sockets take any memory."""

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Ask for all keys in one go."""
        with self._connection(deadline) as connection:
            return self._present(connection, keys, deadline)

    def load(
        self, slots: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Ask for all slots in one go, and receive into them as they come."""
        with self._connection(deadline) as connection:
            connection.send(deadline, *(["GET", self._name(s.key)] for s in slots))
            for slot in slots:
                yield _receive(connection, slot, deadline)

    def store(
        self, blobs: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Send what is not there."""
        with self._connection(deadline) as connection:
            keys = [blob.key for blob in blobs]
            present = self._present(connection, keys, deadline)
            for blob, there in zip(blobs, present, strict=True):
                yield (
                    StoreResult.PRESENT
                    if there
                    else self._set(connection, blob, deadline)
                )

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Have the server free the memory in its own time."""
        if not keys:
            return 0
        with self._connection(deadline) as connection:
            names = map(self._name, keys)
            (reply,) = connection.ask(deadline, ["UNLINK", *names])
            return _number(reply)

    def usage(self, deadline: Deadline) -> Usage:
        """What the server as a whole uses, of all its users."""
        with self._connection(deadline) as connection:
            connection.send(deadline, ["INFO", "memory"])
            reply = connection.receive(deadline)
            if not isinstance(reply, BulkReply):
                return Usage()
            text = memoryview(bytearray(reply.num_bytes))
            connection.take_into([text], deadline)
            connection.end_value(deadline)
        used = _field(bytes(text), b"used_memory")
        return Usage(used, _field(bytes(text), b"maxmemory") or None)

    def close(self) -> None:
        """End the connections."""
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
        self, connection: RespConnection, blob: StoreItem, deadline: Deadline
    ) -> StoreResult:
        value = [memoryview(pack_header(blob)), *blob.buffers]
        connection.send_value(["SET", self._name(blob.key)], value, deadline)
        reply = connection.receive(deadline)
        if reply == "OK":
            return StoreResult.DONE
        if isinstance(reply, ErrorReply) and reply.text.startswith(_TAKES_NOTHING):
            if reply.text != self._refusal:
                self._refusal = reply.text
                place = self._target.path or self._target.host
                log.warning("%s takes no parts: %s", place, reply.text)
            return StoreResult.FULL
        raise _refused(reply)

    @contextmanager
    def _connection(self, deadline: Deadline) -> Iterator[RespConnection]:
        """Lend a connection; after an error close it and every idle one."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = RespConnection(self._target, deadline)
        try:
            yield connection
        except BaseException:
            connection.close()
            self.close()
            raise
        with self._lock:
            self._idle.append(connection)


def _receive(
    connection: RespConnection, slot: LoadItem, deadline: Deadline
) -> LoadResult:
    reply = connection.receive(deadline)
    if reply is None:
        return MISSING
    if isinstance(reply, ErrorReply) and reply.text.startswith("WRONGTYPE"):
        return REJECTED
    if not isinstance(reply, BulkReply):
        raise _refused(reply)
    if reply.num_bytes != record_bytes(slot.buffers):
        connection.skip(reply.num_bytes, deadline)
        connection.end_value(deadline)
        return REJECTED
    header = memoryview(bytearray(HEADER_BYTES))
    connection.take_into([header, *slot.buffers], deadline)
    connection.end_value(deadline)
    checksum = read_header(header, slot)
    return LoadResult(LoadOutcome.DONE, checksum) if checksum else REJECTED


def _number(reply: Reply) -> int:
    if not isinstance(reply, int):
        raise _refused(reply)
    return reply


def _refused(reply: Reply) -> Unavailable:
    text = reply.text if isinstance(reply, ErrorReply) else repr(reply)
    return Unavailable(f"the server refused: {text}")


def _field(info: bytes, name: bytes) -> int | None:
    found = re.search(rb"^%b:(\d+)\r?$" % name, info, re.MULTILINE)
    return int(found[1]) if found else None
