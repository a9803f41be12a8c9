"""`kvctl bench run` with real servers, engines and ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcore.shm import SHM_DIR
from kvctl.cli import main
from kvctl.lab.rank.rank_cache import SEGMENT_PREFIX
from kvctl.lab.results.result import Result, read
from tests.system.server_fixture import wait_until

SCENARIO = """\
engines = 2
ranks = 2
cache_blocks = 64
[model]
preset = "tiny-llama"
block_size = 16
[server]
chunk_size = 32
l1.size = "8MiB"
l1.page = "4KiB"
[workload]
kind = "chat"
num_sessions = 4
turns = 3
system_tokens = 64
user_tokens = 32
answer_tokens = 32
[load]
concurrency = 2
"""
RUN_S = 50


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    """The path of a scenario with twelve requests."""
    path = tmp_path / "tiny.toml"
    path.write_text(SCENARIO)
    return path


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command in a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "kvctl", "bench", "run", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end; return exit code, stdout and stderr."""
    out, err = process.communicate(timeout=RUN_S)
    return process.returncode, out, err


def result_in(folder: Path) -> Result:
    """Return the only result in a folder."""
    (path,) = folder.glob("*.json")
    return read(path)


def segments(process: subprocess.Popen[str]) -> list[str]:
    """Return the shared-memory segments of a run's simulated caches."""
    return [path.name for path in SHM_DIR.glob(f"{SEGMENT_PREFIX}{process.pid}.*")]


@pytest.mark.parametrize(
    "driver", ["server", pytest.param("worker", marks=pytest.mark.long)]
)
def test_a_run_checks_every_byte_and_saves_a_result(
    scenario: Path, tmp_path: Path, driver: str
) -> None:
    """Two engines of two ranks: exit code 0, a table, and a complete JSON file."""
    chosen = ("--set", f"driver={driver}")
    process = start(scenario, *chosen, "--out", tmp_path / "out")
    code, out, err = finish(process)
    assert code == 0, err
    assert "bytes wrong" in out
    result = result_in(tmp_path / "out")
    counts = result.counts
    assert (counts.requests, counts.errors, counts.bytes_wrong) == (12, 0, 0)
    assert counts.leases_leaked == 0
    assert counts.retrieved_bytes > 0
    assert 0 < result.hit_rates.by_token <= result.hit_rates.ideal_by_token
    assert result.operations["lookup"].count == 12
    assert result.operations["store"].count > 0
    assert result.ceilings is not None
    assert result.shares.ping is not None
    (path,) = (tmp_path / "out").glob("*.json")
    data: dict[str, Any] = json.loads(path.read_text())
    assert data.keys() >= {"version", "scenario", "environment", "hit_rates"}
    assert data["counts"]["bytes_wrong"] == data["counts"]["leases_leaked"] == 0
    assert data["operations"]["lookup"].keys() >= {"p50_s", "p99_s", "max_s"}
    assert data["ceilings"]["copy_gb_per_s"] > 0
    assert not segments(process)


def run_sequentially(
    folder: Path, *settings: str
) -> tuple[subprocess.CompletedProcess[str], Result]:
    """Run the scenario with one engine, one rank and one request at a time."""
    scenario = folder / "tiny.toml"
    scenario.write_text(SCENARIO)
    sequential = ("engines=1", "ranks=1", "load.concurrency=1")
    flags = [flag for one in (*sequential, *settings) for flag in ("--set", one)]
    process = start(scenario, "--out", folder / "out", *flags)
    code, out, err = finish(process)
    done = subprocess.CompletedProcess(process.args, code, out, err)
    return done, result_in(folder / "out")


@pytest.fixture(scope="module")
def hybrid_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Result]:
    """A sequential run of a hybrid model, which misses a limit."""
    settings = ("model.preset=tiny-hybrid", "model.window=48")
    limit = "limits.min_hit_rate=0.99"
    return run_sequentially(tmp_path_factory.mktemp("hybrid"), *settings, limit)


def test_sequential_requests_hit_as_in_an_infinite_cache(
    hybrid_run: tuple[subprocess.CompletedProcess[str], Result],
) -> None:
    """With sufficient room, served hits equal the upper bound."""
    counts = hybrid_run[1].counts
    assert counts.chunks_hit == counts.chunks_hit_ideal
    assert counts.bytes_wrong == 0


@pytest.mark.long
def test_mla_hits_as_in_an_infinite_cache(tmp_path: Path) -> None:
    """With sufficient room, served hits equal the upper bound."""
    done, result = run_sequentially(tmp_path, "model.preset=tiny-mla")
    assert done.returncode == 0, done.stderr
    assert result.counts.chunks_hit == result.counts.chunks_hit_ideal
    assert result.counts.bytes_wrong == 0


@pytest.mark.long
def test_a_trace_is_replayed(scenario: Path, tmp_path: Path) -> None:
    """Rows that share ids hit; --trace sets the file."""
    trace = tmp_path / "t.jsonl"
    ids = ([1, 2, 3], [1, 2, 4], [1, 2, 3])
    rows = [{"input_length": 90, "hash_ids": row} for row in ids]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = SCENARIO.partition("[workload]")[0].replace("engines = 2", "engines = 1")
    scenario.write_text(text + '[workload]\nkind = "trace"\nblock_size = 32\n')
    flags = ("--trace", trace, "--set", "load.concurrency=1", "--out", tmp_path / "out")
    code, _, err = finish(start(scenario, *flags))
    assert code == 0, err
    counts = result_in(tmp_path / "out").counts
    assert (counts.tokens, counts.chunks, counts.chunks_hit) == (270, 6, 4)


