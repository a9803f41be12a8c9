"""The driver of a run: starts everything, watches it, stops it, keeps what it found."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from time import monotonic, perf_counter
from types import FrameType

from msgspec.structs import replace

from kvcore.client import KVClient
from kvcore.errors import KVError, SetupError, Unavailable
from kvcore.keys import SessionKey
from kvcore.shm import remove_dead
from kvctl.lab import alone, ceilings
from kvctl.lab.cast import Actor, Cast
from kvctl.lab.local_server import LocalServer
from kvctl.lab.measure import Samples, time_calls
from kvctl.lab.messages import (
    AloneDone,
    EnginePlan,
    EngineReport,
    Failed,
    PlayAlone,
    Ready,
    Start,
    Stop,
    Tally,
    receive,
    send,
)
from kvctl.lab.result import Result
from kvctl.lab.scenario import Scenario
from kvctl.lab.summary import Evidence, summarise
from kvctl.lab.worker import SEGMENT_PREFIX
from kvctl.lab.workload import Survey, accesses, survey

TICK_S = 0.5
READY_S = 60.0
GRACE_S = 15.0
"""For requests under way to end, once a run is to stop."""
SERVERLESS_GRACE_S = 3.0
"""For the same once the server is gone: what waits for another waits in vain."""
NUM_PINGS = 500
MAX_LEASES_LOOKED_AT = 100_000
MAX_ALONE = 4
"""Ranks that make calls alone; more would tell nothing new."""
NUM_LOOKED_AT = 1_000
NUM_LOOKUPS = 200


class Watcher:
    """Told how far a run is. This one says nothing."""

    def phase(self, name: str) -> None:
        """Begin a phase of the run."""

    def progress(self, done: Tally, planned: Survey) -> None:
        """Some requests are done."""


@dataclass(slots=True)
class Interrupts:
    """SIGINT or SIGTERM was received. A second one raises KeyboardInterrupt."""

    received: bool = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Take the signals for as long as the block runs."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._receive) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def run(
    name: str,
    scenario: Scenario,
    seed: int,
    address: str | None,
    watcher: Watcher | None = None,
) -> Result:
    """Play a scenario, against a server of its own where no address is given.

    The result says what went wrong while it ran.

    Raises:
        SetupError: it could not begin.
        Unavailable: no server answers at the address.
    """
    watcher = watcher or Watcher()
    watcher.phase("starting")
    planned = _survey(scenario, seed)
    remove_dead(SEGMENT_PREFIX)
    interrupts = Interrupts()
    with interrupts.caught():
        server = None if address else LocalServer(scenario.server)
        where = address or (server.address if server else "")
        evidence = Evidence(name, scenario, seed)
        try:
            play = Play(evidence, where, server, planned, interrupts, watcher)
            play.run()
        finally:
            trouble = server.stop() if server else None
        if trouble:
            evidence.failures.append(trouble)
        return summarise(evidence)


def _survey(scenario: Scenario, seed: int) -> Survey:
    """Add up what the tenants are asked; each must fit its engines' caches."""
    surveys = []
    for part in scenario.parts().values():
        surveys.append(survey(part.workload, seed))
        _check_room(part, surveys[-1])
    return Survey(
        sum(one.num_requests for one in surveys),
        sum(one.num_tokens for one in surveys),
        max(one.longest for one in surveys),
    )


