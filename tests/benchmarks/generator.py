"""Requests per second of the load generator, with a server that takes no time.

Run as `python tests/benchmarks/generator.py`: one engine with one slot and one rank, in
a closed loop and at rising rates. Prints requests per second, and the lag behind due
times.
"""

from __future__ import annotations

import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import msgspec

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from kvcore.protocol import LookupReply
from kvctl.lab.config.arrival_config import ClosedLoop, Constant, Load
from kvctl.lab.config.scenario import ModelConfig, Scenario
from kvctl.lab.config.workload_config import SharedPrefix
from kvctl.lab.engine.engine_statistics import unpack
from kvctl.lab.engine.simulated_scheduler import SimulatedScheduler
from kvctl.lab.process_messages import EnginePlan, RequestDone, RunRequest, Tally, send
from kvctl.lab.results.load_report import LoadReport, report_load

RATES = (1000, 2000, 3000, 4000)
SECONDS = 3


class Instant(KVClient):
    """A server that answers immediately."""

    chunk_size = 64  # type: ignore[assignment]

    def __init__(self) -> None:
        """Connect to nothing."""

    def lookup(self, *_: object) -> LookupReply:  # type: ignore[override]
        """Report all chunks as found."""
        return LookupReply(9, 576)

    def end_session(self, session: SessionKey) -> None:  # type: ignore[override]
        """Return at once: nothing is leased."""


def obey(rank: Connection) -> None:
    """Act as a rank that completes each command immediately."""
    decoder = msgspec.msgpack.Decoder(RunRequest)
    try:
        while True:
            decoder.decode(rank.recv_bytes())
            send(rank, RequestDone(Tally(), {}))
    except EOFError:
        rank.close()


def play(load: Load, num_requests: int) -> tuple[float, LoadReport | None]:
    """Run the load; return requests per second and the journal's lag."""
    workload = SharedPrefix(
        num_requests=num_requests, num_prefixes=16, prefix_tokens=512, suffix_tokens=64
    )
    model = ModelConfig("tiny-llama")
    scenario = Scenario(model, workload, load=load, cache_blocks=4096)
    ours, theirs = Pipe()
    rank = threading.Thread(target=obey, args=(theirs,))
    rank.start()
    engine = SimulatedScheduler(EnginePlan("", 0, "e", "m", 0, scenario), Instant())
    engine.pacer.start(time.monotonic())
    begun = time.perf_counter()
    engine.run_slot([ours])
    taken = time.perf_counter() - begun
    rank.join()
    journal = unpack([engine.statistics.report().journal])
    return num_requests / taken, report_load(scenario, journal, 0.0)


def main() -> None:
    """Measure and print."""
    done, _ = play(ClosedLoop(concurrency=1), 20_000)
    print(f"closed loop: {done:,.0f} requests/s")
    for rate in RATES:
        done, report = play(Constant(rate=rate), rate * SECONDS)
        lag = report.lag if report else None
        said = f", lag p50 {lag.p50_s * 1e6:.0f} us, p99 {lag.p99_s * 1e6:.0f}"
        print(f"{rate:,} due a second: {done:,.0f} done{said if lag else ''}")


if __name__ == "__main__":
    main()