def test_a_missed_limit_is_exit_code_1(
    hybrid_run: tuple[subprocess.CompletedProcess[str], Result],
) -> None:
    """The result is saved, and the limit is named."""
    done, result = hybrid_run
    assert done.returncode == 1
    assert "min_hit_rate is 0.99" in done.stdout
    assert result.problems


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--set", "load.concurency=2"], "did you mean load.concurrency"),
        (["--set", "cache_blocks=2"], "cache_blocks = 2 cannot hold it"),
        (["--set", "server.l1.size=1024TiB"], "did not start"),
        (["--server", "nonsense"], "nonsense"),
        (["--trace", "x.jsonl"], "--trace x.jsonl: unknown key workload.trace"),
        (["--out", "/dev/null"], "--out /dev/null: not a folder"),
        (["--out", "/proc/x"], "--out /proc/x: No such file"),
        (["--seed", "-1"], "--seed"),
        (["--fail-on", "worst"], "--fail-on worst: comma-separated rules"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    scenario: Path,
    tmp_path: Path,
    flags: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is saved, and no shared memory remains."""
    out = ["--out", str(tmp_path / "out")]
    arguments = ["kvctl", "bench", "run", str(scenario), *out, *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    err = capsys.readouterr().err
    assert says in err.strip().splitlines()[-1]
    assert "running" not in err
    assert not (tmp_path / "out").exists()
    assert not list(SHM_DIR.glob(f"{SEGMENT_PREFIX}{os.getpid()}.*"))


def start_long_run(scenario: Path, out: Path) -> subprocess.Popen[str]:
    """Start a run of several minutes, and wait until its load has begun."""
    flags = ("--set", "workload.turns=5", "--set", "workload.num_sessions=100000")
    process = start(scenario, "--out", out, *flags)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if " requests, " in line:
            return process
    raise AssertionError(f"no load: {lines}, {process.communicate()}")


def descendants(pid: int) -> list[int]:
    """Return the servers, engines and ranks that a process has started."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    # Python's resource tracker ends a little later.
    return [pid for pid in children if "resource_tracker" not in command_of(pid)]


def command_of(pid: int) -> str:
    """Return the command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.long
def test_an_interrupt_keeps_the_measurements(scenario: Path, tmp_path: Path) -> None:
    """Ctrl-C in the whole process group: a result is saved, and no process remains."""
    process = start_long_run(scenario, tmp_path / "out")
    children = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 0, err
    result = result_in(tmp_path / "out")
    assert result.interrupted
    assert result.counts.requests > 0
    assert result.counts.bytes_wrong == 0
    assert len(children) >= 7
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not segments(process)


def test_an_interrupt_before_the_load_saves_nothing(
    scenario: Path, tmp_path: Path
) -> None:
    """No process and no shared memory remains."""
    process = start(scenario, "--set", "ranks=2", "--out", tmp_path / "out")
    assert process.stderr is not None
    assert "starting" in process.stderr.readline()
    wait_until(lambda: len(descendants(process.pid)) >= 6)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130, out + err
    assert "interrupted" in err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.json"))
    assert not segments(process)


def kill_one(process: subprocess.Popen[str], word: str) -> None:
    """Kill the first child whose command line contains a word."""
    pids = [pid for pid in descendants(process.pid) if word in command_of(pid)]
    os.kill(pids[0], signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    ("word", "reason"), [("spawn_main", "exit code"), (" serve ", "SIGKILL")]
)
def test_a_death_ends_the_run_with_an_error(
    scenario: Path, tmp_path: Path, word: str, reason: str
) -> None:
    """A killed rank or server is named once; calls in progress do not delay the end."""
    process = start_long_run(scenario, tmp_path / "out")
    kill_one(process, word)
    code, out, _ = finish(process)
    assert code == 1
    result = result_in(tmp_path / "out")
    assert result.counts.errors >= 1
    assert any(reason in problem for problem in result.problems), out
    assert out.count(reason) == 1
    assert "did not stop" not in out
    assert not segments(process)


def test_a_given_server_is_used_and_left_running(
    scenario: Path, tmp_path: Path
) -> None:
    """--server: its chunk size is used, its L1 keeps chunks, and it continues."""
    from kvcore.client import KVClient
    from kvcore.config import ServerConfig
    from kvcore.option_structs import load
    from kvctl.lab.systems.child_processes import LocalServer

    settings = ["chunk_size=64", "l1.size=16MiB", "l1.page=4KiB"]
    server = LocalServer(load(ServerConfig, None, settings))
    try:
        flags = ["--set", "engines=1", "--set", "ranks=1"]
        flags += ["--server", server.address, "--out", str(tmp_path / "out")]
        code, _, err = finish(start(scenario, *flags))
        assert code == 0, err
        result = result_in(tmp_path / "out")
        assert result.scenario.server.chunk_size == 64
        assert result.server_bytes is None
        with KVClient(server.address) as client:
            status = client.status()
        assert status.l1.num_chunks > 0
        assert (status.num_leases, status.instances) == (0, ())
    finally:
        assert server.stop() is None


@pytest.mark.long
def test_a_run_can_be_limited_in_time(scenario: Path, tmp_path: Path) -> None:
    """`load.max_s`: no request begins after it, and the run has no problems."""
    settings = ["load.max_s=0.3", "workload.num_sessions=10000"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    code, _, err = finish(start(scenario, "--out", tmp_path / "out", *flags))
    assert code == 0, err
    result = result_in(tmp_path / "out")
    assert not result.interrupted
    assert 0 < result.counts.requests < 30_000
