"""Scenario files: reading, and errors of invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcore.errors import SetupError
from kvctl.lab.config.scenario import find_scenario, read
from kvctl.lab.config.workload_config import Chat, Trace

TEXT = """\
engines = 2
ranks = 2
[model]
preset = "tiny-llama"
block_size = 32
[workload]
kind = "chat"
turns = 3
[server]
l1.size = "64MiB"
[load]
concurrency = 2
"""


def scenario(tmp_path: Path, text: str = TEXT) -> Path:
    """Write a scenario file."""
    path = tmp_path / "s.toml"
    path.write_text(text)
    return path


def test_a_scenario_reads_with_presets_and_overrides(tmp_path: Path) -> None:
    """Fields come from the preset, the file and --set."""
    found = read(scenario(tmp_path), ["load.concurrency=8", "server.chunk_size=512"])
    assert found.model.geometry().block_size == 32
    assert found.model.geometry().num_layers == 2
    assert isinstance(found.workload, Chat)
    assert found.workload.turns == 3
    assert found.load.concurrency == 8
    assert (found.server.l1.size, found.server.chunk_size) == (64 << 20, 512)


def test_another_workload_can_be_set(tmp_path: Path) -> None:
    """The kind of a workload determines its keys."""
    text = '[model]\npreset = "tiny-mla"\n[workload]\nkind = "trace"\n'
    found = read(scenario(tmp_path, text), ["workload.trace=a.jsonl"])
    assert found.workload == Trace(trace="a.jsonl")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("turns = 3", "turnz = 3", r"s\.toml:8: .*workload\.turnz.*workload\.turns"),
        ("ranks = 2", "rank = 2", r"s\.toml:2: .*rank; did you mean ranks"),
        ('"chat"', '"chatty"', r"s\.toml.*workload.*chatty"),
        ("turns = 3", 'turns = "x"', r"s\.toml:8: workload\.turns"),
        ('"tiny-llama"', '"tinny-llama"', r"s\.toml.*did you mean 'tiny-llama'"),
        ("block_size = 32", "block_size = 48", r"s\.toml.*server\.chunk_size = 256"),
        ("ranks = 2", "ranks = 3", r"s\.toml.*2 KV heads: 3 ranks"),
        ('kind = "chat"\nturns = 3', 'kind = "trace"', "--trace FILE"),
        ("engines = 2", "engines = [", r"s\.toml"),
        ("concurrency = 2", "concurrency = 0", r"s\.toml:12: load\.concurrency"),
    ],
)
def test_errors_of_a_file_are_located(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    """The error has file, line, key and the nearest known key."""
    with pytest.raises(SetupError, match=says):
        read(scenario(tmp_path, TEXT.replace(old, new)))


def test_a_bundled_scenario_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is found from any folder; an existing file takes precedence."""
    monkeypatch.chdir(tmp_path)
    assert find_scenario("quickstart").read_text().startswith("# ")
    assert find_scenario("x.toml") == Path("x.toml")
    (tmp_path / "quickstart").write_text("")
    assert find_scenario("quickstart") == Path("quickstart")


def test_an_unknown_name_lists_the_nearest_ones() -> None:
    """The error lists similar bundled scenarios."""
    with pytest.raises(SetupError, match=r"quikstart: no such file.*: quickstart"):
        find_scenario("quikstart")
