"""The scheduler of a played engine: it looks up, hands out blocks, and tells ranks.

A slot is one request under way: a thread that plays one access after another, with a
connection of its own to each rank. So the load's concurrency is its number of slots,
and every call is timed where an engine would wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from time import monotonic

from kvcore.errors import KVError
from kvcore.keys import chain_seed
from kvctl.lab.engine.batch_clock import BatchClock
from kvctl.lab.engine.blend_request import BlendRequest
from kvctl.lab.engine.block_pool import BlockPool
from kvctl.lab.engine.continuous_batch import ContinuousBatch
from kvctl.lab.engine.engine_statistics import EngineStatistics
from kvctl.lab.engine.request_lifecycle import RequestLifecycle
from kvctl.lab.engine.request_pacer import Clock, PacedRequest, RequestPacer
from kvctl.lab.engine.saturation import SaturationDetector
from kvctl.lab.interleaving import Interleaving
from kvctl.lab.process_messages import (
    EnginePlan,
    Ready,
    Start,
    Stop,
    Tally,
    receive,
    send,
    send_failed,
)
from kvctl.lab.rank.rank_cache import Indices
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.systems.system_registry import connect
from kvctl.lab.workload.access_generators import accesses
from kvctl.lab.workload.arrivals import Due, schedule
from kvctl.lab.workload.workload_config import Documents

PROGRESS_S = 0.5
TURN_REQUESTS = 1


class SimulatedScheduler:
    """What the slots of an engine share."""

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
        self.score = EngineStatistics()
        self.pacer = RequestPacer(
            share(plan),
            warmup_requests=scenario.load.warmup_requests,
            warmup_s=scenario.load.warmup_s,
            clock=self.clock,
        )
        self.stepper = self._make_stepper()
        self.sweep = SaturationDetector(scenario.load)
        self.failure: str | None = None
        self._slots = count()
        self.turns: Interleaving | None = None
        self._chunk_blocks = self.chunk_size // geometry.block_size

    def _make_stepper(self) -> BatchClock | None:
        scenario = self.plan.scenario
        model = scenario.engine
        if model is None:
            return None
        num_blocks = model.max_blocks or scenario.cache_blocks
        batch = ContinuousBatch(model, num_blocks, self.plan.geometry.block_size)
        return BatchClock(batch, self.clock)

    @property
    def overlap_stores(self) -> bool:
        """A session's next request may begin while a store is under way."""
        model = self.plan.scenario.engine
        return model is not None and model.overlap_stores

    def allocate(self, num_chunks: int) -> Indices:
        """Take the blocks of so many chunks, waiting until they are free."""
        return self.pool.allocate(num_chunks * self._chunk_blocks)

    def run_slot(self, ranks: Sequence[Connection]) -> None:
        """Play until there is no more to play; a fatal error stops every slot."""
        player = self._make_player(ranks)
        crashed = True
        try:
            while (taken := self._take()) is not None:
                self.sweep.begin(taken.step)
                player.play(taken)
                if self.sweep.end(taken.step, self.clock.now() - self.pacer.epoch_s):
                    self.pacer.stop()
                if self.turns:
                    self.turns.done()
            crashed = False
        except (EOFError, OSError):
            self._fail(f"a rank of engine {self.plan.engine} is gone")
        except KVError as error:
            self._fail(f"engine {self.plan.engine}: {error.code}: {error.message}")
        finally:
            if crashed:  # A defect of ours: the thread's trace is on stderr.
                self._fail(f"engine {self.plan.engine} crashed")
            if self.turns:
                self.turns.close()
            for rank in ranks:
                rank.close()

    def _make_player(self, ranks: Sequence[Connection]) -> RequestLifecycle:
        if isinstance(self.plan.scenario.workload, Documents):
            return BlendRequest(self, ranks, next(self._slots))
        return RequestLifecycle(self, ranks)

    def _take(self) -> PacedRequest | None:
        if self.turns:
            self.turns.take()
        return self.pacer.take()

    def meet(self) -> None:
        """Meet the engine that this one takes turns with, if it does.

        Raises:
            SetupError, Unavailable: there is none.
        """
        if self.plan.turns is not None:
            self.turns = Interleaving(
                self.plan.turns, TURN_REQUESTS, self.score.end_window
            )

    def tell_error(self, message: str, taken: PacedRequest) -> None:
        """Count an error of one request."""
        self.score.add(Tally(), {}, errors=(message,), warm_up=taken.warm_up)

    def stop(self) -> None:
        """Begin no more requests; those that compute end at once."""
        self.pacer.stop()
        if self.stepper is not None:
            self.stepper.stop()

    def tell_lost(self) -> None:
        """Count each request under way as an error: the server is gone."""
        lost = f"engine {self.plan.engine}: under way when the server went"
        self.score.add(Tally(), {}, errors=(lost,) * self.pacer.num_under_way)

    def _fail(self, message: str) -> None:
        """Stop every slot; the first reason is told, the others follow from it."""
        self.stop()
        if self.failure is None:
            self.failure = message
            self.score.add(Tally(), {}, errors=(message,))


def share(plan: EnginePlan) -> Iterator[Due]:
    """Iterate this engine's part of the workload, and when it is due."""
    scenario = plan.scenario
    everything = accesses(scenario.workload, plan.seed)
    for due in schedule(scenario.load, everything, plan.seed):
        ours = due.access.affinity % scenario.engines == plan.place
        if ours and due.index >= plan.first_index:
            yield due


def run(
    plan: EnginePlan, control: Connection, slots: list[tuple[Connection, ...]]
) -> None:
    """Be an engine's scheduler: play when told to, report at the end."""
    label = f"bench {plan.engine_id}"
    try:
        with connect(plan, label) as client:
            engine = SimulatedScheduler(plan, client)
            engine.meet()
            send(control, Ready())
            start = receive(control)
            if isinstance(start, Start):
                _play_all(engine, start.epoch_s, control, slots)
            send(control, engine.score.report(engine.pacer.next_index, plan.host))
    except KVError as error:
        send_failed(control, error.message)
    except (EOFError, OSError):
        pass  # The driver is gone: nobody is left to tell.


def _play_all(
    engine: SimulatedScheduler,
    epoch_s: float,
    control: Connection,
    slots: list[tuple[Connection, ...]],
) -> None:
    """Run the slots, telling the driver how far they are."""
    engine.pacer.start(epoch_s)
    threads = [
        threading.Thread(target=engine.run_slot, args=(slot,), daemon=True)
        for slot in slots
    ]
    finished, last_one = Pipe(duplex=False)
    for thread in threads:
        thread.start()
    threading.Thread(target=_announce, args=(threads, last_one), daemon=True).start()
    max_s = engine.plan.scenario.load.max_s
    deadline = None if max_s is None else epoch_s + max_s
    while finished not in (ready := wait([finished, control], timeout=PROGRESS_S)):
        if control in ready and isinstance(stop := receive(control), Stop):
            engine.stop()
            if stop.server_gone:
                engine.tell_lost()
                return
        if deadline is not None and monotonic() >= deadline:
            engine.pacer.stop()
        if engine.turns is None:
            engine.score.end_window()
        send(control, engine.score.tally())


def _announce(threads: Sequence[threading.Thread], last_one: Connection) -> None:
    for thread in threads:
        thread.join()
    last_one.close()