def _check_room(scenario: Scenario, planned: Survey) -> None:
    geometry = scenario.model.geometry()
    blocks = -(-planned.longest // geometry.block_size)
    if not planned.num_requests:
        raise SetupError("the workload has no requests")
    if blocks > scenario.cache_blocks:
        raise SetupError(
            f"the longest request has {planned.longest} tokens, {blocks} blocks: "
            f"cache_blocks = {scenario.cache_blocks} cannot hold it"
        )


@dataclass(slots=True)
class Play:
    """One run under way."""

    evidence: Evidence
    address: str
    server: LocalServer | None
    planned: Survey
    interrupts: Interrupts
    watcher: Watcher
    run_id: str = field(default_factory=lambda: f"{os.getpid()}.{secrets.token_hex(3)}")
    tallies: dict[int, Tally] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    reported: set[int] = field(default_factory=set)
    chunk_bytes: int = 0
    stop_by: float | None = None
    """When patience ends, once a stop was asked for."""
    server_gone: bool = False
    alone_wanted: str | None = None
    """The rank that is making calls alone."""

    def run(self) -> None:
        """Fill the evidence."""
        with KVClient(self.address, label="bench driver") as client:
            served = replace(
                self.evidence.scenario.server, chunk_size=client.chunk_size
            )
            self.evidence.scenario = replace(self.evidence.scenario, server=served)
            cast = Cast(self._plans())
            try:
                self._set_up(cast)
                before = client.status(0).counters
                self._watch(cast)
                self._count(client, before)
                self._play_alone(cast, client)
            finally:
                cast.close()
            if not self.server_gone:
                self._look_after(client)

    def _plans(self) -> list[EnginePlan]:
        """One an engine, tenant after tenant."""
        plans: list[EnginePlan] = []
        for part in self.evidence.scenario.parts().values():
            for place in range(part.engines):
                plans.append(self._plan(len(plans), part, place))
        return plans

    def _plan(self, engine: int, part: Scenario, place: int) -> EnginePlan:
        model = part.model.geometry().model
        return EnginePlan(
            address=self.address,
            engine=engine,
            engine_id=f"{self.run_id}-{engine}",
            model=f"{model}/{part.ranks}@{self.run_id}",
            seed=self.evidence.seed,
            scenario=part,
            place=place,
        )

    def _set_up(self, cast: Cast) -> None:
        """Wait until every process has set itself up.

        Raises:
            SetupError: one of them could not.
        """
        give_up = monotonic() + READY_S
        while len(self.ready) < len(cast.actors) and not self.interrupts.received:
            self._step(cast)
            if self.evidence.failures:
                raise SetupError("; ".join(self.evidence.failures))
            if monotonic() > give_up:
                raise Unavailable(f"the engines were not ready in {READY_S:.0f} s")
        self.watcher.phase("playing")

    def _watch(self, cast: Cast) -> None:
        """Let them play until all have reported or the patience of a stop ends."""
        self.evidence.begun_s = begun = monotonic()
        cast.tell_schedulers(Start(begun))
        while len(self.reported) < len(cast.schedulers):
            self._step(cast)
            if self.interrupts.received:
                self.evidence.interrupted = True
            if self.evidence.interrupted or self.evidence.failures:
                self._ask_to_stop(cast)
            if self.stop_by is not None and monotonic() > self.stop_by:
                self._give_up(cast)
                break
        self.evidence.elapsed_s = monotonic() - begun

    def _ask_to_stop(self, cast: Cast) -> None:
        if self.stop_by is None:
            self.watcher.phase("stopping")
            grace = SERVERLESS_GRACE_S if self.server_gone else GRACE_S
            self.stop_by = monotonic() + grace
            cast.tell_schedulers(Stop())

    def _give_up(self, cast: Cast) -> None:
        """End without the last reports: what was told on the way stands for them."""
        for actor in cast.schedulers:
            if actor.engine not in self.reported:
                self.evidence.failures.append(f"{actor.name} did not stop")
                tally = self.tallies.get(actor.engine, Tally())
                self.evidence.reports.append(EngineReport(tally, Samples(), b""))

    def _step(self, cast: Cast) -> None:
        """Wait a little for something to happen, and take note of it."""
        actors = {a.control: a for a in cast.actors if not a.control.closed}
        waiting: list[Connection | int] = [*actors]
        if self.server and not self.server_gone:
            waiting.append(self.server.exited)
        for source in wait(waiting, TICK_S):
            if isinstance(source, Connection):
                self._hear(actors[source])
            else:
                self._server_ended()

    def _server_ended(self) -> None:
        """Take note once; how it ended is said when it is stopped."""
        self.server_gone = True
        self.evidence.failures.append("the server ended during the run")

    def _hear(self, actor: Actor) -> None:
        try:
            message = receive(actor.control)
        except (EOFError, OSError):
            self._lost(actor)
            return
        match message:
            case Ready(chunk_bytes):
                self.ready.add(actor.name)
                self.chunk_bytes = max(self.chunk_bytes, chunk_bytes)
            case Failed(text):
                self.evidence.failures.append(f"{actor.name}: {text}")
            case Tally():
                self.tallies[actor.engine] = message
                self._show_progress()
            case AloneDone():
                self.alone_wanted = None
                self.evidence.alone.append(message)
            case EngineReport():
                self.reported.add(actor.engine)
                self.evidence.reports.append(message)

    def _lost(self, actor: Actor) -> None:
        """A process ended: a failure where it crashed, or never told what it did."""
        actor.control.close()
        actor.process.join(TICK_S)
        code = actor.process.exitcode
        if code or not (actor.is_rank or actor.engine in self.reported):
            self.evidence.failures.append(f"{actor.name} ended with exit code {code}")
        if not actor.is_rank:
            self.reported.add(actor.engine)

    def _show_progress(self) -> None:
        total = Tally()
        for tally in self.tallies.values():
            total.add(tally)
        self.watcher.progress(total, self.planned)

    def _count(self, client: KVClient, before: Mapping[str, int]) -> None:
        """Keep by how much the server's counters grew."""
        if self.server_gone:
            return
        with suppress(KVError):  # What ended the server is told when it is stopped.
            self.evidence.counters = {
                name: count - before.get(name, 0)
                for name, count in client.status(0).counters.items()
            }

    def _play_alone(self, cast: Cast, client: KVClient) -> None:
        """With the load over, let ranks call one after another, then look up."""
        evidence = self.evidence
        if evidence.interrupted or evidence.failures or self.server_gone:
            return
        self.watcher.phase("calling alone")
        try:
            max_bytes = min(alone.COPY_BYTES, client.status().l1.total_bytes // 8)
            for seed, actor in enumerate(cast.ranks[:MAX_ALONE]):
                send(actor.control, PlayAlone(max_bytes, seed))
                self.alone_wanted = actor.name
                while self.alone_wanted and not evidence.failures:
                    self._step(cast)
            self._look_up_alone(client)
        except (KVError, OSError) as error:
            evidence.failures.append(f"calls alone: {error}")

    def _look_up_alone(self, client: KVClient) -> None:
        """Look up a request of about the mean length, again and again."""
        scenario, seed = self.evidence.scenario, self.evidence.seed
        some = islice(accesses(scenario.workload, seed), NUM_LOOKED_AT)
        access = min(some, key=lambda one: abs(one.num_tokens - self._mean_tokens()))
        tokens = access.tokens()
        plan = self._plans()[0]

        def look_up(number: int) -> float:
            session = SessionKey(f"{self.run_id}-alone", str(number))
            begun = perf_counter()
            client.lookup(session, plan.model, scenario.ranks, tokens)
            taken = perf_counter() - begun
            client.end_session(session)
            return taken

        self.evidence.lookup_alone = alone.median_of(look_up, NUM_LOOKUPS, len(tokens))

    def _mean_tokens(self) -> int:
        return self.planned.num_tokens // self.planned.num_requests

    def _look_after(self, client: KVClient) -> None:
        """With the engines gone: leaked leases, pings, and the ceilings."""
        self.watcher.phase("measuring ceilings")
        try:
            leases = client.status(MAX_LEASES_LOOKED_AT).leases
            ours = [
                lease for lease in leases if lease.engine_id.startswith(self.run_id)
            ]
            self.evidence.leases_leaked = len(ours)
            self.evidence.pings = time_calls(client.ping, NUM_PINGS)
            self.evidence.ceilings = self._ceilings()
        except KVError as error:
            self.evidence.failures.append(f"after the run: {error.message}")

    def _ceilings(self) -> ceilings.Ceilings:
        """Measure with the sizes of this run's typical copy and lookup."""
        scenario, mean_tokens = self.evidence.scenario, self._mean_tokens()
        chunks = max(1, mean_tokens // scenario.server.chunk_size)
        return ceilings.measure(
            copy_bytes=chunks * self.chunk_bytes,
            piece_bytes=scenario.model.geometry().piece_bytes(scenario.ranks),
            lookup_bytes=mean_tokens * 4,
        )
