"""Malformed frames from raw sockets: answered or dropped; the server serves on."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq

from kvcore.client import KVClient
from kvcore.errors import TooLarge
from kvcore.keys import SessionKey, pack_tokens
from kvcore.layout import CacheGroup, TensorView
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import (
    NO_BOOT,
    PROTOCOL_VERSION,
    BootToken,
    Hello,
    HelloReply,
    Lookup,
    Ping,
    PosixShm,
    RegisterKVCache,
    Request,
    Status,
    Store,
)
from kvcore.shm import Segment
from kvcore.wire import (
    REQUESTS,
    ReplyEnvelope,
    decode_error,
    decode_reply,
    encode_request,
)
from tests.system.server_fixture import CHUNK, Server, wait_until

MAX_MESSAGE = 64 << 10
MAX_REQUESTS = 16

pack = msgspec.msgpack.encode


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server with low limits and short slices."""
    server = serve(
        *("--set", f"wire.max_message={MAX_MESSAGE}"),
        *("--set", f"wire.max_requests_per_client={MAX_REQUESTS}"),
        *("--set", "wire.slice_chunks=1"),
    )
    yield server
    server.close()


class Raw:
    """A socket that sends any frames."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 4)
        self.socket.connect(address)
        self.boot = NO_BOOT

    def send(self, *frames: bytes) -> None:
        """Send one message."""
        self.socket.send_multipart(frames)

    def receive(self) -> ReplyEnvelope:
        """Wait for a reply."""
        assert self.socket.poll(20_000), "no answer"
        frames = self.socket.recv_multipart()
        assert len(frames) == 1
        return decode_reply(frames[0])

    def call(self, request: Request[Any], request_id: int = 1) -> ReplyEnvelope:
        """Send a well-formed request."""
        self.send(encode_request(request, request_id, self.boot, 0))
        return self.receive()

    def hello(self, **changes: int) -> ReplyEnvelope:
        """Send HELLO; after an error the boot token is unchanged."""
        pid = os.getpid()
        start, namespace = start_time(pid) or 0, pid_namespace()
        hello = Hello(PROTOCOL_VERSION, pid, start, namespace, "raw")
        reply = self.call(msgspec.structs.replace(hello, **changes))
        if not reply.code:
            self.boot = msgspec.msgpack.decode(reply.body, type=HelloReply).boot
        return reply


@contextmanager
def opened(address: str) -> Iterator[Raw]:
    """A raw socket."""
    raw = Raw(address)
    try:
        yield raw
    finally:
        raw.socket.close()


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    """A raw socket at the module's server."""
    with opened(server.address) as raw:
        yield raw


PING = REQUESTS["PING"].fingerprint
LOOKUP = REQUESTS["LOOKUP"].fingerprint

