"""Random requests of the right structure, beside a good client of the same server."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import inspect

from kvcore.client import KVClient
from kvcore.keys import SessionKey, pack_tokens
from kvcore.layout import CacheGroup, TensorView
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import (
    Clear,
    Goodbye,
    Hello,
    PosixShm,
    Private,
    RegisterKVCache,
)
from kvcore.shm import Segment
from kvcore.wire import REQUESTS, encode_request
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK, Server
from tests.system.test_garbage import Raw, opened

SEED = 20261125
BATCH = 12
"""Requests of one client in progress."""
MAX_GROWTH = 64 << 20

SEGMENT = f"kvtest-{os.getpid()}-fuzzer"
GROUP = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (8, 16, 64), (1024, 64, 1)),))
SIZE = 8 * 16 * 64
GOOD = SessionKey("good", "request")
VICTIM = SessionKey("good", "leased")

INTS = [0, 1, 2, 3, 4, 15, 16, 63, 64, 128, 255, -1, 2**31, 2**53, 2**63 - 1, 2**63]
INTS += [2**64 - 1]
TEXTS = [
    "",
    "i",
    "good",
    "request",
    "leased",
    "m",
    "x" * 1024,
    "x" * 1025,
    "\x00",
    "\n",
]
PACKED = [
    np.arange(4, dtype="<i4").tobytes(),
    np.array([2**31 - 1, -(2**31), -1, 0], "<i4").tobytes(),
    pack_tokens(range(4 * CHUNK)),
    b"",
    b"odd",
]

SCALARS: dict[type[inspect.Type], list[Any]] = {
    inspect.IntType: INTS,
    inspect.StrType: [*TEXTS, SEGMENT],
    inspect.BytesType: [b"", b"x" * 32, b"x" * 64, b"x" * 70_000],
    inspect.MemoryViewType: [*map(memoryview, PACKED)],
    inspect.FloatType: [0.0, -1.0, 1e308, float("inf"), float("nan")],
    inspect.BoolType: [True, False],
    inspect.NoneType: [None],
}


class RequestFuzzer:
    """Values for every field of every request, from one random generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # CLEAR may remove the good client's chunks; HELLO and GOODBYE are sent apart.
        skipped = (Clear, Hello, Goodbye)
        self.kinds = [
            kind.request for kind in REQUESTS.values() if kind.request not in skipped
        ]
        self.types = {kind: inspect.type_info(kind) for kind in self.kinds}

    def request(self) -> Any:
        """Return a request, valid or not."""
        return self.value(self.types[self.random.choice(self.kinds)])

    def value(self, kind: inspect.Type) -> Any:
        """Return a value of a type; its bounds may not hold."""
        choose = self.random.choice
        match kind:
            case inspect.Metadata(type=inner):
                return self.value(inner)
            case inspect.StructType():
                return self.struct(kind)
            case inspect.UnionType(types=types):
                return self.value(choose(types))
            case inspect.LiteralType(values=values):
                return choose(values)
            case inspect.VarTupleType(item_type=item):
                return tuple(self.value(item) for _ in range(choose([0, 1, 1, 2, 5])))
            case inspect.TupleType(item_types=items):
                return tuple(map(self.value, items))
        return choose(SCALARS[type(kind)])

    def struct(self, kind: inspect.StructType) -> Any:
        """Return a Struct of a type; fields with a default may be left out."""
        known = {SessionKey: [GOOD, VICTIM], CacheGroup: [GROUP]}.get(kind.cls)
        if known and self.random.random() < 0.7:
            return self.random.choice(known)
        fields = {
            field.name: self.value(field.type)
            for field in kind.fields
            if field.required or self.random.random() < 0.5
        }
        return kind.cls(**fields)


