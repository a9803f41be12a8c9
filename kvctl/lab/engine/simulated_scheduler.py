"""The scheduler process of a simulated engine: lookups, blocks, and tasks for ranks.

A slot is one concurrent request: a thread that executes requests one after another,
with its own connection to each rank. The load's concurrency is the number of slots,
and every call is timed where an engine waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from time import monotonic

from kvcore.errors import KVError
from kvctl.lab.config.workload_config import Documents
from kvctl.lab.engine.blend_request import BlendRequest
from kvctl.lab.engine.engine_state import EngineState
from kvctl.lab.engine.request_lifecycle import RequestLifecycle
from kvctl.lab.engine.request_pacer import Clock, PacedRequest
from kvctl.lab.process_messages import (
    EnginePlan,
    Ready,
    Start,
    Stop,
    receive,
    send,
    send_failed,
)
from kvctl.lab.run_turns import RunTurns
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.systems.system_registry import connect

PROGRESS_S = 0.5


class SimulatedScheduler(EngineState):
    """An engine's state, and the loop of its slots."""

    def __init__(
        self, plan: EnginePlan, client: Client, clock: Clock | None = None
    ) -> None:
        super().__init__(plan, client, clock)
        self._slots = count()
        self.turns: RunTurns | None = None

    def connect_interleaved_run(self) -> None:
        """Connect to the interleaved run, if there is one.

        Raises:
            SetupError, Unavailable: it does not connect.
        """
        if self.plan.turns is not None:
            self.turns = RunTurns(self.plan.turns)

    def run_slot(self, ranks: Sequence[Connection]) -> None:
        """Execute requests until there are no more; a fatal error stops every slot."""
        lifecycle = self._make_lifecycle(ranks)
        crashed = True
        try:
            while (request := self._next_request()) is not None:
                self._execute(lifecycle, request)
            crashed = False
        except (EOFError, OSError):
            self.fail(f"a rank of engine {self.plan.engine} has ended")
        except KVError as error:
            self.fail(f"engine {self.plan.engine}: {error.code}: {error.message}")
        finally:
            if crashed:  # A defect of this program: the traceback is on stderr.
                self.fail(f"engine {self.plan.engine} crashed")
            if self.turns:
                self.turns.close()
            for rank in ranks:
                rank.close()

    def _make_lifecycle(self, ranks: Sequence[Connection]) -> RequestLifecycle:
        if isinstance(self.plan.scenario.workload, Documents):
            return BlendRequest(self, ranks, next(self._slots))
        return RequestLifecycle(self, ranks)

    def _next_request(self) -> PacedRequest | None:
        if self.turns:
            self.turns.acquire()
        return self.pacer.take()

    def _execute(self, lifecycle: RequestLifecycle, request: PacedRequest) -> None:
        self.saturation.begin(request.step)
        lifecycle.execute(request)
        at_s = self.clock.now() - self.pacer.epoch_s
        if self.saturation.end(request.step, at_s):
            self.pacer.stop()
        if self.turns:
            self.statistics.end_window()
            self.turns.release()


def run(
    plan: EnginePlan, control: Connection, slots: list[tuple[Connection, ...]]
) -> None:
    """Run a scheduler's process: begin on `Start`, report at the end."""
    try:
        with connect(plan, f"bench {plan.engine_id}") as client:
            scheduler = SimulatedScheduler(plan, client)
            scheduler.connect_interleaved_run()
            send(control, Ready())
            start = receive(control)
            if isinstance(start, Start):
                _run_slots(scheduler, start.epoch_s, control, slots)
            next_index = scheduler.pacer.next_index
            send(control, scheduler.statistics.report(next_index, plan.host))
    except KVError as error:
        send_failed(control, error.message)
    except (EOFError, OSError):
        pass  # The driver has ended.


def _run_slots(
    scheduler: SimulatedScheduler,
    epoch_s: float,
    control: Connection,
    slots: list[tuple[Connection, ...]],
) -> None:
    """Run the slots to their end, and report their progress to the driver."""
    scheduler.pacer.start(epoch_s)
    threads = [
        threading.Thread(target=scheduler.run_slot, args=(slot,), daemon=True)
        for slot in slots
    ]
    finished, all_ended = Pipe(duplex=False)
    for thread in threads:
        thread.start()
    threading.Thread(
        target=_close_after, args=(threads, all_ended), daemon=True
    ).start()
    max_s = scheduler.plan.scenario.load.max_s
    deadline = None if max_s is None else epoch_s + max_s
    while finished not in (ready := wait([finished, control], timeout=PROGRESS_S)):
        if control in ready and isinstance(stop := receive(control), Stop):
            scheduler.stop()
            if stop.server_gone:
                scheduler.count_lost()
                return
        if deadline is not None and monotonic() >= deadline:
            scheduler.pacer.stop()
        if scheduler.turns is None:
            scheduler.statistics.end_window()
        send(control, scheduler.statistics.tally())


def _close_after(threads: Sequence[threading.Thread], connection: Connection) -> None:
    for thread in threads:
        thread.join()
    connection.close()