FRAMES: dict[str, tuple[tuple[bytes, ...], str, int]] = {
    "empty": ((b"",), "bad_request", 0),
    "two frames": ((b"a", b"b"), "bad_request", 0),
    "a REQ's empty delimiter": ((b"", pack([1, "PING"])), "bad_request", 0),
    "many frames": ((b"x",) * 100, "bad_request", 0),
    "text": ((b"GET / HTTP/1.1\r\n\r\n",), "bad_request", 0),
    "random": ((random.Random(1).randbytes(500),), "bad_request", 0),
    "a number": ((pack(5),), "bad_request", 0),
    "a map": ((pack({"id": 5}),), "bad_request", 0),
    "nothing in it": ((pack([]),), "bad_request", 0),
    "deep": ((b"\x91" * 30_000,), "bad_request", 0),
    "a map of maps": ((b"\x81\xa1a" * 20_000,), "bad_request", 0),
    "cut short": ((pack([6, "PING", PING, 0, 0, {}])[:-3],), "bad_request", 0),
    "too few fields": ((pack([7, "PING"]),), "bad_request", 7),
    "an id that is text": ((pack(["7", "PING", PING, 0, 0, {}]),), "bad_request", 0),
    "name not text": ((pack([8, 8, PING, 0, 0, {}]),), "bad_request", 8),
    "not UTF-8": ((b"\x96\x09\xa2\xff\xfe\xa0\x00\x00\x80",), "bad_request", 9),
    "deadline not a number": ((pack([3, "PING", PING, 0, "", {}]),), "bad_request", 3),
    "unknown": ((pack([10, "NO_SUCH", "", 0, 0, {}]),), "unknown_request", 10),
    "a long name": ((pack([11, "N" * 9999, "", 0, 0, {}]),), "unknown_request", 11),
    "fingerprint": ((pack([12, "PING", "beef", 0, 0, {}]),), "request_mismatch", 12),
    "body not a map": ((pack([13, "PING", PING, 0, 0, 5]),), "bad_request", 13),
    "a field's type": (
        (pack([14, "LOOKUP", LOOKUP, 0, 0, {"session": 5}]),),
        "bad_request",
        14,
    ),
    "largest id": ((pack([2**64 - 1, "NO", "", 0, 0, {}]),), "unknown_request", -1),
    "negative id": ((pack([-5, "NO", "", 0, 0, {}]),), "unknown_request", -5),
    "before hello": ((pack([15, "PING", PING, 0, 0, {}]),), "stale_boot", 15),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_what_is_no_request_is_answered(raw: Raw, client: KVClient, kind: str) -> None:
    """The error has a code, and the request's id if it could be decoded."""
    frames, code, request_id = FRAMES[kind]
    raw.send(*frames)
    reply = raw.receive()
    assert reply.code == code
    assert reply.id == (2**64 - 1 if request_id == -1 else request_id)
    assert decode_error(reply.body).message
    client.ping()


def test_random_bytes_do_not_end_it(raw: Raw, client: KVClient) -> None:
    """Each changed request gets one answer."""
    raw.hello()
    rng = random.Random(2)
    request = Lookup(
        SessionKey("e", "r"), "unknown", 1, 64, memoryview(pack_tokens(range(64)))
    )
    good = encode_request(request, 1, raw.boot, 0)
    for _ in range(500):
        frame = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        raw.send(bytes(frame))
        assert raw.receive().code
    client.ping()


def test_a_request_of_another_run_is_stale(raw: Raw) -> None:
    """Its boot token is not this run's."""
    raw.hello()
    good = raw.boot
    raw.boot = BootToken(good ^ 1)
    assert raw.call(Ping(), 77).code == "stale_boot"
    raw.boot = good
    assert raw.call(Ping(), 78).code == ""


@pytest.mark.parametrize("pid", [0, -1, 1 << 22, 1 << 31, 1 << 40, (1 << 64) - 1])
def test_a_pid_that_cannot_be_is_not_watched(
    raw: Raw, client: KVClient, pid: int
) -> None:
    """Such a client is watched by heartbeats; the server continues."""
    hello = msgspec.msgpack.decode(raw.hello(pid=pid).body, type=HelloReply)
    assert not hello.watched
    assert raw.call(Ping()).code == ""
    client.ping()


def test_another_protocol_version_is_refused(
    server: Server, raw: Raw, client: KVClient
) -> None:
    """The error names both; the client is dropped, even if it was known before."""
    before = client.status().num_clients
    raw.hello()
    assert client.status().num_clients == before + 1
    with opened(server.address) as other:
        reply = other.hello(protocol_version=99)
        assert reply.code == "bad_request"
        assert "99" in decode_error(reply.body).message
        assert other.call(Ping()).code == "stale_boot"
    assert client.status().num_clients == before + 1


@pytest.fixture
def registered(client: KVClient) -> Iterator[str]:
    """The instance "i" of model "m", of the client's."""
    group = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, 8), (128, 8, 1)),))
    name = f"kvtest-{os.getpid()}-garbage"
    with Segment.create(name, 512, touch=True):
        handles = (PosixShm(name, 0, 512),)
        client.register_kv_cache(
            RegisterKVCache("i", "e", "m", 1, 0, handles, (group,))
        )
        yield "i"
        client.unregister_kv_cache("i")


