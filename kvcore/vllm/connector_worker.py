"""The worker half: one rank's cache, and the copies into and out of it.

It lives in the engine's worker. Loads and stores are submitted and looked after by
the client's thread; each step the engine collects what has ended. A rank reports each
load, and acknowledges each op, exactly once, however often the engine names a request.
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
from kvcore.vllm.server_link import ServerLink
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
    """A rank's cache, and from which of the engine's groups each of ours takes blocks.

    Layers of one engine group that differ in shape are several groups of ours.
    """

    request: RegisterKVCache
    sources: tuple[int, ...]
    memory: tuple[Bytes, ...] = ()
    """Of private handles: what this process copies itself."""
    record_event: Callable[[], bytes] = bytes
    """Says how far the engine's work has come; a copy waits for that."""


@dataclass(slots=True)
class _Tokens:
    packed: npt.NDArray[np.uint32]
    extras: tuple[ExtraKey, ...]


@dataclass(slots=True)
class _RunningTransfer:
    """A load or store under way."""

    op: OpId
    request_id: str
    future: Reply
    load: LoadOp | None = None


@dataclass(slots=True)
class Collected:
    """What has ended since the last time."""

    loaded: set[str] = field(default_factory=set)
    """Requests whose load ended, well or not."""
    failed: set[str] = field(default_factory=set)
    """Those whose load did not end well."""
    failed_blocks: set[int] = field(default_factory=set)
    """The blocks of those."""
    acks: dict[OpId, int] = field(default_factory=dict)


class ConnectorWorker:
    """One rank's. Its methods are called by the engine's worker thread alone."""

    def __init__(self, config: ConnectorConfig, engine_id: str, rank: int) -> None:
        self._config = config
        self._engine_id = engine_id
        self._rank = rank
        self._registration: Registration | None = None
        self._link: ServerLink | None = None
        self._tokens: dict[str, _Tokens] = {}
        self._operations: list[_RunningTransfer] = []

    def register(self, registration: Registration) -> None:
        """Register the cache, now or when a server is there, and with each later one.

        Returns at once.
        """
        self._registration = registration
        self._link = ServerLink(
            self._config.address,
            f"{self._engine_id[:40]} rank {self._rank}",
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

    # -- each step --------------------------------------------------------------------

    def add_tokens(self, plan: StepPlan) -> None:
        """Take in a plan's tokens; call it before anything else of the plan."""
        for update in plan.tokens:
            self._append(update)

    def load(self, plan: StepPlan) -> None:
        """Begin a plan's loads."""
        event = self._record_event() if plan.loads else b""
        self._operations += [self._begin_load(load, event) for load in plan.loads]

    def store(self, plan: StepPlan) -> None:
        """Begin a plan's stores, of blocks that have been computed by now."""
        event = self._record_event() if plan.stores else b""
        self._operations += [self._begin_store(store, event) for store in plan.stores]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Forget the tokens of requests that no later plan names."""
        for request_id in request_ids:
            self._tokens.pop(request_id, None)

    def collect(self) -> Collected:
        """Return what has ended, each thing once."""
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
        """Whether the server knows the cache and answers."""
        return self._client() is not None

    @property
    def num_in_progress(self) -> int:
        """Loads and stores that have not ended."""
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
            SessionKey(self._engine_id, load.request_id),
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
            SessionKey(self._engine_id, store.request_id),
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
        return f"{self._engine_id}:{self._rank}"

    def _blocks(self, packed: GroupBlocks) -> list[npt.NDArray[np.int32]]:
        sources: Sequence[int] = ()
        if self._registration is not None:
            sources = self._registration.sources
        return [unpack_blocks(packed[source]) for source in sources]

    # -- ends -------------------------------------------------------------------------

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
        """Say goodbye: the server forgets the cache."""
        if self._link is not None:
            self._link.close()


def _is_complete(load: LoadOp, future: Reply) -> bool:
    """Say whether a load wrote all that it was asked for."""
    if future.exception() is not None:
        return False
    reply = future.result()
    return (
        isinstance(reply, RetrieveReply)
        and reply.num_tokens == load.end - load.start - load.skip
    )


def _written_blocks(load: LoadOp) -> list[int]:
    """List the blocks that a load was to write: not those of what it skips."""
    num_tokens = load.end - load.start
    written = []
    for packed in load.blocks:
        ids = unpack_blocks(packed)
        block_size = max(num_tokens // max(len(ids), 1), 1)
        written.append(ids[load.skip // block_size :].tobytes())
    return real_blocks(written)


def _not_sent() -> Reply:
    """Return the outcome of what was never sent."""
    future: Reply = Future()
    future.set_exception(Closed("the cache server is not well just now"))
    return future
