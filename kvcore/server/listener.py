"""The server's ROUTER socket: binding, limits, and the error if it is taken."""

from __future__ import annotations

import socket as sockets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zmq

from kvcore.config import WireConfig
from kvcore.errors import SetupError


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket and the address that clients connect to."""

    socket: zmq.Socket[bytes]
    address: str


@contextmanager
def bind(address: str, wire: WireConfig) -> Iterator[Listener]:
    """Bind a ROUTER socket; close it and its context at the end.

    Raises:
        SetupError: another server has that address, a file that is no socket is at its
            path, or it cannot be bound.
    """
    if address.startswith("ipc://"):
        _check_path(address)
    context = zmq.Context(io_threads=1)
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A client that reconnects keeps its identity.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.max_message)
    socket.setsockopt(zmq.SNDHWM, 2 * wire.max_requests_per_client)
    socket.setsockopt(zmq.RCVHWM, 2 * wire.max_requests_per_client)
    try:
        bound = _bind(socket, address)
        try:
            yield Listener(socket, bound)
        finally:
            _remove_file(bound)
    finally:
        socket.close()
        context.term()


def _bind(socket: zmq.Socket[bytes], address: str) -> str:
    head, colon, port = address.rpartition(":")
    try:
        socket.bind(f"{head}:*" if colon and port == "0" else address)
    except zmq.ZMQError as error:
        raise SetupError(f"cannot serve at {address}: {error.strerror}") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def _remove_file(address: str) -> None:
    """Remove the file of a Unix socket, which ZeroMQ leaves behind."""
    if address.startswith("ipc://"):
        Path(address.removeprefix("ipc://")).unlink(missing_ok=True)


def _check_path(address: str) -> None:
    """Check that ZeroMQ may remove what is at the path of a Unix socket.

    Raises:
        SetupError: a server listens there, or it is not a socket.
    """
    path = Path(address.removeprefix("ipc://"))
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # No such file, or bind says what is wrong.
    if not stat.S_ISSOCK(mode):
        raise SetupError(
            f"cannot serve at {address}: {path} exists and is not a socket; "
            "remove it or choose another path"
        )
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise SetupError(f"cannot serve at {address}: Address already in use")
