"""Scheduler side of the connector: lookups, planned loads and stores, held blocks.

It runs in the engine's scheduler and never blocks: lookups are polled futures, and the
workers receive everything else in a `StepPlan`. Each block that a worker may still read
or write is held with one reference until every rank has acknowledged the operation.
The engine reuses it only then, even if the request finished, was preempted, or moved
its sliding window meanwhile.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Protocol

from kvcore.errors import KVError
from kvcore.keys import ExtraKey, SessionKey, pack_tokens
from kvcore.protocol import LookupReply
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.kv_cache_groups import EngineGroup
from kvcore.vllm.server_link import ServerLink
from kvcore.vllm.step_metadata import (
    GroupBlocks,
    LoadOp,
    OpId,
    ScheduledRequest,
    StepPlan,
    StoreOp,
    TokenUpdate,
    pack_blocks,
    real_blocks,
)

LOOKUP_VALID_S = 20.0
"""Age after which an unused lookup result is looked up again: the lease on the found
chunks may have expired."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """An engine's request; `tokens` grows while it runs."""

    request_id: str
    tokens: Sequence[int]
    make_extras: Callable[[], tuple[ExtraKey, ...]]
    """Returns the extra keys; called once, since it may read an adapter's weights."""


class BlockPool(Protocol):
    """The engine's blocks. A held block is not reused for another request."""

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block."""

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one reference from each block."""


@dataclass(slots=True)
class PendingLookup:
    """A lookup, from its submission until the engine has used the result."""

    future: Future[LookupReply]
    submitted: float
    num_tokens: int
    chunk_size: int
    hit: int = 0
    is_handled: bool = False
    """Whether the result has been processed."""

    @property
    def is_expired(self) -> bool:
        """Whether it completed but was submitted over LOOKUP_VALID_S ago."""
        return self.future.done() and monotonic() - self.submitted > LOOKUP_VALID_S


@dataclass(slots=True)
class RequestState:
    """State of one request, from its first lookup to the end of its session."""

    session: SessionKey
    tokens: Sequence[int]
    extras: tuple[ExtraKey, ...]
    match: PendingLookup | None = None
    blocks: list[list[int]] = field(default_factory=list)
    num_stored: int = 0
    """Tokens that were found or whose store was planned; whole chunks."""
    num_sent: int = 0
    """Tokens that were sent to the workers."""
    num_looked_up: int = 0
    """Tokens that the last successful lookup sent to the server."""
    num_ops: int = 0
    is_known: bool = False
    """Whether the server may know the session."""
    load_failed: bool = False
    finished: bool = False

    def take_blocks(self, one: ScheduledRequest) -> None:
        """Add the blocks that a step allocated to the request."""
        if one.blocks is None:
            return
        if one.replaces or not self.blocks:
            self.blocks = [list(ids) for ids in one.blocks]
        else:
            for known, more in zip(self.blocks, one.blocks, strict=True):
                known.extend(more)


@dataclass(slots=True)
class PendingOperation:
    """A load or store that some rank has not acknowledged."""

    state: RequestState
    held: list[int]
    num_waiting: int


