"""`kvctl bench run --versus`, `--versus-set`, `--versus-system` as commands."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from kvctl.lab.compare.comparison import COMPARISON, read_results
from tests.lab.run.test_bench_run import finish, start

TURNS = Path(__file__).with_name("turns.toml")
FAKE_VALKEY = f"""#!{sys.executable}
import os, socketserver, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.lab.systems.test_systems import FakeValkey
path = sys.argv[sys.argv.index("--unixsocket") + 1]
with socketserver.ThreadingUnixStreamServer(path, FakeValkey) as serving:
    serving.daemon_threads = True
    serving.serve_forever()
"""


def comparison_in(folder: Path) -> Path:
    """Return the folder of the saved comparison."""
    (found,) = folder.glob("*-versus-*")
    return found


@pytest.mark.parametrize("repeat", [1, pytest.param(2, marks=pytest.mark.long)])
def test_another_setting_is_compared_by_its_counts(tmp_path: Path, repeat: int) -> None:
    """A small L1: fewer hits are a regression, exit code 1."""
    flags = ("--versus-set", "server.l1.size=32KiB", "--repeat", str(repeat))
    code, out, err = finish(start(TURNS, *flags, "--out", tmp_path / "out"))
    assert code == 1, err
    assert "regression: tokens_hit: " in out
    assert "server.l1.size" in out
    folder = comparison_in(tmp_path / "out")
    assert (folder / COMPARISON).exists()
    base, new = read_results(folder / "base"), read_results(folder / "new")
    numbers = list(range(repeat))
    for side in (base, new):
        assert [one.repetition and one.repetition.number for one in side] == numbers
    assert base[0].turns, "the runs of a pair are interleaved"
    assert new[0].counts.tokens_hit < base[0].counts.tokens_hit


@pytest.mark.long
def test_another_scenario_runs_in_pairs(tmp_path: Path) -> None:
    """An equal scenario: equal counts, too few runs, exit code 0."""
    other = Path(shutil.copy(TURNS, tmp_path / "other.toml"))
    flags = ("--versus", other, "--repeat", "1", "--out", tmp_path / "out")
    code, out, err = finish(start(TURNS, *flags))
    assert code == 0, err
    assert "Too few runs to compare other with turns" in out
    assert "counts are equal" in out
    (base,) = read_results(comparison_in(tmp_path / "out") / "base")
    assert base.turns, "the runs of a pair are interleaved"


@pytest.mark.long
def test_another_system_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake Valkey and kvctl: equal hits, all bytes correct."""
    fake = tmp_path / "valkey-server"
    fake.write_text(FAKE_VALKEY)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    flags = ("--system", "valkey", "--versus-system", "kvctl")
    code, out, err = finish(start(TURNS, *flags, "--out", tmp_path / "out"))
    assert code == 0, out + err
    assert "valkey" in out
    folder = comparison_in(tmp_path / "out")
    (theirs,), (ours,) = read_results(folder / "base"), read_results(folder / "new")
    assert [theirs.system.name, ours.system.name] == ["valkey", "kvctl"]
    assert theirs.counts.tokens_hit == ours.counts.tokens_hit > 0
    assert theirs.counts.bytes_wrong == ours.counts.bytes_wrong == 0
    assert "end_session" not in theirs.operations, "it has none"
    assert theirs.turns, "the two systems are interleaved"
    assert ours.turns, "the two systems are interleaved"
    assert not list(scratch.iterdir())


def test_a_side_that_cannot_start_ends_the_pair(tmp_path: Path) -> None:
    """With its own message; the other side does not wait for it."""
    flags = ("--versus-system", "lmcache", "--system-python", tmp_path / "python")
    code, _, err = finish(start(TURNS, *flags, "--out", tmp_path / "out"))
    assert code == 2
    assert err.splitlines()[-1].endswith("no lmcache in its folder")


def test_error_in_versus_set_names_that_flag(tmp_path: Path) -> None:
    """Not --set, which is correct."""
    flags = ("--set", "ranks=1", "--versus-set", "rank=2", "--out", tmp_path / "out")
    code, _, err = finish(start(TURNS, *flags))
    assert code == 2
    assert "--versus-set rank=2: unknown key rank" in err
