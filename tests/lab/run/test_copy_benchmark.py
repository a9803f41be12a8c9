"""Copies for their own sake, by real servers and ranks."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
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
from kvctl.lab.rank.simulated_rank import SEGMENT_PREFIX
from kvctl.lab.report import result_tables
from kvctl.lab.results.result import Result
from kvctl.lab.run.run_monitor import RunWatcher
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


class WhenCopying(RunWatcher):
    """Sends a signal, to us or to the server, when copies begin."""

    def __init__(self, to: str) -> None:
        self.to = to
        self.server = 0

    def phase(self, name: str) -> None:
        """Strike."""
        if name != "copying":
            return
        ours = os.getpid()
        if self.to == "us":
            os.kill(ours, signal.SIGINT)
            return
        # Servers of other tests are children of ours, too.
        (self.server,) = (
            pid for pid in descendants(ours) if "/kvlab-" in command_of(pid)
        )
        os.kill(self.server, signal.SIGKILL)


def play(tmp_path: Path, *settings: str, watcher: RunWatcher | None = None) -> Result:
    """Two sizes of pieces in two orders, and the larger one by two workers."""
    path = tmp_path / "copies.toml"
    path.write_text(SCENARIO)
    result = runner.run("copies", read(path, settings), 0, None, watcher)
    assert not list(SHM_DIR.glob(f"{SEGMENT_PREFIX}{os.getpid()}.*"))
    return result


@pytest.mark.parametrize("by", ["server", "worker"])
def test_every_setting_is_copied_and_checked(tmp_path: Path, by: str) -> None:
    """A row each, by either driver; the server's time is told, no byte was wrong."""
    result = play(tmp_path, f"driver={by}")
    assert result.problems == ()
    assert result.counts.bytes_wrong == 0
    assert [row.setting.workers for row in result.copies] == [1, 1, 1, 1, 2]
    for row in result.copies:
        assert row.call_bytes == row.chunk_bytes == 1 << 20
        assert min(row.store, row.retrieve, row.both) > 0
        assert row.server_s_per_chunk is not None
        assert row.product_slowdown is None
    said = [
        part for part in result_tables.build_tables(result) if isinstance(part, str)
    ]
    assert any(part.startswith("All bytes correct: stores") for part in said)


def test_an_interrupt_ends_copies(tmp_path: Path) -> None:
    """Those that were not begun are left out, and the result says so."""
    result = play(tmp_path, watcher=WhenCopying("us"))
    assert result.interrupted
    assert (result.problems, result.copies) == ((), ())


def test_a_server_that_dies_beneath_copies_is_told(tmp_path: Path) -> None:
    """The run ends with a result, which says how; L1 does not stay behind."""
    watcher = WhenCopying("the server")
    result = play(tmp_path, watcher=watcher)
    assert any("SIGKILL" in problem for problem in result.problems)
    assert result.copies == ()
    assert not list(SHM_DIR.glob(f"{SERVERS_PREFIX}{watcher.server}-*"))


class Wrong(FakeClient):
    """Damages a byte of what it retrieves, and keeps the first store alone."""

    def lookup(self, *_: object) -> None:
        """Find nothing."""

    def end_session(self, _session: object) -> None:
        """Forget it."""

    def store(self, *where: object) -> object:  # type: ignore[override]
        """Keep right bytes, not those that were damaged."""
        return None if self.kept else super().store(*where)  # type: ignore[arg-type]

    def retrieve(self, *where: object) -> object:  # type: ignore[override]
        """Write back what was kept, but for a byte."""
        reply = super().retrieve(*where)  # type: ignore[arg-type]
        assert self.rank
        self.rank.cache.views[0][self.retrieved[0][0], 0, 1, 3, 1, 0] ^= 0xFF
        return reply


@pytest.mark.parametrize("scattered", [True, False])
def test_a_wrong_byte_of_any_call_counts(scattered: bool) -> None:
    """Of a retrieve by itself, and of one beside a store: each round has both."""
    rank, _ = make("tiny-llama")
    client = Wrong()
    client.rank = rank
    caller = replace(rank.caller(), client=client)
    try:
        calls = IsolatedCalls(caller, 2, 0, scattered=scattered, both=True)
        assert not np.intersect1d(calls.blocks[0], calls.other_blocks[0]).size
        begun: list[int] = []
        done = calls.measure(1, lambda: begun.append(len(calls.spans)))
        assert done.bytes_wrong == 2 * (WARM_UP_ROUNDS + 1)
        # Calls count from where all ranks begin: a store, a retrieve, both at once.
        assert (begun, len(calls.spans)) == ([3 * WARM_UP_ROUNDS], 3)
    finally:
        rank.close()


def test_a_process_has_a_clock_of_its_own() -> None:
    """What it computes counts, finer than the 10 ms of its entry in /proc."""
    begun, ours = cpu_s(os.getpid()), process_time()
    while process_time() - ours < 1e-3:
        pass
    taken = cpu_s(os.getpid()) - begun
    assert 1e-3 <= taken < 1
    assert taken % 1e-2
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_s(2**22)
