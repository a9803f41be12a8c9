"""The processes of a run, as faults strike them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from msgspec.structs import replace

from kvcore.errors import KVError, SetupError
from kvctl.lab.process_messages import Stop, send
from kvctl.lab.run.fault_plan import FaultNotice, FaultTarget
from kvctl.lab.run.run_processes import RunProcess, RunProcesses
from kvctl.lab.scenario import Fault
from kvctl.lab.systems.local_server import LocalServer
from kvctl.lab.systems.service_processes import RunningService
from kvctl.lab.systems.system_interface import Client

if TYPE_CHECKING:
    from kvctl.lab.run.load_run import LoadRun

NOTICE_S = 5.0
POLL_S = 0.002
WATCH_S = 60.0
"""For a tier to be missed, and to be asked again once it is back."""
REPORT_S = 40.0
"""For an engine that lost a rank to say what it did."""


@dataclass(slots=True)
class FaultTargets:
    """Finds what a fault strikes."""

    play: LoadRun
    cast: RunProcesses
    client: Client

    def of(self, fault: Fault) -> FaultTarget:
        """Return the victim of a fault.

        Raises:
            SetupError: there is none, such as a server that was started elsewhere.
        """
        if fault.target == "worker":
            return WorkerTarget(self.play, self.cast, self.client, fault)
        if fault.target == "service":
            tiers = self.play.evidence.scenario.server.tiers
            mark = f"{{{fault.service}."
            places = [place for place, url in enumerate(tiers) if mark in url]
            service = self.play.services[fault.service]
            return ServiceTarget(service, self.client, places)
        for server in self.play.servers:
            if isinstance(server, LocalServer):
                return server
        raise SetupError("faults: the server was not started by this run")


@dataclass(slots=True)
class WorkerTarget:
    """One rank. Killed, it takes its engine along, which comes back as a new one."""

    play: LoadRun
    cast: RunProcesses
    client: Client
    fault: Fault

    def kill(self) -> FaultNotice:
        """Send SIGKILL; return when the server has noticed."""
        return self._strike(signal.SIGKILL)

    def end(self) -> FaultNotice:
        """Send SIGTERM, which a rank does not survive either."""
        return self._strike(signal.SIGTERM)

    def freeze(self) -> None:
        """Send SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Send SIGCONT."""
        self._signal(signal.SIGCONT)

    def begin(self) -> None:
        """Start the engine again where it was: the rest of its work is left."""
        engine = self.fault.engine
        old = self.cast.scheduler_of(engine)
        if engine not in self.play.reported:
            send(old.control, Stop())
        give_up = monotonic() + REPORT_S
        while engine not in self.play.reported and monotonic() < give_up:
            self.play.step(self.cast)
        report = self.play.reported.pop(engine, None)
        for actor in self.cast.of_engine(engine):
            actor.struck = True
            actor.control.close()
        number = len(self.cast.of_engine(engine))
        plan = replace(
            self.play.plans()[engine],
            engine_id=f"{self.play.run_id}-{engine}.{number}",
            first_index=report.next_index if report else 0,
        )
        self.cast.start_engine(plan)

    def _strike(self, number: signal.Signals) -> FaultNotice:
        """End the rank; wait until the server no longer lists it."""
        actor = self._actor()
        instance_id = f"{actor.engine_id}/{self.fault.rank}"
        actor.struck = True
        self._signal(number)
        give_up, waiting = monotonic() + NOTICE_S, threading.Event()
        while monotonic() < give_up:
            instances = self.client.status(0).instances
            if instance_id not in [one.instance_id for one in instances]:
                return FaultNotice(monotonic())
            waiting.wait(POLL_S)
        return FaultNotice()

    def _signal(self, number: signal.Signals) -> None:
        pid = self._actor().process.pid
        if pid is not None:
            os.kill(pid, number)

    def _actor(self) -> RunProcess:
        return self.cast.rank_of(self.fault.engine, self.fault.rank)


@dataclass(slots=True)
class ServiceTarget:
    """A service, and the tiers that live on it, by their places."""

    service: RunningService
    client: Client
    places: Sequence[int]

    def kill(self) -> FaultNotice:
        """Send SIGKILL; the server is watched from here on."""
        self.service.kill()
        return self._watched()

    def end(self) -> FaultNotice:
        """Send SIGTERM and wait."""
        notice = self._watched()
        self.service.end()
        return notice

    def freeze(self) -> FaultNotice:
        """Send SIGSTOP."""
        self.service.freeze()
        return self._watched()

    def thaw(self) -> None:
        """Send SIGCONT."""
        self.service.thaw()

    def begin(self) -> None:
        """Start it again."""
        self.service.begin()

    def _watched(self) -> FaultNotice:
        """Enter, meanwhile, when the server finds its tiers down, and up again."""
        notice = FaultNotice()
        if self.places:
            threading.Thread(target=self._watch, args=(notice,), daemon=True).start()
        return notice

    def _watch(self, notice: FaultNotice) -> None:
        give_up, waiting = monotonic() + WATCH_S, threading.Event()
        while monotonic() < give_up:
            try:
                tiers = self.client.status(0).tiers
            except KVError:
                return  # The run is over, or the server gone: told elsewhere.
            up = all(tiers[place].up for place in self.places)
            if not up and notice.noticed_s is None:
                notice.noticed_s = monotonic()
            elif up and notice.noticed_s is not None:
                notice.recovered_s = monotonic()
                return
            waiting.wait(POLL_S)
