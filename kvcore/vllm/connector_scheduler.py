"""The scheduler half: what to look up, load and store, and for how long to hold blocks.

It lives in the engine's scheduler and waits for nothing: lookups are futures that are
polled, everything else is told to the worker halves by way of a `StepPlan`. Blocks that
a worker may still read or write are held, one reference each, until every rank has
acknowledged; only then may the engine reuse them, whatever it did with the request in
between (finished it, preempted it, moved its window on).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from time import monotonic

from kvcore.errors import KVError
from kvcore.keys import ExtraKey, SessionKey, pack_tokens
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.request_state import (
    BlockPool,
    EngineRequest,
    GroupShape,
    Match,
    PendingOperation,
    RequestState,
    Scheduled,
)
from kvcore.vllm.server_link import ServerLink, ignore
from kvcore.vllm.step_metadata import (
    GroupBlocks,
    LoadOp,
    OpId,
    StepPlan,
    StoreOp,
    TokenPiece,
    pack_blocks,
    real_blocks,
)

LOOKUP_VALID_S = 20.0
"""An answer that the engine has not used by then is asked for again: the lease on
what was found may have expired."""


class ConnectorScheduler:
    """One engine's. Its methods are called by the engine's scheduler thread alone."""

    def __init__(
        self,
        link: ServerLink,
        config: ConnectorConfig,
        *,
        engine_id: str,
        model: str,
        world_size: int,
        groups: Sequence[GroupShape],
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
        self._flights: dict[OpId, PendingOperation] = {}
        self._ops = count(1)
        self._loads: list[LoadOp] = []
        self._pieces: list[TokenPiece] = []
        self._ended: list[str] = []
        self._since_reset: tuple[ExtraKey, ...] = ()

    def __repr__(self) -> str:
        return f"<SchedulerHalf {len(self._tracked)} requests, {self.num_ops} ops>"

    @property
    def num_ops(self) -> int:
        """Loads and stores under way: the engine needs to go on stepping."""
        return len(self._flights)

    # -- finding and loading ----------------------------------------------------------

    def matched(self, request: EngineRequest, num_computed: int) -> int | None:
        """Say how many tokens after the first `num_computed` can be loaded.

        None while that is not known: ask again.
        """
        tracked = self._track(request)
        if tracked is None or tracked.load_failed:
            return 0
        match = tracked.match
        if match is not None and match.is_over(LOOKUP_VALID_S):
            match = None
        if match is None:
            match = tracked.match = self._look_up(tracked, num_computed)
        if match is None:
            return 0
        if not match.future.done():
            return None
        if not match.is_judged:
            # Once: an error that is told of again makes a server that is well ill.
            match.is_judged = True
            match.hit = self._hit(tracked, match)
        return max(match.hit - num_computed, 0)

    def allocated(
        self, request_id: str, blocks: tuple[list[int], ...], num_external: int
    ) -> None:
        """Load the matched tokens into these blocks, or let go of what was found."""
        tracked = self._tracked.get(request_id)
        if tracked is None or tracked.match is None:
            return
        match, tracked.match = tracked.match, None
        tracked.num_stored = match.hit
        if num_external > 0:
            self._order_load(tracked, match, match.hit - num_external, blocks)
        else:
            self._free(tracked, 0, match.hit)

    def _order_load(
        self,
        tracked: RequestState,
        match: Match,
        computed: int,
        blocks: tuple[list[int], ...],
    ) -> None:
        start = computed - computed % match.chunk_size
        self._free(tracked, 0, start)
        packed = tuple(
            pack_blocks(
                ids[start // group.block_size : -(-match.hit // group.block_size)]
            )
            for group, ids in zip(self._groups, blocks, strict=True)
        )
        self._tell_tokens(tracked, match.hit)
        load = LoadOp(
            op=OpId(next(self._ops)),
            request_id=tracked.session.request_id,
            start=start,
            end=match.hit,
            skip=computed - start,
            blocks=packed,
        )
        self._loads.append(load)
        # The engine itself keeps the blocks of a load until every rank has ended it.
        self._take_off(load.op, tracked, [])

    def _look_up(self, tracked: RequestState, num_computed: int) -> Match | None:
        server = self._link.server
        num_tokens = len(tracked.tokens)
        if server is None:
            return None
        chunk_size = server.chunk_size
        if num_tokens - num_tokens % chunk_size <= num_computed:
            return None
        tracked.is_known = True
        try:
            future = server.client.submit_lookup(
                tracked.session,
                self._model,
                self._world_size,
                tracked.tokens[:],
                known=tracked.num_looked_up,
                extras=tracked.extras,
                timeout_s=self._config.lookup_timeout_s,
            )
        except KVError as error:
            self._link.failed(error)
            return None
        return Match(future, monotonic(), num_tokens, chunk_size)

    def _hit(self, tracked: RequestState, match: Match) -> int:
        error = match.future.exception()
        if error is not None:
            self._link.failed(error)
            tracked.num_looked_up = 0
            return 0
        self._link.worked()
        tracked.num_looked_up = match.num_tokens
        return match.future.result().num_tokens

    def _free(self, tracked: RequestState, start: int, end: int) -> None:
        client = self._link.last_client
        if client is not None and end > start:
            freed = client.submit_free_lookup_locks(tracked.session, start, end)
            freed.add_done_callback(ignore)

    # -- each step --------------------------------------------------------------------

    def step(self, scheduled: Iterable[Scheduled]) -> StepPlan:
        """Plan what this step loads, and stores when it has been computed."""
        server = self._link.server
        stores = []
        for one in scheduled:
            tracked = self._tracked.get(one.request_id)
            if tracked is None:
                continue
            tracked.take_blocks(one)
            store = self._store(tracked, one, server.chunk_size) if server else None
            if store is not None:
                stores.append(store)
        plan = StepPlan(
            tuple(self._pieces), tuple(self._loads), tuple(stores), tuple(self._ended)
        )
        self._pieces.clear()
        self._loads.clear()
        self._ended.clear()
        return plan

    def _store(
        self, tracked: RequestState, one: Scheduled, chunk_size: int
    ) -> StoreOp | None:
        # Draft tokens, and those that the engine has not seen yet, are not stored.
        end = min(one.num_computed + one.num_new, len(tracked.tokens))
        end -= end % chunk_size
        # A replaced server may cut chunks otherwise than the one before it.
        start = tracked.num_stored - tracked.num_stored % chunk_size
        if end <= start:
            return None
        tracked.num_stored = end
        tracked.is_known = True
        self._tell_tokens(tracked, end)
        packed = self._blocks_of(tracked, one.num_computed, start, end)
        store = StoreOp(
            OpId(next(self._ops)), tracked.session.request_id, start, end, packed
        )
        self._take_off(store.op, tracked, real_blocks(packed))
        return store

    def _blocks_of(
        self, tracked: RequestState, num_computed: int, start: int, end: int
    ) -> GroupBlocks:
        """Pack the blocks of [start, end); what windows have left behind is gone."""
        packed = []
        for group, ids in zip(self._groups, tracked.blocks, strict=True):
            first, last = start // group.block_size, -(-end // group.block_size)
            num_gone = max(group.num_gone(num_computed) - first, 0)
            packed.append(pack_blocks(ids[first:last], num_gone))
        return tuple(packed)

    def _tell_tokens(self, tracked: RequestState, end: int) -> None:
        if end <= tracked.num_told:
            return
        packed = pack_tokens(tracked.tokens[tracked.num_told : end])
        request_id = tracked.session.request_id
        self._pieces.append(
            TokenPiece(request_id, tracked.num_told, packed, tracked.extras)
        )
        tracked.num_told = end

    def _take_off(self, op: OpId, tracked: RequestState, held: list[int]) -> None:
        if self.pool is not None:
            self.pool.hold(held)
        tracked.num_ops += 1
        self._flights[op] = PendingOperation(tracked, held, self._world_size)

    # -- ends -------------------------------------------------------------------------

    def acknowledged(
        self, acks: Mapping[OpId, int], failed: Iterable[str] = ()
    ) -> None:
        """Take in how many ranks have done each op, and whose loads failed."""
        for request_id in failed:
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                # Asking again would only find what cannot be loaded.
                tracked.load_failed = True
                tracked.num_stored = 0
        for op, num_ranks in acks.items():
            flight = self._flights.get(op)
            if flight is None:
                continue
            flight.num_waiting -= num_ranks
            if flight.num_waiting <= 0:
                del self._flights[op]
                self._land(flight)

    def _land(self, flight: PendingOperation) -> None:
        if self.pool is not None:
            self.pool.release(flight.held)
        tracked = flight.tracked
        tracked.num_ops -= 1
        if tracked.finished and not tracked.num_ops:
            self._end(tracked)

    def finished(self, request_id: str) -> None:
        """Forget a request once nothing of it is under way, and end its session."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return
        tracked.finished = True
        if not tracked.num_ops:
            self._end(tracked)

    def _end(self, tracked: RequestState) -> None:
        if tracked.num_told:
            self._ended.append(tracked.session.request_id)
        client = self._link.last_client
        if tracked.is_known and client is not None:
            try:
                client.submit_end_session(tracked.session).add_done_callback(ignore)
            except KVError as error:
                self._link.failed(error)

    def reset(self) -> None:
        """Find nothing any more of what has been stored, by whomever: weights changed.

        What is stored from now on is found by this engine alone, since nothing else
        names its weights. A request under way is left alone until it is preempted.
        """
        for request_id in list(self._tracked):
            self.finished(request_id)
        self._since_reset = (ExtraKey(0, b"reset" + secrets.token_bytes(16)),)

    def close(self) -> None:
        """End what is tracked and say goodbye."""
        self._tracked.clear()
        self._link.close()

    def _track(self, request: EngineRequest) -> RequestState | None:
        """Return what is known of a request; None while one of its name is ending."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            if self._is_ending(request.request_id):
                return None
            session = SessionKey(self._engine_id, request.request_id)
            extras = (*self._since_reset, *request.extras)
            tracked = RequestState(session, request.tokens, extras)
            self._tracked[request.request_id] = tracked
        return tracked

    def _is_ending(self, request_id: str) -> bool:
        """Say whether the workers still have a finished request's tokens."""
        return request_id in self._ended or any(
            flight.tracked.session.request_id == request_id
            for flight in self._flights.values()
        )
