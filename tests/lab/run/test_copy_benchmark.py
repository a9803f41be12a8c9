"""The copy benchmark, with real servers and ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
import pytest

from kvcore.shm import SEGMENT_PREFIX as SERVERS_PREFIX
from kvcore.shm import SHM_DIR
from kvctl.lab import runner
from kvctl.lab.config.scenario import read
from kvctl.lab.rank.copy_benchmark import cpu_s
from kvctl.lab.rank.isolated_calls import WARM_UP_ROUNDS, IsolatedCalls
from kvctl.lab.rank.rank_cache import SEGMENT_PREFIX
from kvctl.lab.report import result_tables
from kvctl.lab.results.result import Result
from tests.lab.rank.test_simulated_rank import FakeClient, make
from tests.lab.run.test_bench_run import command_of, descendants

SCENARIO = """\
engines = 2
cache_blocks = 128
[model]
preset = "tiny-llama"
[server]
l1.size = "32MiB"
[workload]
kind = "uniform"
num_requests = 2
[copies]
pieces = ["4KiB", "32KiB"]
workers = [1, 2]
chunk = "1MiB"
rounds = 2
"""

SMALL = ("engines=1", "copies.workers=[1]")


class SignalWhenCopying:
    """Sends a signal to this process or to the server when copies begin."""

    def __init__(self, to: str) -> None:
        self.to = to
        self.server = 0

    def __call__(self, _share: float, note: str) -> None:
        """Send the signal."""
        if note != "copying":
            return
        own_pid = os.getpid()
        if self.to == "us":
            os.kill(own_pid, signal.SIGINT)
            return
        # Servers of other tests are children of this process, too.
        (self.server,) = (
            pid for pid in descendants(own_pid) if "/kvlab-" in command_of(pid)
        )
        os.kill(self.server, signal.SIGKILL)


def run(
    tmp_path: Path,
    *settings: str,
    watcher: Callable[[float, str], None] = lambda _share, _note: None,
) -> Result:
    """Measure two piece sizes in two orders, and one of them with two workers."""
    path = tmp_path / "copies.toml"
    path.write_text(SCENARIO)
    result = runner.run("copies", read(path, settings), 0, None, watcher)
    assert not list(SHM_DIR.glob(f"{SEGMENT_PREFIX}{os.getpid()}.*"))
    return result


@pytest.mark.parametrize(
    "by", [pytest.param("server", marks=pytest.mark.long), "worker"]
)
def test_every_setting_is_copied_and_checked(tmp_path: Path, by: str) -> None:
    """A row per setting with either driver; no byte is wrong."""
    result = run(tmp_path, f"driver={by}")
    assert result.problems == ()
    assert result.counts.bytes_wrong == 0
    assert [row.setting.workers for row in result.copies] == [1, 1, 1, 1, 2]
    for row in result.copies:
        assert row.call_bytes == row.chunk_bytes == 1 << 20
        assert min(row.store, row.retrieve, row.both) > 0
        assert row.server_s_per_chunk is not None
        assert row.product_slowdown is None
    texts = [
        part for part in result_tables.build_tables(result) if isinstance(part, str)
    ]
    assert any(part.startswith("All bytes correct: stores") for part in texts)


def test_an_interrupt_ends_copies(tmp_path: Path) -> None:
    """The other settings are left out, and the result is marked as interrupted."""
    result = run(tmp_path, *SMALL, watcher=SignalWhenCopying("us"))
    assert result.interrupted
    assert (result.problems, result.copies) == ((), ())


def test_an_exit_of_the_server_is_reported(tmp_path: Path) -> None:
    """The run ends with a result, which contains the reason; L1 is removed."""
    watcher = SignalWhenCopying("the server")
    result = run(tmp_path, *SMALL, watcher=watcher)
    assert any("SIGKILL" in problem for problem in result.problems)
    assert result.copies == ()
    assert not list(SHM_DIR.glob(f"{SERVERS_PREFIX}{watcher.server}-*"))


class CorruptingClient(FakeClient):
    """Corrupts a byte of each retrieve, and keeps only the first store."""

    def lookup(self, *_: object) -> None:
        """Do nothing."""

    def end_session(self, _session: object) -> None:
        """Do nothing."""

    def store(self, *where: object) -> object:  # type: ignore[override]
        """Keep only the first, correct bytes."""
        return None if self.kept else super().store(*where)  # type: ignore[arg-type]

    def retrieve(self, *where: object) -> object:  # type: ignore[override]
        """Write back the kept bytes, except for one."""
        reply = super().retrieve(*where)  # type: ignore[arg-type]
        assert self.rank
        self.rank.cache.views[0][self.retrieved[0][0], 0, 1, 3, 1, 0] ^= 0xFF
        return reply


@pytest.mark.parametrize("scattered", [True, False])
def test_a_wrong_byte_of_any_call_counts(scattered: bool) -> None:
    """Each round has a single and a concurrent retrieve, and both are checked."""
    rank, _ = make("tiny-llama")
    client = CorruptingClient()
    client.rank = rank
    rank.client = client  # type: ignore[assignment]
    try:
        calls = IsolatedCalls(rank, 2, 0, scattered=scattered, both=True)
        assert not np.intersect1d(calls.blocks[0], calls.other_blocks[0]).size
        begun: list[int] = []
        done = calls.measure(1, lambda: begun.append(len(calls.spans)))
        assert done.bytes_wrong == 2 * (WARM_UP_ROUNDS + 1)
        # Calls count after the warm-up: a store, a retrieve, both concurrently.
        assert (begun, len(calls.spans)) == ([3 * WARM_UP_ROUNDS], 3)
    finally:
        rank.close()


def test_the_cpu_clock_of_a_process() -> None:
    """Its resolution is finer than the 10 ms of /proc."""
    begun, begun_here = cpu_s(os.getpid()), process_time()
    while process_time() - begun_here < 1e-3:
        pass
    used_s = cpu_s(os.getpid()) - begun
    assert 1e-3 <= used_s < 1
    assert used_s % 1e-2
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_s(2**22)
