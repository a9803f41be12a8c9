"""`kvctl bench run --versus` and its like as a user starts them: two sides, judged."""

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


def contest_in(folder: Path) -> Path:
    """The folder of the one comparison that was saved."""
    (found,) = folder.glob("*-versus-*")
    return found


def test_another_setting_is_judged_by_its_counts(tmp_path: Path) -> None:
    """An L1 that holds little: fewer hits are a regression, exit code 1."""
    flags = ("--versus-set", "server.l1.size=32KiB", "--repeat", "2")
    code, out, err = finish(start(TURNS, *flags, "--out", tmp_path / "out"))
    assert code == 1, err
    assert "regression: tokens_hit: " in out
    assert "server.l1.size" in out
    folder = contest_in(tmp_path / "out")
    assert (folder / COMPARISON).exists()
    base, new = read_results(folder / "base"), read_results(folder / "new")
    assert [len(base), len(new)] == [2, 2]
    assert [one.repetition and one.repetition.number for one in base] == [0, 1]
    assert new[0].counts.tokens_hit < base[0].counts.tokens_hit


def test_another_scenario_is_played_in_pairs(tmp_path: Path) -> None:
    """The same under another name: equal counts, too few runs, exit code 0."""
    other = Path(shutil.copy(TURNS, tmp_path / "other.toml"))
    flags = ("--versus", other, "--repeat", "1", "--out", tmp_path / "out")
    code, out, err = finish(start(TURNS, *flags))
    assert code == 0, err
    assert "Too few runs to compare other with turns" in out
    assert "counts are equal" in out
    (base,) = read_results(contest_in(tmp_path / "out") / "base")
    assert base.turns, "the runs of a pair took turns"


def test_another_system_stands_in_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Valkey beside ours: the same hits, every byte right."""
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
    folder = contest_in(tmp_path / "out")
    (theirs,), (ours,) = read_results(folder / "base"), read_results(folder / "new")
    assert [theirs.system.name, ours.system.name] == ["valkey", "kvctl"]
    assert theirs.counts.tokens_hit == ours.counts.tokens_hit > 0
    assert theirs.counts.bytes_wrong == ours.counts.bytes_wrong == 0
    assert "end_session" not in theirs.operations, "it has none"
    assert theirs.turns, "the two systems took turns"
    assert ours.turns, "the two systems took turns"
    assert not list(scratch.iterdir())


def test_a_side_that_cannot_begin_is_told_at_once(tmp_path: Path) -> None:
    """In its own words; the other does not wait for it."""
    flags = ("--versus-system", "lmcache", "--system-python", tmp_path / "python")
    code, _, err = finish(start(TURNS, *flags, "--out", tmp_path / "out"))
    assert code == 2
    assert err.splitlines()[-1].endswith("no lmcache in its folder")


def test_what_is_wrong_in_versus_set_is_named_so(tmp_path: Path) -> None:
    """Not --set, which was right."""
    flags = ("--set", "ranks=1", "--versus-set", "rank=2", "--out", tmp_path / "out")
    code, _, err = finish(start(TURNS, *flags))
    assert code == 2
    assert "--versus-set rank=2: unknown key rank" in err
