"""Requests of the right structure and hostile values, through a whole server's loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from msgspec import inspect

from kvcore.config import L1Config, ServerConfig, WireConfig
from kvcore.errors import ERRORS
from kvcore.keys import ExtraKey, SessionKey, pack_tokens
from kvcore.layout import CacheGroup, TensorView
from kvcore.option_structs import ByteSize
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import (
    NO_BOOT,
    PROTOCOL_VERSION,
    Abort,
    CBLookupPreComputed,
    CBMatch,
    CBRange,
    CBRegisterKVCache,
    CBRetrievePreComputed,
    CBStoreFinal,
    CBStorePreComputed,
    Commit,
    EndSession,
    FreeLookupLocks,
    Hello,
    Hold,
    Lookup,
    Ping,
    PosixShm,
    Private,
    RegisterKVCache,
    Release,
    Request,
    Reserve,
    Retrieve,
    Status,
    Store,
    Why,
)
from kvcore.server.application import Application
from kvcore.shm import Segment
from kvcore.wire import (
    REQUESTS,
    ReplyEnvelope,
    RequestType,
    decode_error,
    decode_reply,
    encode_request,
    wire_name,
)
from tests.server.test_loop import ScriptedSocket

CHUNK = 64
GROUP = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (8, 16, 8), (128, 8, 1)),))
NUM_BYTES = 8 * 16 * 8
BLOCKS = (memoryview(np.arange(4, dtype="<i4").tobytes()),)

INTS = [0, 1, 2, 63, 64, 65, 128, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [
    "",
    "i",
    "p",
    "theirs",
    "e",
    "r",
    "m",
    "\x00",
    "a\nb\x1b[31m",
    "../x",
    "x" * 2**20,
]
PACKED = [
    np.array(ids, "<i4").tobytes()
    for ids in ([], [0, 1, 2, 3], [0, 0, 0, 0], [-1], [8], [2**31 - 1], [-(2**31)] * 4)
]
PACKED += [b"abc", pack_tokens(range(CHUNK)), pack_tokens(range(3 * CHUNK))]


def hostile(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Return a strategy for values of a type, valid and invalid."""
    if isinstance(kind, inspect.Metadata):
        return hostile(kind.type)
    if isinstance(kind, inspect.StructType):
        fields = {field.name: hostile(field.type) for field in kind.fields}
        return st.builds(kind.cls, **fields)
    if isinstance(kind, inspect.UnionType):
        return st.one_of(*map(hostile, kind.types))
    if isinstance(kind, inspect.LiteralType):
        return st.sampled_from(kind.values)
    if isinstance(kind, inspect.VarTupleType):
        return st.lists(hostile(kind.item_type), max_size=3).map(tuple)
    if isinstance(kind, inspect.FloatType):
        return st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e308, 1e4])
    return {
        inspect.IntType: st.sampled_from(INTS),
        inspect.StrType: st.sampled_from(TEXTS),
        inspect.BytesType: st.sampled_from([b"", b"x", b"x" * 64, b"x" * 2**20]),
        inspect.MemoryViewType: st.sampled_from(PACKED).map(memoryview),
        inspect.BoolType: st.booleans(),
        inspect.NoneType: st.none(),
    }[type(kind)]


