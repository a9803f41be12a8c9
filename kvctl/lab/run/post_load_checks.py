"""What is measured when the load is over: calls alone, leaks, ceilings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING

from kvcore.errors import KVError
from kvcore.keys import SessionKey
from kvctl.lab import ceilings
from kvctl.lab.latency_samples import time_calls
from kvctl.lab.process_messages import MeasureAlone, MeasureCopies, Start, send
from kvctl.lab.rank import isolated_calls as alone
from kvctl.lab.rank.copy_benchmark import cpu_s, make_row
from kvctl.lab.run.run_processes import RunProcesses
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.workload.access_generators import accesses
from kvctl.lab.workload.copy_settings import CopyRow, Setting

if TYPE_CHECKING:
    from kvctl.lab.run.load_run import LoadRun

NUM_PINGS = 500
MAX_LEASES_LOOKED_AT = 100_000
MAX_ALONE = 4
"""Ranks that make calls alone; more would tell nothing new."""
NUM_LOOKED_AT = 1_000
NUM_LOOKUPS = 200


class PostLoadChecks:
    """Fills the rest of a run's evidence."""

    def __init__(self, play: LoadRun, clients: Sequence[Client]) -> None:
        self._play = play
        self._evidence = play.evidence
        self._clients = clients
        self._client = clients[0]

    def play_alone(self, cast: RunProcesses) -> None:
        """With the load over, let ranks call one after another, then look up."""
        evidence, play = self._evidence, self._play
        if evidence.interrupted or evidence.failures or play.server_gone:
            return
        play.watcher.phase("calling alone")
        try:
            total_bytes = self._client.status(0).l1.total_bytes
            max_bytes = min(alone.COPY_BYTES, total_bytes // 8)
            for number, actor in enumerate(cast.ranks[:MAX_ALONE], 1):
                # Tokens of its own: what another has stored would not be copied.
                send(actor.control, MeasureAlone(max_bytes, number))
                while len(evidence.alone) < number and not evidence.failures:
                    play.step(cast)
            self._look_up_alone()
        except (KVError, OSError) as error:
            evidence.failures.append(f"calls alone: {error}")

    def play_copies(self, cast: RunProcesses) -> None:
        """Let ranks copy for its own sake, as the scenario says."""
        evidence, play = self._evidence, self._play
        copies = evidence.scenario.copies
        if copies is None or evidence.failures or play.server_gone:
            return
        play.watcher.phase("copying")
        for number, setting in enumerate(copies.settings()):
            if play.interrupts.received:
                evidence.interrupted = True
                return
            row = self._copy(cast, setting, number)
            if row is None:
                return
            evidence.copies.append(row)
            evidence.copies_wrong += sum(d.bytes_wrong for d in evidence.copied)

    def _copy(
        self, cast: RunProcesses, setting: Setting, number: int
    ) -> CopyRow | None:
        """Let ranks make the calls of a setting; None when one of them failed.

        They begin together, when all have made their first ones: a server compiles
        kernels then, and the last to register would have the link to itself.
        """
        evidence, play = self._evidence, self._play
        actors = cast.ranks[: setting.workers]
        evidence.copied.clear()
        evidence.num_warm = 0
        for place, actor in enumerate(actors):
            # Tokens of its own: what is there already would not be copied.
            send(
                actor.control, MeasureCopies(setting, number * len(cast.ranks) + place)
            )
        while evidence.num_warm < len(actors) and not evidence.failures:
            play.step(cast)
        if evidence.failures:
            return None
        before = self._server_s(), self._ways()
        for actor in actors:
            send(actor.control, Start())
        while len(evidence.copied) < len(actors) and not evidence.failures:
            play.step(cast)
        if evidence.failures:  # A server that is gone has nothing to tell.
            return None
        return make_row(
            setting,
            evidence.copied,
            server_s=self._server_s() - before[0] if play.servers else None,
            ways=self._ways() - before[1],
        )

    def _ways(self) -> Counter[str]:
        """Count what the server has copied on GPUs, by way and direction."""
        counts = (device.copies for device in self._client.status(0).devices)
        return sum(map(Counter, counts), Counter())

    def _server_s(self) -> float:
        return sum(cpu_s(server.pid) for server in self._play.servers)

    def _look_up_alone(self) -> None:
        """Look up a request of about the mean length, again and again."""
        scenario, seed = self._evidence.scenario, self._evidence.seed
        some = islice(accesses(scenario.workload, seed), NUM_LOOKED_AT)
        access = min(some, key=lambda one: abs(one.num_tokens - self._mean_tokens()))
        tokens = access.tokens()
        model = self._play.plans()[0].model

        def look_up(number: int) -> float:
            session = SessionKey(f"{self._play.run_id}-alone", str(number))
            begun = perf_counter()
            self._client.lookup(session, model, scenario.ranks, tokens)
            taken = perf_counter() - begun
            self._client.end_session(session)
            return taken

        self._evidence.lookup_alone = alone.median_of(look_up, NUM_LOOKUPS, len(tokens))

    def _mean_tokens(self) -> int:
        planned = self._play.planned
        return planned.num_tokens // planned.num_requests

    def look(self) -> None:
        """With the engines gone: leaked leases, pings, and the ceilings."""
        self._play.watcher.phase("measuring ceilings")
        try:
            self._evidence.leases_leaked = sum(map(self._num_leaked, self._clients))
            self._evidence.devices = self._client.status(0).devices
            self._evidence.pings = time_calls(self._client.ping, NUM_PINGS)
            self._evidence.ceilings = self._ceilings()
        except KVError as error:
            self._evidence.failures.append(f"after the run: {error.message}")

    def _num_leaked(self, client: Client) -> int:
        leases, run_id = client.status(MAX_LEASES_LOOKED_AT).leases, self._play.run_id
        return sum(lease.engine_id.startswith(run_id) for lease in leases)

    def _ceilings(self) -> ceilings.Ceilings:
        """Measure with the sizes of this run's typical copy and lookup."""
        scenario, mean_tokens = self._evidence.scenario, self._mean_tokens()
        chunks = max(1, mean_tokens // scenario.server.chunk_size)
        return ceilings.measure(
            copy_bytes=chunks * self._play.chunk_bytes,
            piece_bytes=scenario.model.geometry().piece_bytes(scenario.ranks),
            lookup_bytes=mean_tokens * 4,
        )
