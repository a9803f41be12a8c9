"""One rank of a simulated engine: a process with a paged cache.

For each request it retrieves the chunks that were found and checks every byte, then
writes the missing chunks, as a model would, and stores them. Bytes are generated and
checked outside the timed calls.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from time import perf_counter

import msgspec
import numpy as np

from kvcore.client import KVClient
from kvcore.errors import KVError, SetupError, Unavailable
from kvctl.lab.config.model_geometry import Indices
from kvctl.lab.config.workload_config import Documents
from kvctl.lab.latency import LatencySamples
from kvctl.lab.process_messages import (
    EnginePlan,
    MeasureCopies,
    MeasureIsolatedCalls,
    Ready,
    RegisterRepeatedly,
    RegistrationTimes,
    RequestDone,
    RunDocuments,
    RunRequest,
    Tally,
    WarmedUp,
    receive,
    send,
    send_failed,
)
from kvctl.lab.rank.byte_patterns import chunk_seeds
from kvctl.lab.rank.copy_benchmark import measure_copies
from kvctl.lab.rank.document_buffer import DocumentBuffer, RankRequest
from kvctl.lab.rank.isolated_calls import ROUNDS, IsolatedCalls
from kvctl.lab.rank.rank_cache import WARM_COPY_BYTES
from kvctl.lab.rank.registered_cache import RegisteredCache
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.systems.system_registry import connect

COPY_EVERY = 8
"""Requests per plain copy, the reference of the calls' rates."""

_task_decoder = msgspec.msgpack.Decoder(RunRequest | RunDocuments)


