"""LMCache's client in LMCache's Python, controlled by the lab over a pipe.

Executed by path: it imports nothing of this project, which need not be installed
there. Calls are timed here, as an engine would see them, without the pipe. Tested with
LMCache 0.5.6 in its multi-process mode, with data in shared memory.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

import msgspec
import numpy as np
import torch
import zmq
from lmcache.utils import EngineType
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
from lmcache.v1.multiprocess.group_view import EngineGroupInfo
from lmcache.v1.multiprocess.transfer_context import EngineDrivenTransferContext
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

TIMEOUT_S = 30.0
POLL_S = 0.0005
EAGER_POLLS = 20
"""Polls of a lookup's result before the first pause."""
MAX_THREADS = 32


class LMCacheProcess:
    """The client of one scheduler or rank."""

    def __init__(self, address: str) -> None:
        self.client = RequestClientFactory.create(address, context=zmq.Context())
        self.chunk_size = int(self.client.get_chunk_size().result(timeout=TIMEOUT_S))
        self.caches: dict[str, Any] = {}

    def hello(self) -> int:
        """Return the tokens per chunk."""
        return self.chunk_size

    def ping(self) -> None:
        """Make one round trip."""
        self.client.get_chunk_size().result(timeout=TIMEOUT_S)

    def register(self, cache: dict[str, Any]) -> None:
        """Map a rank's cache by the name of its segment, and register it."""
        with open(f"/dev/shm/{cache['segment']}", "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)
        dtype = getattr(torch, cache["dtype"])
        for number, (offset, shape) in enumerate(cache["layers"]):
            count = int(np.prod(shape))
            flat = torch.frombuffer(
                self.memory, dtype=dtype, count=count, offset=offset
            )
            self.caches[f"layer.{number}"] = flat.reshape(shape)
        self.rank, self.model = cache["rank"], cache["model"]
        self.world_size, self.block_size = cache["world_size"], cache["block_size"]
        instance = zlib.crc32(cache["instance"].encode()) & 0x7FFFFFFF
        self.context = EngineDrivenTransferContext(instance, self.client)
        layers = tuple(range(len(self.caches)))
        self.context.register(
            self.caches,
            self.model,
            self.world_size,
            self.chunk_size // self.block_size,
            TIMEOUT_S,
            layout_hints={"kv_layout": "NHD"},
            engine_group_infos=[
                EngineGroupInfo(
                    engine_group_id=0,
                    layer_indices=layers,
                    tokens_per_block=self.block_size,
                )
            ],
            engine_type=EngineType.VLLM,
        )

    def unregister(self) -> None:
        """Unregister the rank."""
        future = self.context.unregister()
        if future is not None:
            future.result(timeout=TIMEOUT_S)
        self.context.close()

    def lookup(
        self, request_id: str, model: str, world_size: int, tokens: tuple[int, ...]
    ) -> int:
        """Return the number of chunks found, polled as by an engine."""
        end = len(tokens) // self.chunk_size * self.chunk_size
        if not end:
            return 0
        key = IPCCacheServerKey(
            model, world_size, None, tokens, 0, end, request_id, num_kv_readers=1
        )
        self.client.lookup(key, world_size).result(timeout=TIMEOUT_S)
        polls = 0
        while True:
            status = self.client.query_prefetch_status(request_id)
            found = status.result(timeout=TIMEOUT_S)
            if found is not None:
                return int(found)
            polls += 1
            if polls > EAGER_POLLS:
                time.sleep(POLL_S)

    def end_session(self, request_id: str) -> None:
        """End the request."""
        self.client.end_session(request_id).result(timeout=TIMEOUT_S)

    def store(
        self, request_id: str, tokens: tuple[int, ...], start: int, end: int, ids: Any
    ) -> bool:
        """Store the blocks of tokens [start, end); return whether it succeeded."""
        return self._copy(
            self.context.submit_store, request_id, tokens, start, end, ids
        )

    def retrieve(
        self, request_id: str, tokens: tuple[int, ...], start: int, end: int, ids: Any
    ) -> bool:
        """Fill the blocks of tokens [start, end); return whether it succeeded."""
        submit = self.context.submit_retrieve
        return self._copy(submit, request_id, tokens, start, end, ids)

    def _copy(
        self, submit: Any, request_id: str, tokens: Any, start: int, end: int, ids: Any
    ) -> bool:
        key = IPCCacheServerKey(
            self.model, self.world_size, self.rank, tokens, start, end, request_id,
            num_kv_readers=1,
        )  # fmt: skip
        event = self.context.create_recorded_event()
        blocks = self.chunk_size // self.block_size
        future = submit(request_id, key, self.caches, [ids], event, blocks)
        return bool(future.result(timeout=TIMEOUT_S))


@lru_cache(maxsize=8)
def _tokens(packed: bytes) -> tuple[int, ...]:
    """Return the tuple of tokens that an engine already has."""
    return tuple(np.frombuffer(packed, np.uint32).tolist())


def _unpack(arguments: list[Any]) -> list[Any]:
    """Return arguments with unpacked tokens and block ids, before timing begins."""
    unpacked: list[Any] = []
    for one in arguments:
        if isinstance(one, dict) and "tokens" in one:
            unpacked.append(_tokens(one["tokens"]))
        elif isinstance(one, dict) and "blocks" in one:
            unpacked.append(np.frombuffer(one["blocks"], np.int32).tolist())
        else:
            unpacked.append(one)
    return unpacked


def main() -> None:
    """Answer calls until the pipe is closed."""
    torch.set_num_threads(1)
    pipe = Connection(int(sys.argv[1]))
    client = LMCacheProcess(sys.argv[2])
    calls: dict[str, Callable[..., Any]] = {
        "hello": client.hello,
        "ping": client.ping,
        "register": client.register,
        "unregister": client.unregister,
        "lookup": client.lookup,
        "store": client.store,
        "retrieve": client.retrieve,
        "end_session": client.end_session,
    }
    send_lock = Lock()

    def answer(number: int, name: str, arguments: list[Any]) -> None:
        unpacked = _unpack(arguments)
        start = time.perf_counter()
        value, error = None, None
        try:
            value = calls[name](*unpacked)
        except Exception as failed:  # noqa: BLE001 - every error is reported to the lab
            error = f"{type(failed).__name__}: {failed}"
        reply = (number, value, error, time.perf_counter() - start)
        with send_lock:
            pipe.send_bytes(msgspec.msgpack.encode(reply))

    with ThreadPoolExecutor(MAX_THREADS) as pool:
        while True:
            try:
                call = msgspec.msgpack.decode(pipe.recv_bytes())
            except EOFError:
                os._exit(0)  # A normal exit would wait for calls in progress.
            pool.submit(answer, *call)


if __name__ == "__main__":
    main()
