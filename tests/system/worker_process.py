"""A worker process for tests: a cache in shared memory, a client, and a pipe.

It runs commands by name: a method of `WorkerCommands`, or one of its client.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.client import KVClient
from kvcore.copy.block_arrays import ChunkSpans
from kvcore.copy.host_cache import HostCache
from kvcore.errors import Unavailable
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import Ping, PosixShm, RegisterKVCache
from kvcore.shm import SHM_DIR, Segment
from kvcore.worker.copying_client import CopyingClient
from tests.system.fork_server import fork_server, run_with_environment
from tests.system.server_fixture import ENGINE_KEY

BLOCK = 16
"""Tokens per block of every cache here."""

POISON = 0xA5
REPLY_S = 50

_counter = itertools.count()


@dataclass(frozen=True)
class Group:
    """A cache group of uint8; `shape` has 0 where the number of blocks goes."""

    axes: str = "LKNSD"
    shape: tuple[int, ...] = (2, 2, 0, BLOCK, 32)
    kind: str = "tokens"
    window: int | None = None
    replicated: bool = False


PLAIN = (Group(),)
LARGE = (Group(shape=(2, 2, 0, BLOCK, 1 << 15)),)
"""2 MiB per block, so that copies are slow."""
MLA = (Group("LNSD", (2, 0, BLOCK, 32), replicated=True),)
PAGES = (Group("LNP", (2, 0, 1024), kind="pages"),)


class Cache:
    """Consecutive cache groups, in a shared segment or in private memory."""

    def __init__(
        self, name: str | None, groups: tuple[Group, ...], num_blocks: int
    ) -> None:
        self.views: list[npt.NDArray[np.uint8]] = []
        described = []
        shapes = [tuple(size or num_blocks for size in g.shape) for g in groups]
        num_bytes = sum(map(math.prod, shapes))
        self.handles: tuple[PosixShm, ...] = ()
        self.segment: Segment | None = None
        if name is None:
            self.memory = np.ones(num_bytes, np.uint8)
        else:
            self.segment = Segment.create(name, num_bytes, touch=True)
            self.memory = self.segment.array
            self.handles = (PosixShm(name, 0, num_bytes),)
        offset = 0
        for group, shape in zip(groups, shapes, strict=True):
            end = offset + math.prod(shape)
            view = self.memory[offset:end].reshape(shape)
            tensor = TensorView(0, offset, shape, view.strides)
            described.append(
                CacheGroup(
                    axes=group.axes,
                    dtype="uint8",
                    block_size=BLOCK,
                    tensors=(tensor,),
                    kind=group.kind,  # type: ignore[arg-type]
                    window=group.window,
                    replicated=group.replicated,
                )
            )
            self.views.append(np.moveaxis(view, group.axes.index("N"), 0))
            offset = end
        self.groups = tuple(described)

    def close(self) -> None:
        """Remove the segment."""
        self.views.clear()
        del self.memory
        if self.segment is not None:
            self.segment.unlink()
            self.segment.close()


class WorkerCommands:
    """The commands of a worker process."""

    def __init__(self, address: str, name: str, driver: str = "server") -> None:
        kind = CopyingClient if driver == "worker" else KVClient
        self.client = kind(address, label=name, timeout_s=20, engine_key=ENGINE_KEY)
        self.name = name
        self.caches: dict[str, Cache] = {}
        self.futures: dict[str, Future[Any]] = {}
        self.half_way = threading.Event()
        self.whole = threading.Event()

    def register(
        self,
        instance_id: str,
        model: str,
        groups: tuple[Group, ...] = PLAIN,
        *,
        num_blocks: int = 64,
        rank: int = 0,
        world_size: int = 1,
        engine_id: str = "engine",
    ) -> Any:
        """Allocate a cache and register it, in place of the instance's earlier one."""
        is_own = isinstance(self.client, CopyingClient)
        name = None if is_own else f"{self.name}-{next(_counter)}"
        cache = Cache(name, groups, num_blocks)
        request = RegisterKVCache(
            instance_id,
            engine_id,
            model,
            world_size,
            rank,
            cache.handles,
            cache.groups,
        )
        try:
            if isinstance(self.client, CopyingClient):
                reply = self.client.register_kv_cache(request, (cache.memory,))
            else:
                reply = self.client.register_kv_cache(request)
        except BaseException:
            cache.close()
            raise
        earlier = self.caches.get(instance_id)
        if earlier is not None:
            earlier.close()
        self.caches[instance_id] = cache
        return reply

    def fill(self, instance_id: str, blocks: list[int], seed: int = 0) -> None:
        """Write random bytes into blocks, of every group."""
        rng = np.random.default_rng((seed, os.getpid()))
        for view in self.caches[instance_id].views:
            view[blocks] = rng.integers(0, 256, view[blocks].shape, np.uint8)

    def poison(self, instance_id: str, blocks: list[int]) -> None:
        """Fill blocks with bytes that no store wrote."""
        for view in self.caches[instance_id].views:
            for block in blocks:  # In place: these caches may be large.
                view[block] = POISON

    def read(
        self, instance_id: str, blocks: list[int], group: int = 0
    ) -> npt.NDArray[np.uint8]:
        """Return blocks, `[blocks, other axes in their order]`."""
        return self.caches[instance_id].views[group][blocks].copy()

    def digest(self, instance_id: str, blocks: list[int]) -> int:
        """Return a hash of the blocks, for large ones."""
        return hash(self.read(instance_id, blocks).tobytes())

    def copy(self, instance_id: str, source: list[int], target: list[int]) -> None:
        """Copy blocks into others."""
        for view in self.caches[instance_id].views:
            view[target] = view[source]

    def differs(self, instance_id: str, block: int) -> bool:
        """Return whether a poisoned block has been written to."""
        return any((v[block] != POISON).any() for v in self.caches[instance_id].views)

    def pause_copy(self, step: str) -> None:
        """Pause the next copy half-way, until `go_on`."""
        moved = getattr(HostCache, step)

        def half(
            cache: HostCache, spans: ChunkSpans, *rest: Any, **options: Any
        ) -> Any:
            setattr(HostCache, step, moved)
            moved(cache, spans[: len(spans) // 2], *rest, **options)
            self.half_way.set()
            self.whole.wait(REPLY_S)
            return moved(cache, spans, *rest, **options)

        setattr(HostCache, step, half)

    def is_copy_paused(self) -> bool:
        """Return whether a copy is paused half-way."""
        return self.half_way.is_set()

    def resume_copy(self) -> None:
        """Continue the paused copy."""
        self.whole.set()

    def due(self, timeout_s: float) -> None:
        """Ask for the server's clock, with a deadline."""
        self.client.call(Ping(), timeout_s)

    def state(self) -> str:
        """Return the connection's status."""
        return repr(self.client._connection)

    def is_server_gone(self) -> bool:
        """Return whether the client has noticed that its server ended."""
        try:
            return not self.client.server
        except Unavailable:
            return True

    def begin(self, key: str, method: str, *args: Any, **options: Any) -> None:
        """Submit a request and keep its future."""
        self.futures[key] = getattr(self.client, method)(*args, **options)

    def is_done(self, key: str) -> bool:
        """Return whether a kept future is done."""
        return self.futures[key].done()

    def result(self, key: str) -> Any:
        """Wait for a kept future."""
        return self.futures.pop(key).result(REPLY_S)

    def close(self) -> None:
        """Close the client and remove the caches."""
        self.client.close()
        for cache in self.caches.values():
            cache.close()


def _run_commands(
    kind: type[WorkerCommands], address: str, name: str, driver: str, pipe: Connection
) -> None:
    """Run the commands that come through a pipe until the pipe is closed."""
    commands = kind(address, name, driver)
    pipe.send((True, os.getpid()))
    while True:
        try:
            method, args, options = pipe.recv()
        except EOFError:
            break
        own = getattr(commands, method, None)
        try:
            result = (own or getattr(commands.client, method))(*args, **options)
            pipe.send((True, result))
        except Exception as error:  # noqa: BLE001 - raised again by `Worker.receive`
            pipe.send((False, error))
    commands.close()


class Worker:
    """A worker process as the test sees it."""

    def __init__(
        self,
        address: str,
        commands: type[WorkerCommands] = WorkerCommands,
        driver: str = "server",
    ) -> None:
        context = fork_server()
        self.name = f"kvtest-{os.getpid()}-{next(_counter)}"
        self._pipe, other_end = context.Pipe()
        arguments = (commands, address, self.name, driver, other_end)
        self.process = context.Process(
            target=run_with_environment,
            args=(dict(os.environ), _run_commands, *arguments),
            daemon=True,
        )
        self.process.start()
        other_end.close()

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Run a command in the worker; return its result or raise its error."""
        self.send(method, *args, **options)
        return self.receive()

    def send(self, method: str, *args: Any, **options: Any) -> None:
        """Start a command; `receive` waits for its result."""
        self._pipe.send((method, args, options))

    def receive(self) -> Any:
        """Return the result of the oldest command; the first is the process id."""
        assert self._pipe.poll(REPLY_S), "the worker does not reply"
        succeeded, result = self._pipe.recv()
        if succeeded:
            return result
        raise result

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """End the process if it runs, and remove the segments it left."""
        self._pipe.close()
        self.process.join(20)
        with suppress(ValueError):
            self.process.kill()
            self.process.join()
        for path in SHM_DIR.glob(f"{self.name}-*"):
            path.unlink(missing_ok=True)
