"""One rank of a played engine: a process with a paged cache of its own.

It obeys its scheduler: it retrieves what was found and checks every byte, then writes
what was not, as a model would, and stores it. Bytes are made and checked outside the
timed calls.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from time import perf_counter

import msgspec
import numpy as np

from kvcore.client import KVClient
from kvcore.errors import KVError, SetupError, Unavailable
from kvcore.keys import SessionKey, Tokens
from kvcore.protocol import RegisterKVCache
from kvctl.lab.latency_samples import LatencySamples
from kvctl.lab.process_messages import (
    EnginePlan,
    MeasureAlone,
    MeasureCopies,
    MeasuredCopies,
    Ready,
    RequestDone,
    RunDocuments,
    RunRequest,
    Storm,
    StormDone,
    Tally,
    Warm,
    receive,
    send,
    send_failed,
)
from kvctl.lab.rank.byte_patterns import chunk_seeds
from kvctl.lab.rank.cache_factory import make_cache, register
from kvctl.lab.rank.copy_benchmark import measure_copies
from kvctl.lab.rank.document_buffer import DocumentBuffer
from kvctl.lab.rank.isolated_calls import CallerIdentity, measure_alone
from kvctl.lab.rank.rank_cache import WARM_COPY_BYTES, Indices, RankCacheMemory, Seeds
from kvctl.lab.systems.system_interface import Client, taken_s
from kvctl.lab.systems.system_registry import connect
from kvctl.lab.workload.workload_config import Documents

SEGMENT_PREFIX = "kvlab-"
"""Of the shared memory of every played cache."""

COPY_EVERY = 8
"""Requests to a plain copy, which the calls are held against."""

_plays = msgspec.msgpack.Decoder(RunRequest | RunDocuments)


@dataclass(slots=True)
class _RankStep:
    """One request on its way through a rank."""

    session: SessionKey
    seeds: Seeds
    blocks: list[Indices]
    tokens: Tokens | None = None
    tally: Tally = field(default_factory=Tally)
    durations: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class SimulatedRank:
    """A registered cache, and the pattern that it is filled and checked with."""

    def __init__(self, plan: EnginePlan, rank: int, client: Client) -> None:
        geometry, ranks = plan.geometry, plan.scenario.ranks
        place = plan.engine * ranks + rank
        self.client = client
        self.chunk_size = client.chunk_size
        self.block_size = geometry.block_size
        self.engine_id = plan.engine_id
        self.model, self.world_size = plan.model, ranks
        self.instance_id = f"{plan.engine_id}/{rank}"
        self.cache: RankCacheMemory = make_cache(
            plan.scenario.device,
            f"{SEGMENT_PREFIX}{plan.engine_id}-{rank}",
            geometry.groups(plan.scenario.cache_blocks, rank, ranks),
            place,
        )
        self._plan, self._place = plan, place
        self.num_played = 0
        chunk_blocks = self.chunk_size // self.block_size
        self.patterns = [
            self.cache.pattern(number, None if group.replicated else rank, chunk_blocks)
            for number, group in enumerate(self.cache.groups)
        ]
        self.documents: DocumentBuffer | None = None
        self._registration = RegisterKVCache(
            instance_id=self.instance_id,
            engine_id=plan.engine_id,
            model=plan.model,
            world_size=ranks,
            rank=rank,
            handles=self.cache.handles,
            groups=self.cache.groups,
        )
        self.chunk_bytes = register(client, self._registration, self.cache).chunk_bytes
        if isinstance(plan.scenario.workload, Documents):
            if not isinstance(client, KVClient):
                raise SetupError("documents: only our own system plays them")
            name = f"{SEGMENT_PREFIX}{plan.engine_id}-{rank}-documents"
            self.documents = DocumentBuffer(name, plan, rank, client)

    def seat(self) -> CallerIdentity:
        """Return what calls outside of the load are made with."""
        return CallerIdentity(
            self.client,
            self.cache,
            self.patterns,
            self.model,
            self.world_size,
            self.engine_id,
            self.instance_id,
            self.chunk_bytes,
            self.block_size,
        )

    def play_copies(
        self, task: MeasureCopies, begin: Callable[[], None]
    ) -> MeasuredCopies:
        """Make calls in a cache of another model."""
        return measure_copies(self.client, self._plan, self._place, task, begin)

    def play(self, task: RunRequest | RunDocuments) -> RequestDone:
        """Retrieve and check, then write and store; errors are told, not raised."""
        if isinstance(task, RunDocuments):
            return (
                self.documents.play(task)
                if self.documents
                else RequestDone(Tally(), {})
            )
        blocks = [np.frombuffer(packed, np.int32) for packed in task.blocks]
        tokens = np.frombuffer(task.tokens, np.uint32) if task.tokens else None
        turn = _RankStep(task.session, chunk_seeds(task.hashes), blocks, tokens)
        try:
            loaded = not task.retrieve or self._retrieve(turn, task.hit_tokens)
            have = task.hit_tokens if loaded else 0
            if have < task.end_tokens:
                self._store(turn, have, task.end_tokens)
        except Unavailable as error:
            return RequestDone(
                turn.tally, turn.durations, (), unavailable=error.message
            )
        self.num_played += 1
        if self.num_played % COPY_EVERY == 0:
            self._copy(turn.tally)
        return RequestDone(turn.tally, turn.durations, tuple(turn.errors))

    def _retrieve(self, turn: _RankStep, hit: int) -> bool:
        """Load and check [0, hit); say whether the blocks can be used."""
        if not hit:
            return True
        blocks = [
            _in_window(
                ids[: hit // self.block_size], hit, group.window, self.block_size
            )
            for group, ids in zip(self.cache.groups, turn.blocks, strict=True)
        ]
        for number, ids in enumerate(blocks):
            self.cache.poison(number, ids)
        retrieve = self.client.retrieve
        where = (turn.session, self.instance_id, 0, hit, blocks, turn.tokens)
        call = partial(retrieve, *where)
        begun = perf_counter()
        try:
            call()
        except Unavailable:
            raise
        except KVError as error:
            turn.errors.append(f"retrieve: {error.code}: {error.message}")
            return False
        took = taken_s(self.client, perf_counter() - begun)
        turn.tally.retrieve_s = turn.durations["retrieve"] = took
        turn.tally.retrieve_bytes = self._num_bytes(blocks)
        turn.tally.bytes_wrong = self._count_wrong_bytes(turn, hit, blocks)
        return True

    def _num_bytes(self, blocks: Sequence[Indices]) -> int:
        return sum(
            int(np.count_nonzero(ids >= 0)) * self.cache.block_bytes(group)
            for group, ids in enumerate(blocks)
        )

    def _count_wrong_bytes(
        self, turn: _RankStep, hit: int, blocks: Sequence[Indices]
    ) -> int:
        seeds = turn.seeds[: hit // self.chunk_size]
        return sum(
            pattern.count_wrong_bytes(seeds, ids)
            for pattern, ids in zip(self.patterns, blocks, strict=True)
        )

    def _store(self, turn: _RankStep, start: int, end: int) -> None:
        first, last = start // self.block_size, end // self.block_size
        seeds = turn.seeds[start // self.chunk_size : end // self.chunk_size]
        blocks = [ids[first:last] for ids in turn.blocks]
        for pattern, ids in zip(self.patterns, blocks, strict=True):
            pattern.write(seeds, ids)
        begun = perf_counter()
        try:
            reply = self.client.store(
                turn.session, self.instance_id, start, end, blocks, turn.tokens
            )
        except Unavailable:
            raise
        except KVError as error:
            turn.errors.append(f"store: {error.code}: {error.message}")
            return
        took = taken_s(self.client, perf_counter() - begun)
        turn.durations["store"] = took
        tally = turn.tally
        tally.parts_stored = reply.num_stored
        tally.parts_present = reply.num_present
        tally.parts_dropped = reply.num_dropped
        if reply.num_stored == len(seeds) * len(self.patterns):
            tally.store_bytes = len(seeds) * self.chunk_bytes
            tally.store_s = took

    def _copy(self, tally: Tally) -> None:
        """Copy as many bytes as this request moved, from anywhere in the cache."""
        moved = tally.retrieve_bytes or tally.store_bytes
        if not moved:
            return
        size = min(moved, WARM_COPY_BYTES, self.cache.num_bytes)
        copy = self.cache.copy_in if tally.retrieve_bytes else self.cache.copy_out
        begun = perf_counter()
        copy(self.num_played, size)
        tally.copy_s = perf_counter() - begun
        tally.copy_bytes = size

    def storm(self, rounds: int) -> StormDone:
        """Unregister and register again and again, beside all others."""
        durations = {"register": array("d"), "unregister": array("d")}
        for _ in range(rounds):
            begun = perf_counter()
            self.client.unregister_kv_cache(self.instance_id)
            gone = perf_counter()
            register(self.client, self._registration, self.cache)
            durations["unregister"].append(gone - begun)
            durations["register"].append(perf_counter() - gone)
        return StormDone(LatencySamples.pack(durations))

    def close(self) -> None:
        """Unregister and let go of the cache."""
        if self.documents is not None:
            self.documents.close()
        with suppress(KVError):  # Where the server is gone, so is the registration.
            _ = self.client.server
            self.client.unregister_kv_cache(self.instance_id)
        self.patterns.clear()
        self.cache.close()


def _in_window(
    ids: Indices, num_tokens: int, window: int | None, block_size: int
) -> Indices:
    """Null the blocks that no token after `num_tokens` attends to."""
    if window is None or num_tokens < window:
        return ids
    ids = ids.copy()
    ids[: (num_tokens - window + 1) // block_size] = -1
    return ids


def run(
    plan: EnginePlan, control: Connection, rank: int, slots: list[Connection]
) -> None:
    """Be a rank until the driver lets go of it, or is gone."""
    try:
        with connect(plan, f"bench {plan.engine_id}/{rank}") as client:
            played = SimulatedRank(plan, rank, client)
            try:
                send(control, Ready(played.chunk_bytes))
                _obey(played, control, slots)
            finally:
                played.close()
    except KVError as error:
        send_failed(control, error.message)
    except (OSError, EOFError):
        pass  # The driver or the scheduler is gone: nobody is left to tell.


def _wait_for_others(control: Connection) -> None:
    """Say that the first calls are made; return when all ranks have."""
    send(control, Warm())
    receive(control)


def _obey(played: SimulatedRank, control: Connection, slots: list[Connection]) -> None:
    """Play what slots ask, and alone when the driver asks, until it lets go."""
    waiting: list[Connection] = [control, *slots]
    while True:
        for source in wait(waiting):
            if source is control:
                try:
                    task = receive(control)
                except EOFError:
                    return
                if isinstance(task, MeasureAlone):
                    send(control, measure_alone(played.seat(), task))
                elif isinstance(task, MeasureCopies):
                    begin = partial(_wait_for_others, control)
                    send(control, played.play_copies(task, begin))
                elif isinstance(task, Storm):
                    send(control, played.storm(task.rounds))
                continue
            slot = next(slot for slot in slots if slot is source)
            try:
                play = _plays.decode(slot.recv_bytes())
            except EOFError:
                waiting.remove(slot)
                continue
            send(slot, played.play(play))
