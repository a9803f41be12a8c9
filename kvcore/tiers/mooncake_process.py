"""Process of a Mooncake Store client, and its requests.

A separate process, because a call of that client can neither be bounded (30 s without
a master) nor cancelled: at a deadline the process is killed, and with it any write to
L1. It maps and registers the arena once, so that bytes go directly between the network
and L1's pages.

Run as `python -m kvcore.tiers.mooncake_process`, with the descriptors of its channels
as arguments and a `Setup` in its environment; it ends when one of them is closed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from enum import IntEnum
from multiprocessing.connection import Connection

import msgspec

from kvcore.errors import KVError
from kvcore.shm import Segment

SETUP = "KVCORE_MOONCAKE"
"""Environment variable with the `Setup`, as JSON."""


class Setup(msgspec.Struct, frozen=True):
    """Arguments of the client, and the segments mapped for its lifetime."""

    master: str
    local: str
    metadata: str
    protocol: str
    device: str
    segment_bytes: int
    """Memory that this process adds to the store."""
    mapped: tuple[SegmentName, ...] = ()


class SegmentName(msgspec.Struct, frozen=True):
    """Shared memory to map from its start."""

    name: str
    num_bytes: int


Slices = tuple[tuple[int, int, int], ...]
"""Bytes of a record in order: index in `Setup.mapped`, offset and length of each."""


class MooncakeRequest(msgspec.Struct, frozen=True):
    """One call of the client about some keys; the reply is a number for each."""

    call: str
    keys: tuple[str, ...]
    slices: tuple[Slices, ...] = ()
    """Of each key."""


class Code(IntEnum):
    """Error codes of the client, from its `types.h`."""

    NO_ROOM = -200
    BUFFER_TOO_SMALL = -600
    NOT_FOUND = -704
    TRANSFER_FAILED = -800
    RPC_FAILED = -900
    RPC_TIMEOUT = -901
    NOT_STARTED = -10_000
    """Not Mooncake's: the client could not be set up."""


class _Service:
    """The client, used by one thread per channel."""

    def __init__(self, setup: Setup) -> None:
        from mooncake.store import MooncakeDistributedStore

        self._client = MooncakeDistributedStore()
        self.started = not self._client.setup(
            setup.local,
            setup.metadata,
            setup.segment_bytes,
            16 << 20,  # Its buffer for calls that are not made here.
            setup.protocol,
            setup.device,
            setup.master,
        )
        names = setup.mapped if self.started else ()
        self._mapped = [self._map(name) for name in names]
        self._calls: dict[str, Callable[[MooncakeRequest], list[int]]] = {
            "exists": lambda request: self._client.batch_is_exist(request.keys),
            "size": lambda request: [self._client.get_size(k) for k in request.keys],
            "remove": lambda request: self._client.batch_remove(request.keys, True),
            "get": self._move(self._client.batch_get_into_multi_buffers),
            "put": self._move(self._client.batch_put_from_multi_buffers),
        }

    def answer(self, request: MooncakeRequest) -> list[int]:
        """Process one request; return one number per key."""
        if not self.started:
            return [Code.NOT_STARTED] * len(request.keys)
        return list(self._calls[request.call](request))

    def _map(self, name: SegmentName) -> Segment:
        segment = Segment.attach(name.name, offset=0, length=name.num_bytes)
        self._client.register_buffer(_address(segment), name.num_bytes)
        return segment

    def _move(
        self, call: Callable[..., list[int]]
    ) -> Callable[[MooncakeRequest], list[int]]:
        bases = [_address(segment) for segment in self._mapped]

        def move(request: MooncakeRequest) -> list[int]:
            return call(
                list(request.keys),
                [[bases[s] + at for s, at, _ in record] for record in request.slices],
                [[length for _, _, length in record] for record in request.slices],
            )

        return move


def _address(segment: Segment) -> int:
    address: int = segment.array.__array_interface__["data"][0]
    return address


def _serve(channel: Connection, service: _Service) -> None:
    decoder = msgspec.msgpack.Decoder(MooncakeRequest)
    try:
        while True:
            request = decoder.decode(channel.recv_bytes())
            channel.send_bytes(msgspec.msgpack.encode(service.answer(request)))
    except (EOFError, OSError, KVError):
        pass
    finally:
        os._exit(0)  # The client's threads may hang: no orderly end is possible.


def main() -> None:
    """Serve the channels until one of them closes."""
    service = _Service(msgspec.json.decode(os.environ[SETUP], type=Setup))
    channels = [Connection(int(fd)) for fd in sys.argv[1:]]
    threads = [threading.Thread(target=_serve, args=(c, service)) for c in channels]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
