"""Extreme values in well-formed requests: answered, and the server still serves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kvcore.client import KVClient
from kvcore.errors import HandleError, Overloaded, RequestError
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import (
    PROTOCOL_VERSION,
    Goodbye,
    Hello,
    Ping,
    PosixShm,
    Private,
    RegisterKVCache,
    Release,
    Request,
    Status,
)
from kvcore.shm import SHM_DIR, Segment
from kvcore.wire import decode_error, decode_reply, encode_error
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK, Server, connect, wait_until
from tests.system.test_garbage import Raw, opened

GIB = 1 << 30
SEGMENT = f"kvtest-{os.getpid()}-extreme"
GROUP = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, 64), (1024, 64, 1)),))


@dataclass
class Case:
    """A request and the code of its error."""

    request: Request[Any]
    code: str = "bad_request"


def register(*handles: PosixShm | Private, group: CacheGroup = GROUP) -> Request[Any]:
    """Make a registration."""
    return RegisterKVCache("i", "e", "m", 1, 0, handles, (group,))


MANY_LAYERS = CacheGroup(
    "LNSD", "uint8", 16, (TensorView(0, 0, (2**23, 1, 16, 1), (16, 16, 1, 1)),)
)

CASES = {
    "offset plus length over 64 bits": Case(
        register(PosixShm(SEGMENT, 2**64 - 1, 2**63)), "bad_handle"
    ),
    "a segment of 2**47 bytes": Case(
        register(PosixShm("no-such-segment", 0, 2**47)), "bad_handle"
    ),
    "private memory of 2**63 - 1 bytes": Case(register(Private(2**63 - 1))),
    "negative private memory": Case(register(Private(-5))),
    "2**23 layers": Case(register(Private(GIB), group=MANY_LAYERS), "bad_layout"),
    "12,000 groups": Case(
        RegisterKVCache("i", "e", "m", 1, 0, (Private(GIB),), (GROUP,) * 12_000)
    ),
    "a release of 2**63 - 1 bytes": Case(Release(1, 2**63 - 1)),
}


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server that accepts large messages."""
    server = serve()
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def segment() -> Iterator[Segment]:
    """A segment of one page for use in handles."""
    with Segment.create(SEGMENT, 4096, touch=False) as segment:
        yield segment


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    """A client that sends requests without checks."""
    with opened(server.address) as raw:
        assert not raw.hello().code
        yield raw
        raw.call(Goodbye())


@pytest.mark.parametrize("name", CASES)
def test_an_extreme_value_is_refused(server: Server, raw: Raw, name: str) -> None:
    """The request gets an error; a ping and the status still work."""
    case = CASES[name]
    reply = raw.call(case.request)
    assert reply.code == case.code, decode_error(reply.body).message
    assert len(decode_error(reply.body).message) < 400
    assert not raw.call(Ping()).code
    assert not raw.call(Status()).code
    assert server.process.poll() is None


def test_errors_carry_integers_of_any_size() -> None:
    """An error whose details exceed 64 bits is still encoded."""
    error = RequestError("too large", claimed=2**70, id=5)
    details = decode_error(decode_reply(encode_error(1, error)).body).details
    assert details == {"claimed": str(2**70), "id": 5}