class Whole:
    """A server whose loop gets messages by calls, without a running thread."""

    def __init__(self, folder: Path, engine: str) -> None:
        config = ServerConfig(
            address=f"ipc://{folder}/socket",
            chunk_size=CHUNK,
            engine=engine,  # type: ignore[arg-type]
            l1=L1Config(size=ByteSize(1 << 20), page=ByteSize(4096)),
            wire=WireConfig(max_message=ByteSize(8 << 20)),
        )
        self.server = Application(config)
        self.loop = self.server.loop
        self.socket = ScriptedSocket()
        self.loop._socket = self.socket  # type: ignore[assignment]
        self.loop._handlers = self.server._handlers()
        self.loop._on_gone = self.server._client_gone
        self.segment = Segment.create(
            f"kvtest-{os.getpid()}-hostile", NUM_BYTES, touch=True
        )
        self.number = 0
        self.boot = NO_BOOT
        for identity in (b"ours", b"theirs"):
            self.greet(identity)
        shared = (PosixShm(self.segment.name, 0, NUM_BYTES),)
        for identity, name, handles in (
            (b"ours", "i", shared),
            (b"ours", "p", (Private(NUM_BYTES),)),
            (b"theirs", "theirs", shared),
        ):
            request = RegisterKVCache(name, "e", "m", 1, 0, handles, (GROUP,))
            assert not self.ask(request, identity).code

    def greet(self, identity: bytes) -> None:
        """Send HELLO."""
        pid = os.getpid()
        hello = Hello(PROTOCOL_VERSION, pid, start_time(pid) or 0, pid_namespace())
        assert not self.ask(hello, identity).code
        self.boot = self.server.boot

    def ask(self, request: Request[Any], identity: bytes = b"ours") -> Any:
        """Serve a request to its end; it gets exactly one reply."""
        self.number += 1
        frame = encode_request(request, self.number, self.boot, 0)
        return self.send(identity, frame)

    def ask_raw(self, name: str, body: Any) -> Any:
        """Serve a request with any body."""
        self.number += 1
        envelope = (self.number, name, REQUESTS[name].fingerprint, self.boot, 0, body)
        return self.send(b"ours", msgspec.msgpack.encode(envelope))

    def send(self, identity: bytes, frame: bytes) -> Any:
        """Serve a frame to its end."""
        self.socket.add(identity, frame)
        self.loop._receive()
        while not self.socket.sent:
            self.loop._step()
            if not self.loop._sliced and not self.socket.sent:
                self.loop._epoll.poll(20)
                self.loop._handle_events()
        assert len(self.socket.sent) == 2
        reply = decode_reply(self.socket.sent.pop())
        assert self.socket.sent.pop() == identity
        assert reply.id == self.number
        return reply

    def close(self) -> None:
        """Close the server."""
        self.server.close()
        self.segment.unlink()
        self.segment.close()