class SimulatedRank(RegisteredCache):
    """A rank that executes the tasks of its scheduler."""

    def __init__(self, plan: EnginePlan, rank: int, client: Client) -> None:
        ranks = plan.scenario.ranks
        self.plan = plan
        self.index = plan.engine * ranks + rank
        super().__init__(
            client,
            plan,
            plan.geometry,
            plan.scenario.cache_blocks,
            name=str(rank),
            model=plan.model,
            world_size=ranks,
            rank=rank,
            index=self.index,
        )
        self.num_executed = 0
        self.documents: DocumentBuffer | None = None
        if isinstance(plan.scenario.workload, Documents):
            if not isinstance(client, KVClient):
                raise SetupError("workload documents: only kvctl's server supports it")
            self.documents = DocumentBuffer(plan, rank, client)

    def execute(self, task: RunRequest | RunDocuments) -> RequestDone:
        """Retrieve and check, then write and store; return counts and errors."""
        if isinstance(task, RunDocuments):
            if self.documents is None:
                return RequestDone(Tally(), {})
            return self.documents.execute(task)
        request = RankRequest(self.client)
        try:
            retrieved = not task.retrieve or self._retrieve(task, request)
            start = task.hit_tokens if retrieved else 0
            if start < task.end_tokens:
                self._store(task, request, start)
        except Unavailable as error:
            return request.failed(error)
        self.num_executed += 1
        if self.num_executed % COPY_EVERY == 0:
            self._copy(request.tally)
        return request.done()

    def _retrieve(self, task: RunRequest, request: RankRequest) -> bool:
        """Retrieve and check [0, hit); return whether the blocks can be used."""
        hit = task.hit_tokens
        if not hit:
            return True
        blocks = [
            _null_outside_window(
                ids[: hit // self.block_size], hit, group.window, self.block_size
            )
            for group, ids in zip(self.cache.groups, _block_ids(task), strict=True)
        ]
        self.poison(blocks)
        arguments = (task.session, self.instance_id, 0, hit, blocks, _tokens(task))
        if request.timed("retrieve", self.client.retrieve, *arguments) is None:
            return False
        tally = request.tally
        tally.retrieve_s = request.durations["retrieve"]
        tally.retrieve_bytes = self._num_bytes(blocks)
        seeds = chunk_seeds(task.hashes)[: hit // self.chunk_size]
        tally.bytes_wrong = self.count_wrong_bytes(seeds, blocks)
        return True

    def _num_bytes(self, blocks: Sequence[Indices]) -> int:
        return sum(
            int(np.count_nonzero(ids >= 0)) * self.cache.block_bytes(group)
            for group, ids in enumerate(blocks)
        )

    def _store(self, task: RunRequest, request: RankRequest, start: int) -> None:
        end = task.end_tokens
        first, last = start // self.block_size, end // self.block_size
        seeds = chunk_seeds(task.hashes)
        seeds = seeds[start // self.chunk_size : end // self.chunk_size]
        blocks = [ids[first:last] for ids in _block_ids(task)]
        self.write(seeds, blocks)
        arguments = (task.session, self.instance_id, start, end, blocks, _tokens(task))
        reply = request.timed("store", self.client.store, *arguments)
        request.count_store(reply)
        if reply and reply.num_stored == len(seeds) * len(self.patterns):
            request.tally.store_bytes = len(seeds) * self.chunk_bytes
            request.tally.store_s = request.durations["store"]

    def _copy(self, tally: Tally) -> None:
        """Make a plain copy of as many bytes as the request moved."""
        moved = tally.retrieve_bytes or tally.store_bytes
        if not moved:
            return
        size = min(moved, WARM_COPY_BYTES, self.cache.num_bytes)
        copy = self.cache.copy_in if tally.retrieve_bytes else self.cache.copy_out
        begun = perf_counter()
        copy(self.num_executed, size)
        tally.copy_s = perf_counter() - begun
        tally.copy_bytes = size

    def register_repeatedly(self, rounds: int) -> RegistrationTimes:
        """Unregister and register `rounds` times, concurrently with other ranks."""
        durations = {"register": array("d"), "unregister": array("d")}
        for _ in range(rounds):
            begun = perf_counter()
            self.client.unregister_kv_cache(self.instance_id)
            unregistered = perf_counter()
            self.register()
            durations["unregister"].append(unregistered - begun)
            durations["register"].append(perf_counter() - unregistered)
        return RegistrationTimes(LatencySamples.pack(durations))

    def close(self) -> None:
        """Unregister and release the cache and the buffer of documents."""
        if self.documents is not None:
            self.documents.close()
        super().close()


def _block_ids(task: RunRequest) -> list[Indices]:
    return [np.frombuffer(packed, np.int32) for packed in task.blocks]


def _tokens(task: RunRequest) -> np.typing.NDArray[np.uint32] | None:
    return np.frombuffer(task.tokens, np.uint32) if task.tokens else None


def _null_outside_window(
    ids: Indices, num_tokens: int, window: int | None, block_size: int
) -> Indices:
    """Return the ids, with -1 for blocks that no token after `num_tokens` needs."""
    if window is None or num_tokens < window:
        return ids
    ids = ids.copy()
    ids[: (num_tokens - window + 1) // block_size] = -1
    return ids


def run(
    plan: EnginePlan, control: Connection, rank: int, slots: list[Connection]
) -> None:
    """Run a rank's process until the driver closes `control`."""
    try:
        with connect(plan, f"bench {plan.engine_id}/{rank}") as client:
            simulated = SimulatedRank(plan, rank, client)
            try:
                send(control, Ready(simulated.chunk_bytes))
                _serve(simulated, control, slots)
            finally:
                simulated.close()
    except KVError as error:
        send_failed(control, error.message)
    except (OSError, EOFError):
        pass  # The driver or the scheduler has ended.


def _await_other_ranks(control: Connection) -> None:
    """Report that the warm-up is done; return when all ranks have reported it."""
    send(control, WarmedUp())
    receive(control)


def _serve(rank: SimulatedRank, control: Connection, slots: list[Connection]) -> None:
    """Execute the tasks of slots and of the driver, until the driver disconnects."""
    sources: list[Connection] = [control, *slots]
    while True:
        for source in wait(sources):
            if source is control:
                try:
                    _execute_control(rank, control)
                except EOFError:
                    return
                continue
            slot = next(slot for slot in slots if slot is source)
            try:
                task = _task_decoder.decode(slot.recv_bytes())
            except EOFError:
                sources.remove(slot)
                continue
            send(slot, rank.execute(task))


def _execute_control(rank: SimulatedRank, control: Connection) -> None:
    match receive(control):
        case MeasureIsolatedCalls(max_bytes, seed):
            num_chunks = max(1, max_bytes // rank.chunk_bytes)
            calls = IsolatedCalls(rank, num_chunks, seed)
            send(control, calls.measure(ROUNDS))
        case MeasureCopies(setting, seed):
            begin = partial(_await_other_ranks, control)
            times = measure_copies(
                rank.client, rank.plan, rank.index, setting, seed, begin
            )
            send(control, times)
        case RegisterRepeatedly(rounds):
            send(control, rank.register_repeatedly(rounds))
