"""The steps of `make gpu`: each is reported, and stopped after its time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.run_steps import ROOT, Step, run_steps
from tests.gpu.targets import targets_of
from tests.system.server_fixture import wait_until

SITE = Path(__file__).parent / "site"
HANGS = """\
import subprocess, sys, threading
def hang_here():
    threading.Event().wait()
if "child" in sys.argv:
    hang_here()
subprocess.run([sys.executable, __file__, "child"], start_new_session=True)
"""


RUNNER = """\
import sys
from argparse import Namespace
from pathlib import Path
from tests.gpu import run_steps as steps
steps.steps = lambda *_: [steps.Step("hangs", 50, (sys.argv[2],))]
steps.main(Namespace(folder=Path(sys.argv[1]), trace=None, set=[]))
"""


@pytest.fixture(autouse=True)
def site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every Python handle SIGUSR1, as `make gpu` does."""
    paths = f"{SITE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", paths)


def known(folder: Path) -> Any:
    """Return the saved result."""
    return json.loads((folder / "gpu.json").read_text())


def left(script: Path) -> list[str]:
    """Return the processes that run a script."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[1:2] == [str(script).encode()]:
            found.append(path.parent.name)
    return found


def test_a_failed_step_does_not_stop_others(tmp_path: Path) -> None:
    """The output of both is kept, and lines of JSON are figures."""
    bad = Step("bad", 30, ("-c", "print('before'); raise SystemExit('why')"))
    good = Step("good", 30, ("-c", "print('{\"one\": 1}'); print('after')"))
    ended = run_steps([bad, good], tmp_path, 60)
    assert [one.exit_code for one in ended] == [1, 0]
    log = (tmp_path / "log.txt").read_text()
    assert all(f"{word}\n" in log for word in ("before", "why", "after"))
    assert [step["figures"] for step in known(tmp_path)["steps"]] == [[], [{"one": 1}]]


def test_a_hung_step_leaves_the_stacks_of_all_its_processes(tmp_path: Path) -> None:
    """Also of a child in its own session; the next step runs, no process is left."""
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    ended = run_steps(
        [Step("hangs", 2, (str(script),)), Step("good", 30, ("-c", "0"))], tmp_path, 60
    )
    assert [one.hung for one in ended] == [True, False]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("-- stacks of process") == 2
    assert log.count("in hang_here") == 1
    assert "hangs.py child" in log
    assert not left(script)


def test_steps_end_without_a_needed_step(tmp_path: Path) -> None:
    """A needed step's failure ends the run; so does the time budget."""
    needed = Step("facts", 30, ("-c", "raise SystemExit('no card')"), is_needed=True)
    other = Step("other", 30, ("-c", "0"))
    assert [one.name for one in run_steps([needed, other], tmp_path, 60)] == ["facts"]
    (late,) = run_steps([other], tmp_path, 0)
    assert late.exit_code is None
    assert "not started" in str(late)


def row(workers: int, order: str, piece: int, **values: float) -> dict[str, Any]:
    """Return a row as a scenario saves it; targets are met except for `values`."""
    setting = {"workers": workers, "order": order, "piece_bytes": piece}
    well = {
        "store": 0.99,
        "retrieve": 0.99,
        "both": 0.95,
        "spread": 0.01,
        "server_s_per_chunk": 1e-5,
        "chunk_bytes": 32 << 20,
        "product_slowdown": None,
    }
    return {"setting": setting, **well, **values}


def test_targets_use_the_worst_value() -> None:
    """Each kind of row has its own targets; an unmeasured target has no result."""
    rows = [
        row(1, "scattered", 4096, store=0.8),
        row(1, "contiguous", 4096, retrieve=0.94),
        row(1, "scattered", 1 << 20, both=0.91, server_s_per_chunk=2e-4),
        row(8, "scattered", 32768, spread=0.2, store=0.1),
    ]
    scenario = {"driver": "server"}
    results = [
        {"name": "h100_store_retrieve", "scenario": scenario, "copies": rows},
        {
            "name": "h100_busy",
            "scenario": scenario,
            "copies": [row(1, "scattered", 8192, product_slowdown=0.04)],
        },
    ]
    figures = {
        "copies": [{"programs_a_launch": 6}, {"piece_bytes": 4096}],
        "first_byte": [{"first_byte_s": 0.003}],
    }
    made = targets_of(figures, results)
    by_server = [(one.measured, one.is_met) for one in made if one.by == "server"]
    assert by_server == [
        (0.99, True),  # store
        (0.94, False),  # retrieve
        (0.91, True),  # both
        (0.8, False),  # store, small and scattered
        (0.99, True),
        (2e-4, False),  # the server's CPU
        (0.2, False),  # 8 workers
        (0.04, True),  # the matrix product
        (0.003, False),  # the first byte
    ]
    assert {one.is_met for one in made if one.by == "worker"} == {None}
    assert [one.is_met for one in made if one.by == "both"] == [True]
    assert all(str(one) for one in made)


def test_an_interrupted_run_ends_its_step_first(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM do not reach a step's session; no process is left."""
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    runner = (sys.executable, "-c", RUNNER, str(tmp_path), str(script))
    process = subprocess.Popen(runner, cwd=ROOT)
    wait_until(lambda: len(left(script)) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    assert not left(script)
