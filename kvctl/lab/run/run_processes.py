"""The processes of a run's engines, and the connections between them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import msgspec

from kvcore.shm import remove_dead
from kvctl.lab.engine import simulated_scheduler as scheduler
from kvctl.lab.process_messages import EnginePlan, send
from kvctl.lab.rank import simulated_rank
from kvctl.lab.rank.rank_cache import SEGMENT_PREFIX

STOP_S = 5.0
"""Timeout for the end of a process after its driver has disconnected."""


@dataclass(slots=True)
class RunProcess:
    """One process of an engine. `control` is the driver's end of its connection."""

    name: str
    engine: int
    engine_id: str
    process: SpawnProcess
    control: Connection
    rank: int | None = None
    ended_by_fault: bool = False

    @property
    def is_rank(self) -> bool:
        """Whether it is a rank; else it is a scheduler."""
        return self.rank is not None


class RunProcesses:
    """The schedulers and ranks of a run.

    Ctrl-C at the terminal does not reach them: the driver sends `Stop`. All of them
    end when their driver does.
    """

    def __init__(self, run_id: str) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._run_id = run_id
        self.all: list[RunProcess] = []

    @property
    def schedulers(self) -> list[RunProcess]:
        """Schedulers of all engines, also those that have ended."""
        return [one for one in self.all if not one.is_rank]

    @property
    def ranks(self) -> list[RunProcess]:
        """Connected ranks of all engines."""
        return [one for one in self.all if one.is_rank and not one.control.closed]

    def send_schedulers(self, message: msgspec.Struct) -> None:
        """Send a message to every connected scheduler."""
        for one in self.schedulers:
            with suppress(OSError):
                send(one.control, message)

    def scheduler_of(self, engine: int) -> RunProcess:
        """Return the latest scheduler of an engine."""
        return next(one for one in reversed(self.schedulers) if one.engine == engine)

    def rank_of(self, engine: int, rank: int) -> RunProcess:
        """Return the latest process of a rank."""
        return next(
            one
            for one in reversed(self.all)
            if (one.engine, one.rank) == (engine, rank)
        )

    def of_engine(self, engine: int) -> list[RunProcess]:
        """Return every process that an engine has had."""
        return [one for one in self.all if one.engine == engine]

    def start_engine(self, plan: EnginePlan) -> None:
        """Start the scheduler and the ranks of an engine."""
        # Starting the tracker later would unblock the signal.
        resource_tracker.ensure_running()
        # Blocked, not ignored: the driver receives a signal that arrives meanwhile.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._start_engine(plan)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _start_engine(self, plan: EnginePlan) -> None:
        slots = range(plan.scenario.load.concurrency)
        ranks = range(plan.scenario.ranks)
        pipes = [[self._context.Pipe() for _ in ranks] for _ in slots]
        engine_name = plan.engine_id.rpartition("-")[2]
        for rank in ranks:
            rank_ends = [pipes[slot][rank][1] for slot in slots]
            name = f"rank {rank} of engine {engine_name}"
            started = self._start(name, plan, simulated_rank.run, rank, rank_ends)
            started.rank = rank
            _close_all(rank_ends)
        slot_ends = [tuple(pipes[slot][rank][0] for rank in ranks) for slot in slots]
        self._start(
            f"scheduler of engine {engine_name}", plan, scheduler.run, slot_ends
        )
        for ends in slot_ends:
            _close_all(ends)

    def _start(
        self, name: str, plan: EnginePlan, target: Callable[..., None], *more: object
    ) -> RunProcess:
        """Start one process. The caller closes the connections that it passes."""
        control, process_end = self._context.Pipe()
        process = self._context.Process(
            target=target, args=(plan, process_end, *more), name=name
        )
        process.start()
        process_end.close()
        started = RunProcess(name, plan.engine, plan.engine_id, process, control)
        self.all.append(started)
        return started

    def close(self, *, at_once: bool = False) -> None:
        """End all processes, and remove the shared memory of killed ones.

        `at_once` kills them: calls to a server that has ended would never return.
        """
        for one in self.all:
            one.control.close()
        for one in self.all:
            one.process.join(0 if at_once else STOP_S)
            if one.process.is_alive():
                one.process.kill()
                one.process.join()
        remove_dead(f"{SEGMENT_PREFIX}{self._run_id}")


def _close_all(ends: Iterable[Connection]) -> None:
    """Close ends in this process, so that the end of a child closes the pipe."""
    for end in ends:
        end.close()
