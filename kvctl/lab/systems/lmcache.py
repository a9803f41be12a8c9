"""LMCache's multi-process server, data over shared memory; an optional peer.

Its client runs in a process of its own, in the Python that LMCache is installed in
(`lmcache_peer.py`), beside each scheduler and each rank.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvcore.client.client import BlockLists
from kvcore.config import ServerConfig
from kvcore.errors import ChunksMissing, KVError, SetupError, Unavailable
from kvcore.keys import SessionKey, Tokens, pack_tokens
from kvcore.protocol import (
    LookupReply,
    RegisterKVCache,
    RegisterReply,
    RetrieveReply,
    StoreReply,
)
from kvctl.lab.systems.external_server import free_port
from kvctl.lab.systems.system_interface import (
    ExternalClient,
    StartedSystem,
    SystemSpec,
    shared,
)

PEER = Path(__file__).with_name("lmcache_peer.py")
AXES = "KNSHD"
"""Of each layer's tensor: what its shared-memory path takes."""
QUIET = {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false"}
END_S = 10.0
START_S = 60.0
"""For a Python with torch in it to start, beside others that do."""


def start(spec: SystemSpec, config: ServerConfig, folder: Path) -> StartedSystem:
    """Say how its server is started: memory touched before, engines copy themselves."""
    del folder
    port, program = free_port(), Path(_python(spec)).with_name("lmcache")
    if not program.exists():
        raise SetupError(f"--system-python {spec.python}: no lmcache beside it")
    command = (
        str(program), "server",
        "--l1-size-gb", str(config.l1.size / (1 << 30)),
        "--chunk-size", str(config.chunk_size),
        "--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven",
        "--shm-name", f"kvlab-{os.getpid()}-{secrets.token_hex(3)}",
        "--no-l1-use-lazy", "--null-block-id", "-1",
        "--host", "127.0.0.1", "--port", str(port), "--http-port", str(free_port()),
    )  # fmt: skip
    address = f"tcp://127.0.0.1:{port}"
    return StartedSystem(command, address, QUIET, is_ready=address)


def _python(spec: SystemSpec) -> str:
    if spec.python is None:
        raise SetupError(
            "--system lmcache: give --system-python, where it is installed"
        )
    return spec.python


def connect(
    spec: SystemSpec, address: str, config: ServerConfig, timeout_s: float
) -> ExternalClient:
    """Start a peer process and let it connect."""
    del config
    return LMCacheClient(_python(spec), address, timeout_s)


class LMCacheClient(ExternalClient):
    """A scheduler's or a rank's client; any thread may use it."""

    def __init__(self, python: str, address: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._took = threading.local()
        self._sending = threading.Lock()
        self._waiting: dict[int, Future[tuple[Any, float]]] = {}
        self._number = 0
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # Isolated: our files beside it are not modules of its.
                [python, "-I", str(PEER), str(theirs.fileno()), address],
                pass_fds=[theirs.fileno()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | QUIET,
            )
        self._socket = ours
        self._pipe = Connection(os.dup(ours.fileno()))
        threading.Thread(target=self._listen, daemon=True).start()
        self._registered: RegisterKVCache | None = None
        self.chunk_size = int(self._call("hello", patience_s=START_S))

    @property
    def last_s(self) -> float | None:
        """What the peer measured of this thread's last call."""
        return getattr(self._took, "seconds", None)

    def _listen(self) -> None:
        while True:
            try:
                reply = msgspec.msgpack.decode(self._pipe.recv_bytes())
            except (EOFError, OSError):
                break
            number, value, error, seconds = reply
            future = self._waiting.pop(number)
            if error is None:
                future.set_result((value, seconds))
            else:
                future.set_exception(KVError(f"lmcache: {error}"))
        for future in list(self._waiting.values()):
            future.set_exception(Unavailable("lmcache's client ended"))

    def _call(
        self, name: str, *arguments: object, patience_s: float | None = None
    ) -> Any:
        future: Future[tuple[Any, float]] = Future()
        with self._sending:
            self._number += 1
            self._waiting[self._number] = future
            try:
                call = (self._number, name, arguments)
                self._pipe.send_bytes(msgspec.msgpack.encode(call))
            except OSError:
                raise Unavailable("lmcache's client ended") from None
        try:
            value, self._took.seconds = future.result(patience_s or self._timeout_s)
        except TimeoutError:
            raise Unavailable(f"lmcache: {name} was not answered") from None
        return value

    def register_kv_cache(self, request: RegisterKVCache) -> RegisterReply:
        """Register one group of one tensor a layer, `[K, N, S, H, D]`."""
        group = request.groups[0]
        if len(request.groups) != 1 or group.axes != AXES:
            raise SetupError(f"--system lmcache: plays caches shaped {AXES} only")
        handles = shared(request)
        layers = [
            (handles[one.handle].offset + one.offset, one.shape)
            for one in group.tensors
        ]
        self._registered = request
        cache = {
            "segment": handles[0].name, "dtype": group.dtype, "layers": layers,
            "block_size": group.block_size, "rank": request.rank,
            "model": _model(request.model), "world_size": request.world_size,
            "instance": request.instance_id,
        }  # fmt: skip
        self._call("register", cache)
        return RegisterReply((), self._chunk_bytes(request))

    def _chunk_bytes(self, request: RegisterKVCache) -> int:
        group = request.groups[0]
        num_bytes = sum(one.strides[0] * one.shape[0] for one in group.tensors)
        num_tokens = group.tensors[0].shape[AXES.index("N")] * group.block_size
        return num_bytes // num_tokens * self.chunk_size

    def unregister_kv_cache(self, instance_id: str) -> None:
        """Let the server forget the rank."""
        del instance_id
        self._call("unregister")

    def lookup(
        self, session: SessionKey, model: str, world_size: int, tokens: Tokens
    ) -> LookupReply:
        """Ask, then ask for the result until it is there."""
        found = int(
            self._call(
                "lookup", _name(session), _model(model), world_size, _tokens(tokens)
            )
        )
        return LookupReply(found, found * self.chunk_size)

    def store(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
    ) -> StoreReply:
        """Store; the peer gathers."""
        del instance_id
        num_chunks = (end - start) // self.chunk_size
        if self._copy("store", session, start, end, blocks, tokens):
            return StoreReply(num_chunks, 0, 0)
        return StoreReply(0, 0, num_chunks)

    def retrieve(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
    ) -> RetrieveReply:
        """Retrieve; the peer scatters."""
        del instance_id
        if not self._copy("retrieve", session, start, end, blocks, tokens):
            raise ChunksMissing("the retrieve failed")
        return RetrieveReply(end - start)

    def _copy(
        self,
        name: str,
        session: SessionKey,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None,
    ) -> bool:
        ids = {"blocks": np.asarray(blocks[0], np.int32).tobytes()}
        given = _tokens(np.empty(0, np.uint32) if tokens is None else tokens)
        return bool(self._call(name, _name(session), given, start, end, ids))

    def end_session(self, session: SessionKey) -> None:
        """End the request."""
        self._call("end_session", _name(session))

    def ping(self) -> None:
        """One round trip of the shortest request."""
        self._call("ping")

    def close(self) -> None:
        """End the peer."""
        # Closing alone would not wake the thread that listens.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _model(name: str) -> str:
    """Write a model's name without what its object keys cannot hold."""
    return name.replace("@", "-").replace("/", "-")


def _name(session: SessionKey) -> str:
    return f"{session.engine_id} {session.request_id}"


def _tokens(tokens: Tokens | Sequence[int]) -> dict[str, bytes]:
    return {"tokens": bytes(pack_tokens(tokens))}