def test_a_process_name_that_is_not_utf_8_is_accepted(server: Server) -> None:
    """The name in /proc/PID/stat is bytes, and the kernel cuts it at 15."""
    name = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff\\xfe) x', 0, 0, 0);"
    with subprocess.Popen(
        [sys.executable, "-c", f"{name} print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        begun = start_time(child.pid)
        assert begun is not None
        with opened(server.address) as raw:
            hello = Hello(PROTOCOL_VERSION, child.pid, begun, pid_namespace(), "x")
            assert not raw.call(hello).code
            child.kill()
        assert server.process.poll() is None


def test_a_label_cannot_forge_log_lines(serve: Callable[..., Server]) -> None:
    """Control characters of a client's label are escaped in the log."""
    server = serve()
    forged = "x\n2026-01-01 ERROR forged \x1b[2J"
    with subprocess.Popen(["sleep", "60"]) as child, opened(server.address) as raw:
        start = start_time(child.pid) or 0
        hello = Hello(PROTOCOL_VERSION, child.pid, start, pid_namespace(), forged)
        assert not raw.call(hello).code
        child.kill()
        wait_until(lambda: "is gone" in server.log.read_text())
    server.close()
    log = server.log.read_text()
    assert "\n2026-01-01 ERROR forged" not in log
    assert "\x1b" not in log


def test_a_segment_that_shrinks_is_an_error_of_its_worker(server: Server) -> None:
    """Copies to and from it are refused; the server lives."""
    name, group = f"{SEGMENT}-shrinks", GROUP
    with (
        connect(server.address) as client,
        Segment.create(name, 1 << 16, touch=True),
    ):
        handle = PosixShm(name, 0, 1 << 16)
        client.register_kv_cache(
            RegisterKVCache("shrinks", "e", "m2", 1, 0, (handle,), (group,))
        )
        session, tokens = SessionKey("e", "shrinks"), range(CHUNK)
        blocks = [list(range(4))]
        client.store(session, "shrinks", 0, CHUNK, blocks, tokens)
        os.truncate(SHM_DIR / name, 0)
        with pytest.raises(HandleError, match="has shrunk"):
            client.retrieve(session, "shrinks", 0, CHUNK, blocks, tokens)
        with pytest.raises(HandleError, match="has shrunk"):
            client.store(session, "shrinks", 0, CHUNK, blocks, tokens)
        client.ping()


def test_the_servers_own_memory_is_no_cache(server: Server) -> None:
    """A client cannot register the server's arena as a cache."""
    with connect(server.address) as client:
        [arena] = SHM_DIR.glob(f"kvcore-{client.status().pid}-*")
        with pytest.raises(HandleError, match="the server's own memory"):
            client.register_kv_cache(
                RegisterKVCache(
                    "arena",
                    "e",
                    "m3",
                    1,
                    0,
                    (PosixShm(arena.name, 0, 1 << 16),),
                    (GROUP,),
                )
            )


def test_another_engines_layout_does_not_hinder_a_model(
    server: Server, prompt: Prompt
) -> None:
    """Each engine finds the chunks of its own layout; a squatter gains nothing."""
    odd = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, 32), (512, 32, 1)),))
    tokens, blocks = prompt(CHUNK), [list(range(4))]
    name = f"{SEGMENT}-squat"
    with (
        Segment.create(name, 1 << 16, touch=True),
        KVClient(server.address, engine_key=b"odd") as squatter,
        KVClient(squatter.address, engine_key=b"real") as engine,
        KVClient(squatter.address, engine_key=b"twin") as twin,
    ):
        for client, group in ((squatter, odd), (engine, GROUP), (twin, GROUP)):
            client.register_kv_cache(
                RegisterKVCache(
                    "i", "e", "m", 1, 0, (PosixShm(name, 0, 1 << 16),), (group,)
                )
            )
        session = SessionKey("e", "r")
        engine.store(session, "i", 0, CHUNK, blocks, tokens)
        assert squatter.lookup(session, "m", 1, tokens).num_chunks == 0
        assert engine.lookup(session, "m", 1, tokens).num_chunks == 1
        assert twin.lookup(session, "m", 1, tokens).num_chunks == 1


def test_a_client_registers_a_bounded_number_of_caches(server: Server) -> None:
    """Each may start two threads; one that is replaced does not count twice."""
    with connect(server.address) as client:
        for number in [*range(16), 0]:
            client.register_kv_cache(
                RegisterKVCache(
                    f"i{number}", "e", "m4", 1, 0, (Private(1 << 16),), (GROUP,)
                )
            )
        with pytest.raises(Overloaded, match="at most 16 and 1024"):
            client.register_kv_cache(
                RegisterKVCache(
                    "one more", "e", "m4", 1, 0, (Private(1 << 16),), (GROUP,)
                )
            )
        client.unregister_kv_cache("i0")
        client.register_kv_cache(
            RegisterKVCache("one more", "e", "m4", 1, 0, (Private(1 << 16),), (GROUP,))
        )