class GoodEngine:
    """A client whose chunk must be found, with its bytes, at any time."""

    def __init__(self, client: KVClient, tokens: list[int], memory: Any) -> None:
        self.client, self.tokens, self.memory = client, tokens, memory
        handle = PosixShm(f"{SEGMENT}-good", 0, SIZE)
        client.register_kv_cache(
            RegisterKVCache("good", "good", "m", 1, 0, (handle,), (GROUP,))
        )
        self.kv = np.random.default_rng(1).integers(0, 256, SIZE // 2, dtype=np.uint8)
        memory[: SIZE // 2] = self.kv
        client.store(GOOD, "good", 0, CHUNK, [range(4)], tokens)
        assert client.lookup(VICTIM, "m", 1, tokens).num_chunks == 1

    def check(self) -> None:
        """Retrieve the chunk into other blocks and compare."""
        self.memory[SIZE // 2 :] = 0
        assert self.client.lookup(GOOD, "m", 1, self.tokens).num_chunks == 1
        self.client.retrieve(GOOD, "good", 0, CHUNK, [range(4, 8)], self.tokens)
        assert np.array_equal(self.memory[SIZE // 2 :], self.kv)


def hello(raw: Raw, key: bytes) -> None:
    """Say hello with a key, and register two caches of the good client's model."""
    pid = os.getpid()
    message = Hello(1, pid, start_time(pid) or 0, pid_namespace(), "fuzzer", key)
    reply = raw.call(message, 1)
    assert not reply.code
    raw.boot = msgspec.msgpack.decode(reply.body)["boot"]
    for name, handle in (("i", PosixShm(SEGMENT, 0, SIZE)), ("m", Private(SIZE))):
        registration = RegisterKVCache(name, name, "m", 1, 0, (handle,), (GROUP,))
        assert not raw.call(registration, 1).code


def anonymous_bytes(pid: int) -> int:
    """Return a process's anonymous memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(pid)


@pytest.mark.parametrize(
    "num_frames",
    [
        5_000,
        pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)
def test_random_requests(
    serve: Callable[..., Server], prompt: Prompt, num_frames: int
) -> None:
    """Each is answered once; a good client's bytes stay right; nothing grows."""
    server = serve(
        "--set", "sessions.max_sessions=1000", "--set", "l1.engine_share=0.4"
    )
    fuzzer = RequestFuzzer(SEED)
    sent: list[bytes] = []
    codes: Counter[str] = Counter()
    with (
        Segment.create(SEGMENT, SIZE, touch=True),
        Segment.create(f"{SEGMENT}-good", SIZE, touch=True) as memory,
        KVClient(server.address, engine_key=b"good", timeout_s=20) as client,
        opened(server.address) as raw,
    ):
        good = GoodEngine(client, list(prompt(CHUNK)), memory.array)
        before = anonymous_bytes(server.pid)
        for number in range(0, num_frames, BATCH):
            if number % (100 * BATCH) == 0:
                raw.call(Goodbye(), 1)
                hello(raw, fuzzer.random.randbytes(8))
                good.check()
            for request_id in range(2, BATCH + 2):
                if sent and fuzzer.random.random() < 0.1:
                    # A replay: its id and its token are an earlier request's.
                    frame = fuzzer.random.choice(sent)
                else:
                    frame = encode(fuzzer, request_id, raw.boot)
                    sent = [*sent[-50:], frame]
                raw.send(frame)
            codes.update(raw.receive().code for _ in range(BATCH))
        assert raw.socket.poll(50) == 0, "a request was answered twice"
        good.check()
        assert anonymous_bytes(server.pid) - before < MAX_GROWTH
        assert client.status().num_sessions <= 1000
    assert "internal" not in codes
    assert codes[""] > num_frames // 50
    assert server.stop() == 0


def encode(fuzzer: RequestFuzzer, request_id: int, boot: Any) -> bytes:
    """Return the frame of a random request that can be encoded."""
    while True:
        try:
            return encode_request(fuzzer.request(), request_id, boot, 0)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
            continue  # A Struct checks some values itself.
