"""Worker side of the connector: registration, loads and stores of one rank.

It runs in the engine's worker. Loads and stores are asynchronous requests; after each
step the engine collects the completed ones. A rank reports each load and
acknowledges each operation exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.client import KVClient
from kvcore.errors import Closed
from kvcore.keys import ExtraKey, SessionKey
from kvcore.protocol import RegisterKVCache, RetrieveReply
from kvcore.shm import Bytes
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.server_link import EngineIdentity, ServerLink
from kvcore.vllm.step_metadata import (
    GroupBlocks,
    LoadOp,
    OpId,
    StepPlan,
    StoreOp,
    TokenUpdate,
    real_blocks,
    unpack_blocks,
)
from kvcore.worker.copying_client import CopyingClient

Reply = Future[Any]


@dataclass(frozen=True, slots=True)
class Registration:
    """A rank's registration request and the engine group of each registered group.

    Layers of one engine group that differ in shape are registered as several groups.
    """

    request: RegisterKVCache
    sources: tuple[int, ...]
    memory: tuple[Bytes, ...] = ()
    """Bytes of each private handle, which this process copies itself."""
    record_event: Callable[[], bytes] = bytes
    """Records an event after the submitted GPU work; copies wait for it."""


@dataclass(slots=True)
class _Tokens:
    packed: npt.NDArray[np.uint32]
    extras: tuple[ExtraKey, ...]


@dataclass(slots=True)
class _RunningTransfer:
    """A load or store in progress."""

    op: OpId
    request_id: str
    future: Reply
    load: LoadOp | None = None


@dataclass(slots=True)
class Collected:
    """Operations that completed since the last call."""

    loaded: set[str] = field(default_factory=set)
    """Requests whose load ended, with or without success."""
    failed: set[str] = field(default_factory=set)
    """Requests whose load failed."""
    failed_blocks: set[int] = field(default_factory=set)
    """Blocks of the failed loads."""
    acks: dict[OpId, int] = field(default_factory=dict)


class ConnectorWorker:
    """Worker side of one rank. Only the engine's worker thread calls it."""

    def __init__(
        self, config: ConnectorConfig, engine: EngineIdentity, rank: int
    ) -> None:
        self._config = config
        self._engine = engine
        self._rank = rank
        self._registration: Registration | None = None
        self._link: ServerLink | None = None
        self._tokens: dict[str, _Tokens] = {}
        self._operations: list[_RunningTransfer] = []

    def register(self, registration: Registration) -> None:
        """Register the cache with the server, and again after each reconnection.

        Returns immediately; a background thread connects and registers.
        """
        self._registration = registration
        self._link = ServerLink(
            self._config.address,
            f"{self._engine.id} rank {self._rank}",
            self._engine.key,
            self._config.retry_s,
            self._register,
            CopyingClient if registration.memory else KVClient,
        )

    def _register(self, client: KVClient) -> None:
        if self._registration is None:
            return
        if isinstance(client, CopyingClient):
            client.register_kv_cache(
                self._registration.request, self._registration.memory
            )
        else:
            client.register_kv_cache(self._registration.request)

    # -- steps -------------------------------------------------------------------------

    def add_tokens(self, plan: StepPlan) -> None:
        """Add a plan's tokens; call it before `load` and `store`."""
        for update in plan.tokens:
            self._append(update)

    def load(self, plan: StepPlan) -> None:
        """Submit a plan's loads."""
        event = self._record_event() if plan.loads else b""
        self._operations += [self._begin_load(load, event) for load in plan.loads]

    def store(self, plan: StepPlan) -> None:
        """Submit a plan's stores, after their blocks have been computed."""
        event = self._record_event() if plan.stores else b""
        self._operations += [self._begin_store(store, event) for store in plan.stores]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Remove the tokens of requests that no later plan names."""
        for request_id in request_ids:
            self._tokens.pop(request_id, None)

    def collect(self) -> Collected:
        """Return the operations completed since the last call, each once."""
        collected = Collected()
        under_way = []
        for operation in self._operations:
            if operation.future.done():
                self._complete(operation, collected)
            else:
                under_way.append(operation)
        self._operations = under_way
        return collected

    @property
    def is_available(self) -> bool:
        """Whether the server responds and has registered the cache."""
        return self._client() is not None

    @property
    def num_in_progress(self) -> int:
        """Number of loads and stores in progress."""
        return len(self._operations)

    def _append(self, update: TokenUpdate) -> None:
        packed = np.frombuffer(update.packed, dtype="<u4")
        known = self._tokens.get(update.request_id)
        if known is not None and update.offset:
            packed = np.concatenate((known.packed[: update.offset], packed))
        self._tokens[update.request_id] = _Tokens(packed, update.extras)

    def _begin_load(self, load: LoadOp, event: bytes) -> _RunningTransfer:
        client, tokens = self._client(), self._tokens.get(load.request_id)
        if client is None or tokens is None:
            return _RunningTransfer(load.op, load.request_id, _not_sent(), load)
        future = client.submit_retrieve(
            SessionKey(self._engine.id, load.request_id),
            self._instance_id,
            load.start,
            load.end,
            self._blocks(load.blocks),
            tokens.packed,
            skip_first_n_tokens=load.skip,
            extras=tokens.extras,
            event=event,
            timeout_s=self._config.load_timeout_s,
        )
        return _RunningTransfer(load.op, load.request_id, future, load)

    def _begin_store(self, store: StoreOp, event: bytes) -> _RunningTransfer:
        client, tokens = self._client(), self._tokens.get(store.request_id)
        if client is None or tokens is None:
            return _RunningTransfer(store.op, store.request_id, _not_sent())
        future = client.submit_store(
            SessionKey(self._engine.id, store.request_id),
            self._instance_id,
            store.start,
            store.end,
            self._blocks(store.blocks),
            tokens.packed,
            extras=tokens.extras,
            event=event,
            timeout_s=self._config.store_timeout_s,
        )
        return _RunningTransfer(store.op, store.request_id, future)

    def _record_event(self) -> bytes:
        return (
            self._registration.record_event() if self._registration is not None else b""
        )

    def _client(self) -> KVClient | None:
        server = self._link.server if self._link is not None else None
        return server.client if server is not None else None

    @property
    def _instance_id(self) -> str:
        return f"{self._engine.id}:{self._rank}"

    def _blocks(self, packed: GroupBlocks) -> list[npt.NDArray[np.int32]]:
        sources: Sequence[int] = ()
        if self._registration is not None:
            sources = self._registration.sources
        return [unpack_blocks(packed[source]) for source in sources]

    # -- completion -------------------------------------------------------------------

    def _complete(self, operation: _RunningTransfer, collected: Collected) -> None:
        collected.acks[operation.op] = 1
        error = operation.future.exception()
        if error is not None and self._link is not None:
            self._link.record_failure(error)
        if operation.load is None:
            return
        collected.loaded.add(operation.request_id)
        if not _is_complete(operation.load, operation.future):
            collected.failed.add(operation.request_id)
            collected.failed_blocks.update(_written_blocks(operation.load))

    def close(self) -> None:
        """Close the connection; the server unregisters the cache."""
        if self._link is not None:
            self._link.close()


def _is_complete(load: LoadOp, future: Reply) -> bool:
    """Return whether a load wrote all requested tokens."""
    if future.exception() is not None:
        return False
    reply = future.result()
    return (
        isinstance(reply, RetrieveReply)
        and reply.num_tokens == load.end - load.start - load.skip
    )


def _written_blocks(load: LoadOp) -> list[int]:
    """Return the blocks that a load writes, without those of skipped tokens."""
    num_tokens = load.end - load.start
    written = []
    for packed in load.blocks:
        ids = unpack_blocks(packed)
        block_size = max(num_tokens // max(len(ids), 1), 1)
        written.append(ids[load.skip // block_size :].tobytes())
    return real_blocks(written)


def _not_sent() -> Reply:
    """Return a failed future for a request that was not sent."""
    future: Reply = Future()
    future.set_exception(Closed("the cache server is unavailable"))
    return future