def test_fields_that_cannot_be_are_refused(
    registered: str, raw: Raw, client: KVClient
) -> None:
    """Numbers out of range, invalid block ids, another client's instance."""
    raw.hello()
    key, none = SessionKey("e", "r"), memoryview(b"")
    for request, code in (
        (Store(key, registered, 0, 64, (none,)), "unknown_instance"),
        (Lookup(key, "m", 1, 2**63, none), "tokens_needed"),
        (Lookup(key, "m", 1, 0, none, 2**63), ""),
        (Lookup(key, "m", 1, 64, memoryview(bytes(4)), 2**63), "tokens_needed"),
        (Lookup(key, "m", 2**63, 64, none), "bad_request"),
        (Lookup(key, "m", 4096, 64, none), "unknown_model"),
        (Lookup(key, "m" * 2000, 1, 64, none), "bad_request"),
        (Status(2**63), ""),
    ):
        assert raw.call(request).code == code, request
    for store, code in (
        (Store(key, registered, 0, 2**63, (none,)), "bad_request"),
        (Store(key, registered, 2**63, 2**63, (none,)), ""),
        (Store(key, registered, 0, 64, (memoryview(b"abc"),)), "bad_request"),
        (Store(key, registered, 0, 64, ()), "bad_request"),
    ):
        found = client.submit(store).exception(20)
        assert getattr(found, "code", "") == code, store
    client.end_session(key)


def test_a_message_that_is_too_long(
    registered: str, server: Server, client: KVClient
) -> None:
    """The client refuses to send it; a sender that does is disconnected."""
    with pytest.raises(TooLarge, match=f"at most {MAX_MESSAGE}"):
        client.lookup(SessionKey("e", "r"), "m", 1, list(range(MAX_MESSAGE // 4)))
    with opened(server.address) as raw:
        monitor = raw.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        raw.hello()
        raw.send(bytes(MAX_MESSAGE + 1))
        assert monitor.poll(20_000), "the server reads on"
        raw.socket.disable_monitor()
        monitor.close()
        client.ping()
        raw.boot = NO_BOOT
        assert raw.hello().code == ""


def test_too_many_requests_at_once_are_overloaded(
    registered: str, server: Server, raw: Raw, client: KVClient
) -> None:
    """Those beyond the limit of pending requests fail; the others are served."""
    raw.hello()
    packed = memoryview(pack_tokens(range(200 * CHUNK)))
    num_requests = 2 * MAX_REQUESTS  # As many replies as the server keeps for a client.
    for n in range(1, num_requests + 1):
        key = SessionKey("e", f"r{n}")
        request = Lookup(key, "m", 1, 200 * CHUNK, packed)
        raw.send(encode_request(request, n, raw.boot, 0))
    codes = {
        reply.id: reply.code for reply in (raw.receive() for _ in range(num_requests))
    }
    assert set(codes) == set(range(1, num_requests + 1))
    assert [codes[n] for n in range(1, MAX_REQUESTS + 1)] == [""] * MAX_REQUESTS
    assert "overloaded" in codes.values()
    assert set(codes.values()) == {"", "overloaded"}
    assert raw.call(Ping()).code == ""
    for n in range(1, num_requests + 1):
        client.end_session(SessionKey("e", f"r{n}"))


def test_a_client_that_never_reads_does_not_block_others(
    raw: Raw, client: KVClient
) -> None:
    """Its replies are lost once its queues are full; others are answered."""
    raw.hello()
    before = client.status().counters["replies_lost"]
    request = encode_request(Status(), 1, raw.boot, 0)

    def is_full() -> bool:
        for _ in range(500):
            raw.send(request)
        return client.status().counters["replies_lost"] > before

    wait_until(is_full)
    client.ping()


def test_a_burst_of_requests_waits_for_room(
    registered: str, server: Server, client: KVClient
) -> None:
    """The client sends as many as the server accepts; none is refused."""
    tokens = range(2 * CHUNK)
    num_requests = 4 * MAX_REQUESTS
    futures = [
        client.submit_lookup(SessionKey("burst", str(n)), "m", 1, tokens)
        for n in range(num_requests)
    ]
    assert [future.result(20).num_chunks for future in futures] == [0] * num_requests
    for n in range(num_requests):
        client.submit_end_session(SessionKey("burst", str(n)))
    client.ping()
