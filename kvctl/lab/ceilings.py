"""Ceilings of a run: rates of plain copies and latency of bare round trips.

They are measured on the same machine, in the same run. Copies go between warm shared
memory in one thread, with a typical request's bytes: contiguous, and gathered from
pieces of the cache's size. Round trips use a pair of ZeroMQ sockets between two
processes, with the message sizes of a ping and of a lookup.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import zmq

from kvcore.errors import Unavailable
from kvcore.shm import Segment
from kvctl.lab.latency import time_calls

MIN_BYTES, MAX_BYTES = 1 << 16, 64 << 20
COPY_ROUNDS = 15
TRIP_ROUNDS = 500
WARM_UP_ROUNDS = 100
PING_BYTES = 128
TRIP_TIMEOUT_MS = 10_000


class Ceilings(msgspec.Struct, frozen=True):
    """Medians of copy rates and round trips. A GB is 10**9 bytes."""

    copy_bytes: int
    piece_bytes: int
    lookup_bytes: int
    copy_gb_per_s: float
    gather_gb_per_s: float
    ping_round_trip_s: float
    lookup_round_trip_s: float


def measure(copy_bytes: int, piece_bytes: int, lookup_bytes: int) -> Ceilings:
    """Return the ceilings for these sizes, bounded to 64 MiB each.

    Takes some hundreds of milliseconds.

    Raises:
        Unavailable: the echo process does not answer.
    """
    piece_bytes = max(8, piece_bytes)
    copy_bytes = min(max(copy_bytes, MIN_BYTES, piece_bytes), MAX_BYTES)
    copy_bytes -= copy_bytes % piece_bytes
    name = f"kvlab-ceiling-{os.getpid()}"
    with (
        Segment.create(f"{name}-a", copy_bytes, touch=True) as source,
        Segment.create(f"{name}-b", copy_bytes, touch=True) as target,
    ):
        copy = _copy_s(source.array, target.array)
        gather = _gather_s(source.array, target.array, piece_bytes)
    ping, lookup = _round_trips_s((PING_BYTES, max(PING_BYTES, lookup_bytes)))
    return Ceilings(
        copy_bytes=copy_bytes,
        piece_bytes=piece_bytes,
        lookup_bytes=lookup_bytes,
        copy_gb_per_s=copy_bytes / copy / 1e9,
        gather_gb_per_s=copy_bytes / gather / 1e9,
        ping_round_trip_s=ping,
        lookup_round_trip_s=lookup,
    )


Bytes = np.typing.NDArray[np.uint8]


def _copy_s(source: Bytes, target: Bytes) -> float:
    np.copyto(target, source)
    return time_calls(lambda: np.copyto(target, source), COPY_ROUNDS).p50_s


def _gather_s(source: Bytes, target: Bytes, piece_bytes: int) -> float:
    word = np.uint64 if piece_bytes % 8 == 0 else np.uint8
    pieces = source.view(word).reshape(source.nbytes // piece_bytes, -1)
    output = target.view(word).reshape(pieces.shape)
    order = np.random.default_rng(0).permutation(len(pieces))
    return time_calls(
        lambda: np.take(pieces, order, axis=0, out=output, mode="clip"), COPY_ROUNDS
    ).p50_s


def _round_trips_s(sizes: tuple[int, int]) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    control, echo_control = context.Pipe()
    process = context.Process(target=_echo, args=(echo_control,), daemon=True)
    process.start()
    echo_control.close()
    try:
        with zmq.Context() as zmq_context, zmq_context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.rcvtimeo = TRIP_TIMEOUT_MS
            dealer.connect(control.recv())
            first, second = (_trip_s(dealer, size) for size in sizes)
            return first, second
    except (zmq.Again, EOFError):
        raise Unavailable("ceilings: the echo process did not answer") from None
    finally:
        control.close()
        process.join()


def _trip_s(dealer: zmq.Socket[bytes], size: int) -> float:
    message = bytes(size)

    def trip() -> None:
        dealer.send(message)
        dealer.recv()

    time_calls(trip, WARM_UP_ROUNDS)
    return time_calls(trip, TRIP_ROUNDS).p50_s


def _echo(control: Connection) -> None:
    """Answer every message with a short one until `control` is closed."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        control.send(f"tcp://127.0.0.1:{port}")
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(control.fileno(), zmq.POLLIN)
        while control.fileno() not in (ready := dict(poller.poll())):
            if router in ready:
                peer, _ = router.recv_multipart()
                router.send_multipart((peer, bytes(PING_BYTES)))
