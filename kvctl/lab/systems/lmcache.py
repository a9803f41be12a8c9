"""Driver of LMCache's multi-process server, with data in shared memory.

LMCache's client runs in a separate process per scheduler and rank, in the Python in
which LMCache is installed (`lmcache_process.py`).
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

from kvcore.config import ServerConfig
from kvcore.errors import KVError, SetupError, Unavailable
from kvcore.keys import SessionKey, Tokens, pack_tokens
from kvcore.protocol import LookupReply, RegisterKVCache, RegisterReply
from kvctl.lab.config.scenario import SystemSpec
from kvctl.lab.systems.child_processes import free_port
from kvctl.lab.systems.system_interface import (
    ChunkRange,
    ExternalClient,
    StartedSystem,
    shared_memory_handles,
)

CLIENT_PROCESS = Path(__file__).with_name("lmcache_process.py")
AXES = "KNSHD"
"""Axes of each layer's tensor that its shared-memory transfer supports."""
ENVIRONMENT = {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false"}
STOP_S = 10.0
START_S = 60.0
"""Timeout for the start of a Python with torch, on a busy machine."""


class LMCacheClient(ExternalClient):
    """The client of a scheduler or rank. Thread-safe."""

    @staticmethod
    def start(spec: SystemSpec, config: ServerConfig, folder: Path) -> StartedSystem:
        """Return how its server is started: memory touched first, engines copy."""
        del folder
        port, program = free_port(), Path(_python(spec)).with_name("lmcache")
        if not program.exists():
            raise SetupError(f"--system-python {spec.python}: no lmcache in its folder")
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
        return StartedSystem(command, address, ENVIRONMENT)

    def __init__(
        self, spec: SystemSpec, address: str, config: ServerConfig, timeout_s: float
    ) -> None:
        """Start a client process, which connects to the server."""
        del config
        python = _python(spec)
        self._timeout_s = timeout_s
        self._call_times = threading.local()
        self._send_lock = threading.Lock()
        self._futures: dict[int, Future[tuple[Any, float]]] = {}
        self._last_number = 0
        self._socket, process_end = socket.socketpair()
        with process_end:
            self._process = subprocess.Popen(
                # Isolated: files in the folder of the script are not importable.
                [python, "-I", str(CLIENT_PROCESS), str(process_end.fileno()), address],
                pass_fds=[process_end.fileno()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT,
            )
        self._pipe = Connection(os.dup(self._socket.fileno()))
        threading.Thread(target=self._receive_replies, daemon=True).start()
        self.chunk_size = int(self._call("hello", timeout_s=START_S))

    @property
    def last_call_s(self) -> float | None:
        """Duration of this thread's last call, measured in the client process."""
        return getattr(self._call_times, "seconds", None)

    def _receive_replies(self) -> None:
        while True:
            try:
                reply = msgspec.msgpack.decode(self._pipe.recv_bytes())
            except (EOFError, OSError):
                break
            number, value, error, seconds = reply
            future = self._futures.pop(number)
            if error is None:
                future.set_result((value, seconds))
            else:
                future.set_exception(KVError(f"lmcache: {error}"))
        for future in list(self._futures.values()):
            future.set_exception(Unavailable("the client process of lmcache ended"))

    def _call(
        self, name: str, *arguments: object, timeout_s: float | None = None
    ) -> Any:
        future: Future[tuple[Any, float]] = Future()
        with self._send_lock:
            self._last_number += 1
            self._futures[self._last_number] = future
            try:
                call = (self._last_number, name, arguments)
                self._pipe.send_bytes(msgspec.msgpack.encode(call))
            except OSError:
                raise Unavailable("the client process of lmcache ended") from None
        try:
            value, seconds = future.result(timeout_s or self._timeout_s)
        except TimeoutError:
            raise Unavailable(f"lmcache: {name} timed out") from None
        self._call_times.seconds = seconds
        return value

    def register_kv_cache(self, request: RegisterKVCache) -> RegisterReply:
        """Register one group with one tensor per layer, `[K, N, S, H, D]`.

        Raises:
            SetupError: several groups, or other axes.
        """
        group = request.groups[0]
        if len(request.groups) != 1 or group.axes != AXES:
            raise SetupError(f"--system lmcache: supports caches of shape {AXES} only")
        handles = shared_memory_handles(request)
        layers = [
            (handles[one.handle].offset + one.offset, one.shape)
            for one in group.tensors
        ]
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
        """Unregister the rank."""
        del instance_id
        self._call("unregister")

    def lookup(
        self, session: SessionKey, model: str, world_size: int, tokens: Tokens
    ) -> LookupReply:
        """Request a lookup and poll its result."""
        found = int(
            self._call(
                "lookup", _name(session), _model(model), world_size, _tokens(tokens)
            )
        )
        return LookupReply(found, found * self.chunk_size)

    def store_chunks(self, chunks: ChunkRange) -> bool:
        """Store; the client process gathers."""
        return self._copy("store", chunks)

    def retrieve_chunks(self, chunks: ChunkRange) -> bool:
        """Retrieve; the client process scatters."""
        return self._copy("retrieve", chunks)

    def _copy(self, name: str, chunks: ChunkRange) -> bool:
        request, tokens = _name(chunks.session), _tokens(chunks.tokens)
        ids = {"blocks": chunks.blocks.tobytes()}
        return bool(self._call(name, request, tokens, chunks.start, chunks.end, ids))

    def end_session(self, session: SessionKey) -> None:
        """End the request."""
        self._call("end_session", _name(session))

    def ping(self) -> None:
        """Make one round trip of the shortest request."""
        self._call("ping")

    def close(self) -> None:
        """End the client process."""
        # Closing alone would not wake the receiving thread.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _python(spec: SystemSpec) -> str:
    if spec.python is None:
        raise SetupError(
            "--system lmcache: give --system-python, the Python it is installed in"
        )
    return spec.python


def _model(name: str) -> str:
    """Return a model's name without characters that LMCache's keys cannot hold."""
    return name.replace("@", "-").replace("/", "-")


def _name(session: SessionKey) -> str:
    return f"{session.engine_id} {session.request_id}"


def _tokens(tokens: Tokens | Sequence[int]) -> dict[str, bytes]:
    return {"tokens": bytes(pack_tokens(tokens))}
