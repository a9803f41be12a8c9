"""Faults under load: a server and a worker die in the middle of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvctl.lab import runner as driver
from kvctl.lab.config.scenario import read

SCENARIO = """\
engines = 2
ranks = 2
cache_blocks = 128
timeout_s = 1.0
[model]
preset = "tiny-llama"
[server]
chunk_size = 32
l1.size = "16MiB"
l1.page = "4KiB"
[workload]
kind = "shared_prefix"
num_requests = 400
prefix_tokens = 256
suffix_tokens = 64
[load]
kind = "constant"
rate = 80
[limits]
max_errors = 400
[[faults]]
at_s = 0.5
action = "kill"
for_s = 0.1
[[faults]]
at_s = 2.5
target = "worker"
action = "kill"
engine = 1
rank = 1
for_s = 0.1
"""


@pytest.mark.long
def test_a_run_continues_after_deaths(tmp_path: Path) -> None:
    """The run recovers from both; no byte is wrong, no lease leaks."""
    path = tmp_path / "s.toml"
    path.write_text(SCENARIO)
    result = driver.run("faults", read(path), 0, None)
    assert result.problems == ()
    counts = result.counts
    assert (counts.bytes_wrong, counts.leases_leaked) == (0, 0)
    assert counts.retrieved_bytes > 0
    assert result.load is not None
    server, worker = result.load.faults
    for fault in (server, worker):
        assert fault.back_s is not None
        assert fault.recovered_s is not None
    assert worker.noticed_s is not None
    assert counts.requests >= 390
