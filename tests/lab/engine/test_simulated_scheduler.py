"""A simulated engine with a fake server: reports equal the configured values."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from kvcore.client import KVClient
from kvcore.errors import Internal, KVError
from kvcore.keys import SessionKey, Tokens
from kvcore.protocol import LookupReply
from kvctl.lab.config.arrival_config import ClosedLoop, Constant, Poisson
from kvctl.lab.config.scenario import EngineModel, Limits, ModelConfig, Scenario, Tenant
from kvctl.lab.config.workload_config import Chat, SharedPrefix
from kvctl.lab.engine.engine_statistics import unpack
from kvctl.lab.engine.simulated_scheduler import SimulatedScheduler
from kvctl.lab.process_messages import EnginePlan, RequestDone, RunRequest, Tally, send
from kvctl.lab.results.load_report import LoadReport, report_load
from tests.lab.fake_clock import FakeClock

CHUNK = 32
LOOKUP_S = 0.01
RETRIEVE_S = 0.02


class FakeServer(KVClient):
    """Answers with configured delays, hits and errors, on a fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.num_lookups = 0
        self.latencies: list[float] = []
        """Durations of lookups, from the end; then `LOOKUP_S`."""
        self.stall_at = -1
        self.stall_s = 0.0
        self.fail_at = -1
        self.hit_tokens = 0
        self.num_from_tiers = 0
        self.ended: list[str] = []

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk."""
        return CHUNK

    def lookup(  # type: ignore[override]
        self, session: SessionKey, model: str, world_size: int, tokens: Tokens
    ) -> LookupReply:
        """Advance the clock by the configured duration; return the configured hits."""
        del session, model, world_size, tokens
        number = self.num_lookups
        self.num_lookups += 1
        took = self.latencies.pop() if self.latencies else LOOKUP_S
        self.clock.time += self.stall_s if number == self.stall_at else took
        if number == self.fail_at:
            raise self.error
        num_chunks = self.hit_tokens // CHUNK
        return LookupReply(num_chunks, self.hit_tokens, self.num_from_tiers)

    error: KVError = Internal("configured")

    def end_session(self, session: SessionKey) -> None:  # type: ignore[override]
        """Record the request."""
        self.ended.append(session.request_id)


@pytest.fixture
def rank() -> Iterator[Connection]:
    """Return a rank that replies immediately with configured durations."""
    ours, theirs = Pipe()

    def reply_to_tasks() -> None:
        decoder = msgspec.msgpack.Decoder(RunRequest)
        try:
            while True:
                task = decoder.decode(theirs.recv_bytes())
                took = {"retrieve": RETRIEVE_S} if task.retrieve else {"store": 0.01}
                send(theirs, RequestDone(Tally(), took))
        except EOFError:
            theirs.close()

    thread = Thread(target=reply_to_tasks)
    thread.start()
    yield ours
    ours.close()
    thread.join(10)


def run(scenario: Scenario, server: FakeServer, rank: Connection) -> LoadReport:
    """Run a scenario with one slot; return the report of its request log."""
    plan = EnginePlan("", 0, "e", "m", 0, scenario)
    engine = SimulatedScheduler(plan, server, server.clock)
    engine.run_slot([rank])
    assert engine.failure is None
    report = report_load(scenario, unpack([engine.statistics.report().journal]), 0.0)
    assert report is not None
    return report


def scenario(num_requests: int, rate: float, **more: object) -> Scenario:
    """Return a scenario with requests of 64 tokens at a constant rate."""
    workload = SharedPrefix(
        num_requests=num_requests, prefix_tokens=63, suffix_tokens=1
    )
    model = ModelConfig("tiny-llama", block_size=16)
    load = Constant(rate=rate)
    return Scenario(model, workload, load=load, cache_blocks=64, **more)  # type: ignore[arg-type]


def test_percentiles_equal_those_of_the_configured_latencies(rank: Connection) -> None:
    """Lookups of 1 to 100 ms, in any order: p50 is 50 ms, p99 is 99 ms."""
    server = FakeServer(FakeClock())
    order = np.random.default_rng(0).permutation(100)
    server.latencies = [(number + 1) / 1000 for number in order.tolist()]
    server.hit_tokens, server.num_from_tiers = 64, 1
    engine = SimulatedScheduler(
        EnginePlan("", 0, "e", "m", 0, scenario(100, 1)), server, server.clock
    )
    engine.run_slot([rank])
    found = engine.statistics.report()
    lookup = found.samples.summary()["lookup"]
    points = (lookup.p50_s, lookup.p90_s, lookup.p99_s, lookup.max_s)
    assert points == pytest.approx((0.05, 0.09, 0.099, 0.1), rel=1e-3)
    assert (found.tally.tokens_hit, found.tally.tokens_from_tiers) == (6400, 3200)


def test_only_open_loops_have_a_lag(rank: Connection) -> None:
    """Beside a closed loop, the lag and the rate are those of the open tenant."""
    server = FakeServer(FakeClock())
    closed = replace(scenario(10, 10), load=ClosedLoop())
    engine = SimulatedScheduler(
        EnginePlan("", 0, "e", "m", 0, closed), server, server.clock
    )
    engine.run_slot([rank])
    ours = unpack([engine.statistics.report().journal])
    alone = report_load(closed, ours, 0.0)
    assert alone is not None
    assert (alone.lag, alone.offered_per_s, alone.waited) == (None, None, None)
    theirs = ours.copy()
    theirs["engine"], theirs["due_s"] = 1, np.arange(10) / 4
    both = replace(closed, tenants=(Tenant("t", closed.workload, load=Constant()),))
    report = report_load(both, np.concatenate((ours, theirs)), 0.0)
    assert report is not None
    assert report.offered_per_s == pytest.approx(4.0)


def test_a_stall_counts_for_all_that_were_due_in_it(rank: Connection) -> None:
    """At ten requests per second one stalls for 2 s: the next twenty are delayed."""
    server = FakeServer(FakeClock())
    server.stall_at, server.stall_s = 10, 2.0
    report = run(scenario(100, 10, limits=Limits(request_s=0.5)), server, rank)
    # Due 0.1, 0.2 ... behind it: 1.91, 1.82 ... down by 0.09 each.
    late = [2.0] + [2.0 - 0.09 * n + 0.0 for n in range(1, 23)]
    expected = sum(one > 0.5 for one in late)
    assert report.goodput is not None
    assert report.requests - report.goodput.requests == pytest.approx(expected, abs=1)
    assert report.waited is not None
    assert report.waited.max_s == pytest.approx(1.9, rel=0.01)
    assert report.lag is not None
    assert report.lag.max_s == 0.0
    assert not report.generator_bound


def test_an_error_of_the_server_is_one_failed_request(rank: Connection) -> None:
    """The other requests succeed."""
    server = FakeServer(FakeClock())
    server.fail_at = 3
    report = run(scenario(10, 10), server, rank)
    assert (report.requests, report.failed) == (10, 1)


def test_first_tokens_come_after_lookup_retrieve_and_prefill(rank: Connection) -> None:
    """32 of 64 tokens are loaded, 32 computed: TTFT is the sum of the times."""
    server = FakeServer(FakeClock())
    server.hit_tokens = 32
    model = EngineModel(prefill_tokens_per_s=1000, step_s=0.005)
    report = run(scenario(5, 1, engine=model), server, rank)
    expected = LOOKUP_S + RETRIEVE_S + 0.005 + 32 / 1000
    assert report.ttft is not None
    assert report.ttft.p50_s == pytest.approx(expected, rel=0.01)
    assert report.ttft.max_s == pytest.approx(expected, rel=0.01)


def test_hit_rates_of_sessions_equal_the_configured_hits(rank: Connection) -> None:
    """Turns have 32 and 96 tokens, and 32 of each are found: 0.5 of a session's 128."""
    server = FakeServer(FakeClock())
    server.hit_tokens = 32
    workload = Chat(
        num_sessions=4, turns=2, system_tokens=0, user_tokens=32, answer_tokens=32
    )
    chat = Scenario(
        ModelConfig("tiny-llama", block_size=16),
        workload,
        load=Poisson(rate=10),
        cache_blocks=64,
    )
    report = run(chat, server, rank)
    assert report.sessions is not None
    assert (report.sessions.num_sessions, report.sessions.p50) == (4, 0.5)
    assert report.sessions.first_requests == 1.0
    assert report.sessions.later_requests == pytest.approx(1 / 3)


def test_aborted_requests_end_their_sessions(rank: Connection) -> None:
    """Aborted after lookup, in prefill or in decode."""
    server = FakeServer(FakeClock())
    model = EngineModel(abort_share=1.0)
    report = run(scenario(30, 10, engine=model), server, rank)
    assert report.aborted == 30
    assert sorted(server.ended) == sorted(map(str, range(30)))


def test_a_crash_in_a_slot_fails_the_run(rank: Connection) -> None:
    """A defect does not count as the end of the workload."""
    server = FakeServer(FakeClock())
    engine = SimulatedScheduler(EnginePlan("", 0, "e", "m", 0, scenario(3, 10)), server)
    server.clock = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        engine.run_slot([rank])
    assert engine.failure is not None