@pytest.fixture(scope="module", params=["prefix", "blend"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Whole]:
    """One server per `engine` option."""
    whole = Whole(tmp_path_factory.mktemp("hostile"), request.param)
    yield whole
    whole.close()


@pytest.mark.parametrize("kind", REQUESTS.values(), ids=lambda kind: kind.name)
@settings(suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_hostile_values(whole: Whole, kind: RequestType, data: st.DataObject) -> None:
    """The reply is a result or a short error, never "internal"; the server goes on."""
    whole.greet(b"ours")
    request = data.draw(hostile(inspect.type_info(kind.request)))
    reply = whole.ask(request)
    check(whole, reply)


def check(whole: Whole, reply: ReplyEnvelope) -> None:
    """Check a reply, and that the server still answers."""
    if reply.code:
        error = decode_error(reply.body)
        assert reply.code in ERRORS
        assert reply.code != "internal", error.message
        assert error.message.isprintable(), error.message[:200]
        assert 0 < len(error.message) < 10_000, error.message[:200]
    assert not whole.ask(Ping(), b"theirs").code
    whole.server.engine.l1.check()
    store = Store(SessionKey("e", "good"), "theirs", 0, CHUNK, BLOCKS, TOKENS)
    assert not whole.ask(store, b"theirs").code
    read = Retrieve(SessionKey("e", "good"), "theirs", 0, CHUNK, BLOCKS)
    assert not whole.ask(read, b"theirs").code


KEY = SessionKey("e", "r")
TOKENS = memoryview(pack_tokens(range(3 * CHUNK)))
STORE = Store(KEY, "i", 0, CHUNK, BLOCKS, TOKENS)
RETRIEVE = Retrieve(KEY, "i", 0, CHUNK, BLOCKS, 3, TOKENS)
BUFFER = (2, 1, 8, 64)
GOOD: list[Request[Any]] = [
    STORE,
    RETRIEVE,
    Reserve(msgspec.structs.replace(STORE, instance_id="p")),
    Hold(msgspec.structs.replace(RETRIEVE, instance_id="p")),
    Lookup(KEY, "m", 1, 2 * CHUNK, TOKENS, 0, (ExtraKey(0, b"x"),)),
    RegisterKVCache("q", "e", "m", 1, 0, (Private(NUM_BYTES),), (GROUP,)),
    FreeLookupLocks(KEY, 0, CHUNK),
    EndSession(KEY),
    Status(3),
    Why("e/r"),
    Hello(PROTOCOL_VERSION, os.getpid(), start_time(os.getpid()) or 0, 0),
    CBRegisterKVCache("b", "e", "m", 1, 0, Private(1024), BUFFER, "uint8"),
    CBStorePreComputed("i", 0, TOKENS, (ExtraKey(0, b"x"),)),
    CBLookupPreComputed(KEY, "m", 1, TOKENS),
    CBRetrievePreComputed(
        KEY, "i", 0, (CBRange(0, CHUNK),), (CBMatch(0, 0, b"x" * 32),), False, TOKENS
    ),
    CBStoreFinal(KEY, "i", 0, 0, CHUNK, TOKENS),
]


def paths(body: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a body."""
    items: Any = ()
    if isinstance(body, dict):
        items = body.items()
    elif isinstance(body, list):
        items = enumerate(body)
    for key, value in items:
        yield (key,)
        for rest in paths(value):
            yield (key, *rest)


values = st.one_of(
    st.sampled_from(INTS),
    st.sampled_from(INTS),
    st.sampled_from(TEXTS),
    st.sampled_from(PACKED),
    st.sampled_from([None, [], {}, 0.5, float("nan"), True, [[]] * 3, b"x" * 2**20]),
)


@pytest.mark.parametrize("good", GOOD, ids=lambda good: type(good).__name__)
@settings(suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_one_hostile_value(
    whole: Whole, good: Request[Any], data: st.DataObject
) -> None:
    """One invalid value in a valid request is refused; earlier state stays."""
    whole.greet(b"ours")
    body = msgspec.to_builtins(good, builtin_types=(bytes, memoryview))
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from([*paths(body)]))
        inside = body
        for step in way:
            inside = inside[step]
        inside[last] = deepcopy(data.draw(values))
    reply = whole.ask_raw(wire_name(type(good)), body)
    if not reply.code and isinstance(good, Reserve | Hold):
        ticket = msgspec.msgpack.decode(reply.body)["ticket"]
        end = Abort if isinstance(good, Reserve) else Release
        if ticket is not None:
            assert whole.ask(Commit(ticket ^ 1)).code == "unknown_ticket"
            assert not whole.ask(end(ticket)).code
    check(whole, reply)
    stats = whole.server.engine.l1.stats()
    assert stats.num_reserved == 0


LONG = "x\x1b" * 500


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Lookup(KEY, "m", 4096, CHUNK, TOKENS), "unknown_model"),
        (Lookup(SessionKey(LONG, LONG), "m2", 1, CHUNK, TOKENS), "bad_request"),
        (Lookup(SessionKey("e", 2 * LONG), "m", 1, CHUNK, TOKENS), "bad_request"),
        (
            RegisterKVCache(
                "q", "e", "m", 1, 0, (Private(NUM_BYTES),),
                (msgspec.structs.replace(GROUP, dtype=LONG),),
            ),
            "bad_request",
        ),
    ],
    ids=["ranks", "another model's session", "session", "dtype"],
)  # fmt: skip
def test_an_error_is_short(whole: Whole, request_: Request[Any], code: str) -> None:
    """Error messages stay short, however long the invalid value is."""
    handles = (Private(NUM_BYTES),)
    for rank, world_size, model in ((0, 1, "m2"), (1, 4096, "m")):
        name = f"{model}-{world_size}"
        request = RegisterKVCache(name, "e", model, world_size, rank, handles, (GROUP,))
        assert not whole.ask(request).code
    whole.ask(Lookup(SessionKey(LONG, LONG), "m", 1, CHUNK, TOKENS))
    reply = whole.ask(request_)
    assert reply.code == code
    check(whole, reply)
