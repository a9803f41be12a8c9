"""Worker side of the connector: registration, loads and stores of one rank.

It runs in the engine's worker. Loads and stores are asynchronous requests; after each
step the engine collects the completed ones. A rank reports each load and
acknowledges each operation exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec.structs import replace

from kvcore.client import KVClient
from kvcore.errors import Closed
from kvcore.keys import TOKEN_BYTES, SessionKey
from kvcore.protocol import RegisterKVCache
from kvcore.shm import Bytes
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.server_link import EngineIdentity, ServerLink
from kvcore.vllm.step_metadata import (
    LoadOp,
    OpId,
    StepPlan,
    StoreOp,
    TokenUpdate,
    real_blocks,
    unpack_blocks,
)
from kvcore.worker.copying_client import CopyingClient


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


@dataclass(frozen=True, slots=True)
class _RunningTransfer:
    """A load or store in progress."""

    op: LoadOp | StoreOp
    future: Future[Any]


@dataclass(slots=True)
class Collected:
    """Operations that completed since the last call."""

    loaded: set[str] = field(default_factory=set)
    """Requests whose load ended, with or without success."""
    failed: set[str] = field(default_factory=set)
    """Requests whose load failed."""
    failed_blocks: set[int] = field(default_factory=set)
    """Blocks of the failed loads."""
    acks: Counter[OpId] = field(default_factory=Counter)


class ConnectorWorker:
    """Worker side of one rank. Only the engine's worker thread calls it.

    Before `register` no request is sent: loads fail, and every operation is
    acknowledged.
    """

    def __init__(self, config: ConnectorConfig, engine: EngineIdentity) -> None:
        self._config = config
        self._engine = engine
        self._registration: Registration | None = None
        self._link: ServerLink | None = None
        self._tokens: dict[str, TokenUpdate] = {}
        self._running: list[_RunningTransfer] = []

    def register(self, registration: Registration) -> None:
        """Register the cache with the server, and again after each reconnection.

        Returns immediately; a background thread connects and registers.
        """

        def send(client: KVClient) -> None:
            if isinstance(client, CopyingClient):
                client.register_kv_cache(registration.request, registration.memory)
            else:
                client.register_kv_cache(registration.request)

        self._registration = registration
        self._link = ServerLink(
            self._config,
            self._engine,
            f"rank {registration.request.rank}",
            send,
            CopyingClient if registration.memory else KVClient,
        )

    # -- steps -------------------------------------------------------------------------

    def add_tokens(self, plan: StepPlan) -> None:
        """Add a plan's tokens; call it before `load` and `store`."""
        for update in plan.tokens:
            known = self._tokens.get(update.request_id)
            if known is not None and update.offset:
                packed = known.packed[: update.offset * TOKEN_BYTES] + update.packed
                update = replace(update, offset=0, packed=packed)
            self._tokens[update.request_id] = update

    def load(self, plan: StepPlan) -> None:
        """Submit a plan's loads."""
        self._start(plan.loads)

    def store(self, plan: StepPlan) -> None:
        """Submit a plan's stores, after their blocks have been computed."""
        self._start(plan.stores)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Remove the tokens of requests that no later plan names."""
        for request_id in request_ids:
            self._tokens.pop(request_id, None)

    def collect(self) -> Collected:
        """Return the operations completed since the last call, each once."""
        collected = Collected()
        running = []
        for transfer in self._running:
            if transfer.future.done():
                self._complete(transfer, collected)
            else:
                running.append(transfer)
        self._running = running
        return collected

    def _start(self, ops: Sequence[LoadOp | StoreOp]) -> None:
        event = b""
        if ops and self._registration is not None:
            event = self._registration.record_event()
        self._running += [_RunningTransfer(op, self._submit(op, event)) for op in ops]

    def _submit(self, op: LoadOp | StoreOp, event: bytes) -> Future[Any]:
        server = self._link.server if self._link is not None else None
        tokens = self._tokens.get(op.request_id)
        if server is None or self._registration is None or tokens is None:
            return _not_sent()
        transfer = (
            SessionKey(self._engine.id, op.request_id),
            self._registration.request.instance_id,
            op.start,
            op.end,
            [unpack_blocks(op.blocks[group]) for group in self._registration.sources],
            np.frombuffer(tokens.packed, "<u4"),
        )
        if isinstance(op, StoreOp):
            return server.client.submit_store(
                *transfer,
                extras=tokens.extras,
                event=event,
                timeout_s=self._config.store_timeout_s,
            )
        return server.client.submit_retrieve(
            *transfer,
            skip_first_n_tokens=op.skip,
            extras=tokens.extras,
            event=event,
            timeout_s=self._config.load_timeout_s,
        )

    # -- completion -------------------------------------------------------------------

    def _complete(self, transfer: _RunningTransfer, collected: Collected) -> None:
        op, error = transfer.op, transfer.future.exception()
        collected.acks[op.op] = 1
        if error is not None and self._link is not None:
            self._link.record_failure(error)
        if isinstance(op, StoreOp):
            return
        collected.loaded.add(op.request_id)
        num_tokens = op.end - op.start - op.skip
        if error is not None or transfer.future.result().num_tokens != num_tokens:
            collected.failed.add(op.request_id)
            collected.failed_blocks.update(_written_blocks(op))

    def close(self) -> None:
        """Close the connection; the server unregisters the cache."""
        if self._link is not None:
            self._link.close()


def _written_blocks(load: LoadOp) -> list[int]:
    """Return the blocks that a load writes, without those of skipped tokens."""
    num_tokens = load.end - load.start
    written = []
    for packed in load.blocks:
        ids = unpack_blocks(packed)
        block_size = max(num_tokens // max(len(ids), 1), 1)
        written.append(ids[load.skip // block_size :].tobytes())
    return real_blocks(written)


def _not_sent() -> Future[Any]:
    """Return a failed future for a request that was not sent."""
    future: Future[Any] = Future()
    future.set_exception(Closed("the cache server is unavailable"))
    return future
