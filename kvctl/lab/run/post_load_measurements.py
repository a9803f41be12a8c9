"""Measurements after the load: isolated calls, copies, leaked leases, ceilings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from statistics import median_low
from time import perf_counter

from kvcore.errors import KVError
from kvcore.keys import SessionKey
from kvctl.lab import ceilings
from kvctl.lab.config.copy_settings import Setting
from kvctl.lab.latency import time_calls
from kvctl.lab.process_messages import (
    CallTimes,
    MeasureCopies,
    MeasureIsolatedCalls,
    Start,
    send,
)
from kvctl.lab.rank.copy_benchmark import cpu_s, make_row
from kvctl.lab.rank.isolated_calls import COPY_BYTES, IsolatedLookups
from kvctl.lab.run.run_monitor import RunMonitor
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.workload.access_generators import accesses

NUM_PINGS = 500
NUM_LOOKUPS = 200
MAX_LEASES = 100_000
MAX_RANKS = 4
"""Ranks that make isolated calls; more give the same results."""
MAX_ACCESSES = 1_000
"""Requests among which one of mean length is searched."""


class PostLoadMeasurements:
    """Completes the evidence of a run after its load."""

    def __init__(self, monitor: RunMonitor, clients: Sequence[Client]) -> None:
        self._monitor = monitor
        self._evidence = monitor.evidence
        self._clients = clients
        self._client = clients[0]

    def measure_isolated_calls(self) -> None:
        """Measure calls of one rank after another, and lookups."""
        evidence, monitor = self._evidence, self._monitor
        if evidence.interrupted or monitor.failed or monitor.server_gone:
            return
        monitor.show("isolated calls")
        try:
            total_bytes = self._client.status(0).l1.total_bytes
            max_bytes = min(COPY_BYTES, total_bytes // 8)
            for number, rank in enumerate(monitor.processes.ranks[:MAX_RANKS], 1):
                # Each rank has its own tokens: chunks that exist are not copied.
                send(rank.control, MeasureIsolatedCalls(max_bytes, number))
                evidence.alone += self._await_call_times(1)
            self._measure_lookups()
        except (KVError, OSError) as error:
            evidence.failures.append(f"isolated calls: {error}")

    def measure_copies(self) -> None:
        """Execute the copy benchmark of the scenario."""
        evidence, monitor = self._evidence, self._monitor
        copies = evidence.scenario.copies
        if copies is None or monitor.failed or monitor.server_gone:
            return
        monitor.show("copying")
        for number, setting in enumerate(copies.settings()):
            if monitor.interrupts.received:
                evidence.interrupted = True
                return
            self._copy(setting, number)
            if monitor.failed:
                return

    def _await_call_times(self, num_ranks: int) -> list[CallTimes]:
        """Return the times of `num_ranks` ranks; fewer after a failure."""
        received = self._monitor.call_times
        while len(received) < num_ranks and not self._monitor.failed:
            self._monitor.step()
        times = list(received)
        received.clear()
        return times

    def _copy(self, setting: Setting, number: int) -> None:
        """Measure one setting; no row is added if a process failed.

        The ranks begin together, after all have warmed up: the server compiles kernels
        then, and the last rank to register would not share the link.
        """
        evidence, monitor = self._evidence, self._monitor
        ranks = monitor.processes.ranks[: setting.workers]
        monitor.num_warm = 0
        for index, rank in enumerate(ranks):
            # Each rank has its own tokens: chunks that exist are not copied.
            seed = number * len(monitor.processes.ranks) + index
            send(rank.control, MeasureCopies(setting, seed))
        while monitor.num_warm < len(ranks) and not monitor.failed:
            monitor.step()
        if monitor.failed:
            return
        cpu_before, copies_before = self._server_cpu_s(), self._server_copies()
        for rank in ranks:
            send(rank.control, Start())
        times = self._await_call_times(len(ranks))
        if monitor.failed:
            return
        evidence.copies_wrong += sum(one.bytes_wrong for one in times)
        row = make_row(
            setting,
            times,
            server_s=self._server_cpu_s() - cpu_before if monitor.servers else None,
            ways=self._server_copies() - copies_before,
        )
        evidence.copies.append(row)

    def _server_copies(self) -> Counter[str]:
        """Return the server's copies on GPUs, by method and direction."""
        counts = (device.copies for device in self._client.status(0).devices)
        return sum(map(Counter, counts), Counter())

    def _server_cpu_s(self) -> float:
        return sum(cpu_s(server.pid) for server in self._monitor.servers)

    def _measure_lookups(self) -> None:
        """Measure lookups of a request of about the mean length."""
        scenario, seed = self._evidence.scenario, self._evidence.seed
        mean_tokens = self._mean_tokens()
        some = islice(accesses(scenario.workload, seed), MAX_ACCESSES)
        access = min(some, key=lambda one: abs(one.num_tokens - mean_tokens))
        tokens = access.tokens()
        model = self._monitor.plans()[0].model

        def lookup_s(number: int) -> float:
            session = SessionKey(f"{self._monitor.run_id}-alone", str(number))
            begun = perf_counter()
            self._client.lookup(session, model, scenario.ranks, tokens)
            duration_s = perf_counter() - begun
            self._client.end_session(session)
            return duration_s

        seconds = median_low(map(lookup_s, range(NUM_LOOKUPS)))
        self._evidence.lookup_alone = IsolatedLookups(len(tokens), seconds)

    def _mean_tokens(self) -> int:
        planned = self._monitor.planned
        return planned.num_tokens // planned.num_requests

    def measure_ceilings(self) -> None:
        """After the engines have ended: count leaked leases, measure the ceilings."""
        evidence = self._evidence
        self._monitor.show("measuring ceilings")
        try:
            evidence.leases_leaked = sum(map(self._num_leaked, self._clients))
            evidence.devices = self._client.status(0).devices
            evidence.pings = time_calls(self._client.ping, NUM_PINGS)
            evidence.ceilings = self._measure_ceilings()
        except KVError as error:
            evidence.failures.append(f"after the run: {error.message}")

    def _num_leaked(self, client: Client) -> int:
        leases = client.status(MAX_LEASES).leases
        return sum(one.engine_id.startswith(self._monitor.run_id) for one in leases)

    def _measure_ceilings(self) -> ceilings.Ceilings:
        """Measure with the sizes of this run's typical copy and lookup."""
        scenario, mean_tokens = self._evidence.scenario, self._mean_tokens()
        num_chunks = max(1, mean_tokens // scenario.server.chunk_size)
        return ceilings.measure(
            copy_bytes=num_chunks * self._monitor.chunk_bytes,
            piece_bytes=scenario.model.geometry().piece_bytes(scenario.ranks),
            lookup_bytes=mean_tokens * 4,
        )
