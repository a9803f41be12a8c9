"""`kvctl serve --record`: a replay of the recording has the same hits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvctl.lab import runner as driver
from kvctl.lab.config.scenario import Scenario, read

SCENARIO = """\
cache_blocks = 32
[model]
preset = "tiny-llama"
[server]
chunk_size = 32
l1.size = "64KiB"
l1.page = "4KiB"
[workload]
kind = "rag"
num_requests = 30
num_documents = 8
documents_per_request = 2
document_tokens = 64
system_tokens = 64
question_tokens = 20
[load]
concurrency = 1
"""


def scenario(folder: Path, *settings: str) -> Scenario:
    """A scenario with a small L1, so that hits depend on the order of requests."""
    path = folder / "s.toml"
    path.write_text(SCENARIO)
    return read(path, settings)


@pytest.mark.long
def test_a_recording_replays_to_the_same_hits(tmp_path: Path) -> None:
    """The recording has hashes only; hits and evictions are the same."""
    recorded = tmp_path / "r.jsonl"
    live = driver.run("a", scenario(tmp_path, f"server.record={recorded}"), 0, None)
    assert live.problems == ()
    lines = recorded.read_text().splitlines()[: live.counts.requests]
    first = json.loads(lines[0])
    assert first.keys() >= {"timestamp", "input_length", "hash_ids", "session_id"}
    assert "tokens" not in recorded.read_text()
    recorded.write_text("\n".join(lines))
    workload = f'workload={{kind="trace", trace="{recorded}"}}'
    again = driver.run("b", scenario(tmp_path, workload), 0, None)
    assert 0 < live.counts.chunks_hit < live.counts.chunks_hit_ideal
    assert again.counts.chunks_hit == live.counts.chunks_hit
    assert again.counts.chunks_hit_ideal == live.counts.chunks_hit_ideal
    assert again.counts.parts_stored == live.counts.parts_stored
