"""The processes of a run: schedulers, ranks, and what connects them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import msgspec

from kvcore.shm import remove_dead
from kvctl.lab.engine import simulated_scheduler as scheduler
from kvctl.lab.process_messages import EnginePlan, Storm, send
from kvctl.lab.rank import simulated_rank as worker

END_S = 5.0
"""For a process to end once its driver's connection is closed."""


@dataclass(slots=True)
class RunProcess:
    """One process. `control` is the driver's end."""

    name: str
    engine: int
    engine_id: str
    process: SpawnProcess
    control: Connection
    rank: int | None = None
    struck: bool = False
    """It was ended on purpose."""

    @property
    def is_rank(self) -> bool:
        """Say whether it is a rank, or else a scheduler."""
        return self.rank is not None


class RunProcesses:
    """Started processes.

    They are not interrupted by Ctrl-C at the terminal: the driver tells them when to
    stop. All of them end when their driver is gone.
    """

    def __init__(self, plans: Sequence[EnginePlan]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.run_prefix = plans[0].engine_id.rpartition("-")[0]
        self.actors: list[RunProcess] = []
        try:
            for plan in plans:
                self.start_engine(plan)
        except BaseException:
            self.close()
            raise

    @property
    def schedulers(self) -> list[RunProcess]:
        """One an engine."""
        return [actor for actor in self.actors if not actor.is_rank]

    @property
    def ranks(self) -> list[RunProcess]:
        """All engines', those that are still there."""
        return [a for a in self.actors if a.is_rank and not a.control.closed]

    def tell_schedulers(self, message: msgspec.Struct) -> None:
        """Send a message to every scheduler that is still there."""
        for actor in self.schedulers:
            with suppress(OSError):
                send(actor.control, message)

    def scheduler_of(self, engine: int) -> RunProcess:
        """Return an engine's scheduler, the latest one."""
        return next(a for a in reversed(self.schedulers) if a.engine == engine)

    def rank_of(self, engine: int, rank: int) -> RunProcess:
        """Return a rank, the latest one."""
        return next(
            a for a in reversed(self.actors) if (a.engine, a.rank) == (engine, rank)
        )

    def of_engine(self, engine: int) -> list[RunProcess]:
        """Return every process that an engine has had."""
        return [actor for actor in self.actors if actor.engine == engine]

    def storm(self, rounds: int) -> None:
        """Let all ranks register again so often, at once."""
        for actor in self.ranks:
            send(actor.control, Storm(rounds))

    def start_engine(self, plan: EnginePlan) -> None:
        """Start an engine's processes."""
        # Its start would unblock what is blocked next.
        resource_tracker.ensure_running()
        # Blocked, not ignored: a signal that comes meanwhile reaches the driver later.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._start_engine(plan)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _start_engine(self, plan: EnginePlan) -> None:
        slots = range(plan.scenario.load.concurrency)
        ranks = range(plan.scenario.ranks)
        pairs = [[self._context.Pipe() for _ in ranks] for _ in slots]
        for rank in ranks:
            theirs = [pairs[slot][rank][1] for slot in slots]
            name = f"rank {rank} of engine {plan.engine_id.rpartition('-')[2]}"
            actor = self._start(name, plan, worker.run, rank, theirs)
            actor.rank = rank
            _close(theirs)
        ours = [tuple(pairs[slot][rank][0] for rank in ranks) for slot in slots]
        name = f"scheduler of engine {plan.engine_id.rpartition('-')[2]}"
        self._start(name, plan, scheduler.run, ours)
        for ends in ours:
            _close(ends)

    def _start(
        self, name: str, plan: EnginePlan, target: Callable[..., None], *more: object
    ) -> RunProcess:
        """Start one process. Connections passed to it stay the caller's to close."""
        control, theirs = self._context.Pipe()
        process = self._context.Process(
            target=target, args=(plan, theirs, *more), name=name
        )
        process.start()
        theirs.close()
        actor = RunProcess(name, plan.engine, plan.engine_id, process, control)
        self.actors.append(actor)
        return actor

    def close(self, *, at_once: bool = False) -> None:
        """End what still runs, and remove the shared memory of what was killed.

        `at_once` kills it: what waits for a server that is gone waits in vain.
        """
        for actor in self.actors:
            actor.control.close()
        for actor in self.actors:
            actor.process.join(0 if at_once else END_S)
            if actor.process.is_alive():
                actor.process.kill()
                actor.process.join()
        remove_dead(f"{worker.SEGMENT_PREFIX}{self.run_prefix}")


def _close(ends: Iterable[Connection]) -> None:
    """Let only the processes at work hold these, so that an end is noticed."""
    for end in ends:
        end.close()
