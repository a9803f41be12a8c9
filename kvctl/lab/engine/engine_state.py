"""State shared by the slots of a simulated engine."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kvcore.errors import SetupError
from kvcore.keys import chain_seed
from kvctl.lab.config.arrival_config import Load, Sweep
from kvctl.lab.config.model_geometry import Indices
from kvctl.lab.engine.continuous_batch import BatchClock, ContinuousBatch
from kvctl.lab.engine.engine_statistics import EngineStatistics
from kvctl.lab.engine.request_pacer import Clock, PacedRequest, RequestPacer
from kvctl.lab.process_messages import EnginePlan, Tally
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.workload.access_generators import accesses
from kvctl.lab.workload.arrivals import Due, schedule

GRACE = 0.1
"""Of a sweep step's length, for its last requests to end."""


class BlockPool:
    """Allocates block ids, which are the same on every rank of an engine. Thread-safe.

    The pool starts shuffled, like that of an engine after some hours: the blocks of a
    request are scattered, and copies cannot be coalesced more than in production.
    """

    def __init__(self, num_blocks: int, num_groups: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.num_blocks = num_blocks
        self._free: Indices = rng.permutation(num_blocks).astype(np.int32)
        self._num_free = num_blocks
        self._changed = threading.Condition()
        self._ids_by_group = [
            rng.permutation(num_blocks).astype(np.int32) for _ in range(num_groups)
        ]

    def allocate(self, num_blocks: int) -> Indices:
        """Return free blocks `[num_blocks]`; wait until there are enough.

        Raises:
            SetupError: the cache has fewer blocks.
        """
        if num_blocks > self.num_blocks:
            raise SetupError(
                f"a request needs {num_blocks} blocks, the cache has "
                f"{self.num_blocks}: raise cache_blocks"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._num_free >= num_blocks)
            self._num_free -= num_blocks
            return self._free[self._num_free : self._num_free + num_blocks].copy()

    def free(self, blocks: Indices) -> None:
        """Free blocks."""
        with self._changed:
            self._free[self._num_free : self._num_free + blocks.size] = blocks
            self._num_free += blocks.size
            self._changed.notify_all()

    def ids_by_group(self, blocks: Indices) -> tuple[Indices, ...]:
        """Return the blocks' ids in each cache group, which differ between groups."""
        return tuple(ids[blocks] for ids in self._ids_by_group)


@dataclass(slots=True)
class SaturationDetector:
    """Counts how many requests of each sweep step end in time. Thread-safe."""

    load: Load
    _begun: Counter[int] = field(default_factory=Counter)
    """Requests by step."""
    _in_time: Counter[int] = field(default_factory=Counter)
    """Requests that ended before the end of their step plus its grace period."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, step: int) -> None:
        """Count a request that begins."""
        if isinstance(self.load, Sweep):
            with self._lock:
                self._begun[step] += 1

    def end(self, step: int, at_s: float) -> bool:
        """Count a request that ends at a time of the load; return whether to stop.

        The first request that ends after a step's grace period decides on the step.
        """
        if not isinstance(self.load, Sweep):
            return False
        step_s, grace_s = self.load.step_s, self.load.step_s * GRACE
        with self._lock:
            if at_s <= (step + 1) * step_s + grace_s:
                self._in_time[step] += 1
            ended = int((at_s - grace_s) // step_s) - 1
            return self._in_time[ended] < self.load.kept_up * self._begun[ended]


class EngineState:
    """Client, block pool, pacer, batch and statistics of one engine."""

    def __init__(
        self, plan: EnginePlan, client: Client, clock: Clock | None = None
    ) -> None:
        geometry, scenario = plan.geometry, plan.scenario
        self.plan = plan
        self.client = client
        self.clock = clock or Clock()
        self.chunk_size = client.chunk_size
        self.seed = chain_seed("prefix", plan.model, scenario.ranks, self.chunk_size)
        num_groups = len(geometry.groups(1, 0, scenario.ranks).groups)
        self.pool = BlockPool(
            scenario.cache_blocks, num_groups, plan.seed + plan.engine
        )
        self.statistics = EngineStatistics()
        self.pacer = RequestPacer(
            own_requests(plan),
            warmup_requests=scenario.load.warmup_requests,
            warmup_s=scenario.load.warmup_s,
            clock=self.clock,
        )
        self.batch_clock: BatchClock | None = None
        if (model := scenario.engine) is not None:
            num_blocks = model.max_blocks or scenario.cache_blocks
            batch = ContinuousBatch(model, num_blocks, geometry.block_size)
            self.batch_clock = BatchClock(batch, self.clock)
        self.saturation = SaturationDetector(scenario.load)
        self.failure: str | None = None
        self._chunk_blocks = self.chunk_size // geometry.block_size

    def allocate(self, num_chunks: int) -> Indices:
        """Return the blocks of `num_chunks` chunks; wait until they are free."""
        return self.pool.allocate(num_chunks * self._chunk_blocks)

    def count_error(self, message: str, request: PacedRequest) -> None:
        """Count an error of one request."""
        self.statistics.add(Tally(), {}, errors=(message,), warm_up=request.warm_up)

    def count_lost(self) -> None:
        """Count each request in progress as an error: the server has ended."""
        message = f"engine {self.plan.engine}: in progress when the server ended"
        errors = (message,) * self.pacer.num_in_progress
        self.statistics.add(Tally(), {}, errors=errors)

    def stop(self) -> None:
        """Begin no more requests, and end waits for the batch."""
        self.pacer.stop()
        if self.batch_clock is not None:
            self.batch_clock.stop()

    def fail(self, message: str) -> None:
        """Stop every slot. Only the first failure counts: others follow from it."""
        self.stop()
        if self.failure is None:
            self.failure = message
            self.statistics.add(Tally(), {}, errors=(message,))


def own_requests(plan: EnginePlan) -> Iterator[Due]:
    """Yield the engine's requests of the workload with their arrival times."""
    scenario = plan.scenario
    workload = accesses(scenario.workload, plan.seed)
    for due in schedule(scenario.load, workload, plan.seed):
        own = due.access.affinity % scenario.engines == plan.place
        if own and due.index >= plan.first_index:
            yield due