class ConnectorScheduler:
    """Scheduler side of one engine. Only the engine's scheduler thread calls it."""

    def __init__(
        self,
        link: ServerLink,
        config: ConnectorConfig,
        *,
        engine_id: str,
        model: str,
        world_size: int,
        groups: Sequence[EngineGroup],
        pool: BlockPool | None = None,
    ) -> None:
        self._link = link
        self._config = config
        self._engine_id = engine_id
        self._model = model
        self._world_size = world_size
        self._groups = tuple(groups)
        self.pool = pool
        self._tracked: dict[str, RequestState] = {}
        self._operations: dict[OpId, PendingOperation] = {}
        self._ops = count(1)
        self._plan = StepPlan()
        """The plan of the step that is being scheduled."""
        self._since_reset: tuple[ExtraKey, ...] = ()

    @property
    def num_ops(self) -> int:
        """Number of loads and stores in progress; the engine must keep stepping."""
        return len(self._operations)

    # -- lookups and loads ------------------------------------------------------------

    def get_num_matched_tokens(
        self, request: EngineRequest, num_computed: int
    ) -> int | None:
        """Return how many tokens after the first `num_computed` can be loaded.

        None while the lookup is in progress: call again in the next step.
        """
        state = self._track(request)
        if state is None or state.load_failed:
            return 0
        if state.match is None or state.match.is_expired:
            state.match = self._look_up(state, num_computed)
        match = state.match
        if match is None:
            return 0
        if not match.future.done():
            return None
        if not match.is_handled:
            # Once: reporting an old error again would mark a recovered server as down.
            match.is_handled = True
            match.hit = self._hit(state, match)
        return max(match.hit - num_computed, 0)

    def update_after_alloc(
        self, request_id: str, blocks: tuple[list[int], ...], num_external: int
    ) -> None:
        """Plan a load of the matched tokens into these blocks, or free the lookup."""
        state = self._tracked.get(request_id)
        if state is None or state.match is None:
            return
        match, state.match = state.match, None
        state.num_stored = match.hit
        if num_external > 0:
            self._plan_load(state, match, match.hit - num_external, blocks)
        else:
            self._free(state, 0, match.hit)

    def _plan_load(
        self,
        state: RequestState,
        match: PendingLookup,
        computed: int,
        blocks: tuple[list[int], ...],
    ) -> None:
        start = computed - computed % match.chunk_size
        self._free(state, 0, start)
        self._send_tokens(state, match.hit)
        load = LoadOp(
            # The engine itself holds the blocks until every rank has ended the load.
            op=self._start_operation(state, []),
            request_id=state.session.request_id,
            start=start,
            end=match.hit,
            skip=computed - start,
            blocks=self._pack_blocks(blocks, start, match.hit),
        )
        self._plan.loads.append(load)

    def _look_up(self, state: RequestState, num_computed: int) -> PendingLookup | None:
        server = self._link.server
        num_tokens = len(state.tokens)
        if server is None:
            return None
        chunk_size = server.chunk_size
        if num_tokens - num_tokens % chunk_size <= num_computed:
            return None
        state.is_known = True
        try:
            future = server.client.submit_lookup(
                state.session,
                self._model,
                self._world_size,
                state.tokens[:],
                known=state.num_looked_up,
                extras=state.extras,
                timeout_s=self._config.lookup_timeout_s,
            )
        except KVError as error:
            self._link.record_failure(error)
            return None
        return PendingLookup(future, monotonic(), num_tokens, chunk_size)

    def _hit(self, state: RequestState, match: PendingLookup) -> int:
        error = match.future.exception()
        if error is not None:
            self._link.record_failure(error)
            state.num_looked_up = 0
            return 0
        self._link.record_success()
        state.num_looked_up = match.num_tokens
        return match.future.result().num_tokens

    def _free(self, state: RequestState, start: int, end: int) -> None:
        client = self._link.last_client
        if client is not None and end > start:
            client.submit_free_lookup_locks(state.session, start, end)

    # -- steps -------------------------------------------------------------------------

    def step(self, scheduled: Iterable[ScheduledRequest]) -> StepPlan:
        """Return the step's plan; its stores run after the forward pass."""
        server = self._link.server
        for one in scheduled:
            state = self._tracked.get(one.request_id)
            if state is None:
                continue
            state.take_blocks(one)
            if server is not None:
                self._plan_store(state, one, server.chunk_size)
        plan, self._plan = self._plan, StepPlan()
        return plan

    def _plan_store(
        self, state: RequestState, one: ScheduledRequest, chunk_size: int
    ) -> None:
        # Draft tokens and placeholders of asynchronous scheduling are not stored.
        end = min(one.num_computed + one.num_new, len(state.tokens))
        end -= end % chunk_size
        # A server that replaced another may have a different chunk size.
        start = state.num_stored - state.num_stored % chunk_size
        if end <= start:
            return
        state.num_stored = end
        state.is_known = True
        self._send_tokens(state, end)
        blocks = self._pack_blocks(state.blocks, start, end, one.num_computed)
        op = self._start_operation(state, real_blocks(blocks))
        self._plan.stores.append(
            StoreOp(op, state.session.request_id, start, end, blocks)
        )

    def _pack_blocks(
        self,
        blocks: Sequence[list[int]],
        start: int,
        end: int,
        num_computed: int = 0,
    ) -> GroupBlocks:
        """Pack the blocks of [start, end) of each group.

        Blocks that are outside a window at `num_computed` become NULL_BLOCK.
        """
        packed = []
        for group, ids in zip(self._groups, blocks, strict=True):
            first, last = start // group.block_size, -(-end // group.block_size)
            num_skipped = max(group.num_skipped(num_computed) - first, 0)
            packed.append(pack_blocks(ids[first:last], num_skipped))
        return tuple(packed)

    def _send_tokens(self, state: RequestState, end: int) -> None:
        if end <= state.num_sent:
            return
        packed = pack_tokens(state.tokens[state.num_sent : end])
        request_id = state.session.request_id
        self._plan.tokens.append(
            TokenUpdate(request_id, state.num_sent, packed, state.extras)
        )
        state.num_sent = end

    def _start_operation(self, state: RequestState, held: list[int]) -> OpId:
        """Hold blocks until every rank has acknowledged the returned operation."""
        if self.pool is not None:
            self.pool.hold(held)
        state.num_ops += 1
        op = OpId(next(self._ops))
        self._operations[op] = PendingOperation(state, held, self._world_size)
        return op

    # -- completion -------------------------------------------------------------------

    def acknowledge(self, acks: Mapping[OpId, int], failed: Iterable[str] = ()) -> None:
        """Count the ranks that completed each operation, and mark failed loads."""
        for request_id in failed:
            state = self._tracked.get(request_id)
            if state is not None:
                # Another lookup would find the same chunks, which cannot be loaded.
                state.load_failed = True
                state.num_stored = 0
        for op, num_ranks in acks.items():
            operation = self._operations.get(op)
            if operation is None:
                continue
            operation.num_waiting -= num_ranks
            if operation.num_waiting <= 0:
                del self._operations[op]
                self._complete(operation)

    def _complete(self, operation: PendingOperation) -> None:
        if self.pool is not None:
            self.pool.release(operation.held)
        state = operation.state
        state.num_ops -= 1
        if state.finished and not state.num_ops:
            self._end(state)

    def finish(self, request_id: str) -> None:
        """Stop tracking a request; end its session after its last operation."""
        state = self._tracked.pop(request_id, None)
        if state is None:
            return
        state.finished = True
        if not state.num_ops:
            self._end(state)

    def _end(self, state: RequestState) -> None:
        if state.num_sent:
            self._plan.ended.append(state.session.request_id)
        client = self._link.last_client
        if state.is_known and client is not None:
            try:
                client.submit_end_session(state.session)
            except KVError as error:
                self._link.record_failure(error)

    def reset(self) -> None:
        """Make all KV stored so far unreachable: the weights changed.

        From now on only this engine finds what it stores: no key names the new weights.
        A running request is neither loaded nor stored until it is preempted.
        """
        for request_id in list(self._tracked):
            self.finish(request_id)
        self._since_reset = (ExtraKey(0, b"reset" + secrets.token_bytes(16)),)

    def close(self) -> None:
        """Stop tracking all requests and close the connection."""
        self._tracked.clear()
        self._link.close()

    def _track(self, request: EngineRequest) -> RequestState | None:
        """Return a request's state; None while an earlier one of its id is ending."""
        state = self._tracked.get(request.request_id)
        if state is None:
            if self._is_ending(request.request_id):
                return None
            session = SessionKey(self._engine_id, request.request_id)
            extras = (*self._since_reset, *request.make_extras())
            state = RequestState(session, request.tokens, extras)
            self._tracked[request.request_id] = state
        return state

    def _is_ending(self, request_id: str) -> bool:
        """Return whether workers may hold tokens of a finished request of this id."""
        return request_id in self._plan.ended or any(
            operation.state.session.request_id == request_id
            for operation in self._operations.values()
        )
