"""`kvctl bench run` of documents, with real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvctl.lab.results.result import DocumentReuse, Result, read

SCENARIO = """\
engines = 2
ranks = 2
cache_blocks = 64
[model]
preset = "tiny-llama"
block_size = 16
[server]
engine = "blend"
chunk_size = 32
l1.size = "8MiB"
l1.page = "4KiB"
[workload]
kind = "documents"
num_requests = 16
num_documents = 6
document_tokens = 128
documents_per_request = 3
system_tokens = 64
glue_tokens = 16
[load]
concurrency = 2
"""
RUN_S = 50


def run(folder: Path, *arguments: str) -> tuple[Result, str, int]:
    """Run the scenario; return the result, stdout and the exit code."""
    scenario = folder / "documents.toml"
    scenario.write_text(SCENARIO)
    command = [sys.executable, "-m", "kvctl", "bench", "run", str(scenario)]
    done = subprocess.run(
        [*command, "--out", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    (path,) = folder.glob("documents-*.json")
    return read(path), done.stdout, done.returncode


def reuse(result: Result) -> DocumentReuse:
    """Return the reuse of documents in a result."""
    assert result.documents is not None
    return result.documents


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_documents_are_reused_at_any_position(tmp_path: Path, ranks: int) -> None:
    """Two engines reuse each other's documents, and no byte is wrong."""
    result, printed, code = run(tmp_path, "--set", f"ranks={ranks}")
    assert code == 0, result.problems
    counts, documents = result.counts, reuse(result)
    assert (counts.requests, counts.errors) == (16, 0)
    assert (counts.bytes_wrong, counts.leases_leaked) == (0, 0)
    assert counts.retrieved_bytes > 0
    assert 0 < documents.chunks_hit <= documents.chunks_hit_ideal < documents.chunks
    assert documents.tokens_hit > counts.tokens_hit
    assert "prefixes only" in printed
    assert "documents at any position" in printed
    share = documents.tokens_hit / counts.tokens
    assert f"{share:.0%} with documents reused at any position" in printed


@pytest.mark.long
def test_a_missed_share_of_the_upper_bound_is_exit_code_1(tmp_path: Path) -> None:
    """The limit is named with the measured share: this L1 is far too small."""
    limits = (
        "--set",
        "limits.min_documents_share=1.0",
        "--set",
        "server.l1.size=64KiB",
    )
    result, _, code = run(tmp_path, *limits)
    assert code == 1
    (problem,) = result.problems
    assert problem.startswith("min_documents_share is 1.0, reached ")
