"""Simulated hits against reference algorithms, and the command's output."""

from __future__ import annotations

import json
from collections import OrderedDict
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import SetupError
from kvcore.keys import ChunkHash
from kvcore.storage.eviction import POLICIES, make_policy
from kvctl.cli import main
from kvctl.lab.workload.cache_simulation import (
    Ids,
    NumberedRequests,
    SimulatedL1,
    SimulationRow,
    capacity_blocks,
    load,
    optimum,
    simulate,
    table,
)

Prompt = list[int]

ROWS = [
    {"input_length": 20, "hash_ids": [1, 2, 3], "block_size": 8},
    {"input_length": 24, "hash_ids": [1, 2, 9], "block_size": 8},
    {"input_length": 20, "hash_ids": [1, 2, 3], "block_size": 8},
    {"input_length": 16, "hash_ids": [1, 2, 3, 4], "block_size": 4},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a trace whose rows have two block sizes."""
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def prompts() -> st.SearchStrategy[list[Prompt]]:
    """Generate requests over a small prefix tree; a number implies its prefix."""
    branch = st.lists(st.integers(1, 2), min_size=1, max_size=6)
    return st.lists(branch.map(_chained), max_size=40)


def _chained(branch: list[int]) -> Prompt:
    numbers, number = [], 0
    for step in branch:
        number = number * 3 + step
        numbers.append(number)
    return numbers


def serve(name: str, capacity: int, requests: list[Prompt]) -> list[int]:
    """Serve requests from a simulated L1."""
    cache = SimulatedL1(make_policy(name), capacity)
    return [
        cache.serve([ChunkHash(bytes([n % 256, n >> 8])) for n in r]) for r in requests
    ]


def leading(prompt: Prompt, present: set[int] | OrderedDict[int, None]) -> int:
    """Count the blocks before the first missing one."""
    return next((i for i, n in enumerate(prompt) if n not in present), len(prompt))


def array(prompt: Prompt) -> Ids:
    """Return prompts as arrays of block numbers."""
    return np.array(prompt, np.int64)


@given(prompts(), st.integers(1, 12))
def test_lru_equals_the_reference(requests: list[Prompt], capacity: int) -> None:
    """Blocks of a request become the most recently used, last to first."""
    order: OrderedDict[int, None] = OrderedDict()
    expected = []
    for prompt in requests:
        expected.append(leading(prompt, order))
        for number in reversed(prompt):
            order[number] = None
            order.move_to_end(number)
            if len(order) > capacity:
                order.popitem(last=False)
    assert serve("lru", capacity, requests) == expected


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(requests=prompts(), capacity=st.integers(1, 12))
def test_no_policy_beats_the_optimum(
    name: str, requests: list[Prompt], capacity: int
) -> None:
    """Policy <= optimum <= ideal; a cache of all blocks equals the ideal."""
    ideal, seen = [], set[int]()
    for prompt in requests:
        ideal.append(leading(prompt, seen))
        seen.update(prompt)
    best = optimum([array(prompt) for prompt in requests], capacity)
    assert sum(serve(name, capacity, requests)) <= sum(best) <= sum(ideal)
    assert serve(name, max(1, len(seen)), requests) == ideal
    assert optimum([array(prompt) for prompt in requests], max(1, len(seen))) == ideal


@given(prompts().map(lambda requests: requests[:6]), st.integers(1, 3))
def test_the_optimum_equals_exhaustive_search(
    requests: list[Prompt], capacity: int
) -> None:
    """No choice of kept blocks gives more hits."""
    states = {frozenset[int](): 0}
    for prompt in requests:
        reached: dict[frozenset[int], int] = {}
        for kept, hits in states.items():
            total = hits + leading(prompt, set(kept))
            pool = sorted(kept.union(prompt))
            for chosen in combinations(pool, min(capacity, len(pool))):
                state = frozenset(chosen)
                reached[state] = max(reached.get(state, 0), total)
        states = reached
    best = optimum([array(prompt) for prompt in requests], capacity)
    assert sum(best) == max(states.values())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_request_never_evicts_itself(name: str) -> None:
    """Of a request that does not fit, the first blocks are stored and found again."""
    long = _chained([1] * 9)
    assert serve(name, 6, [long[:4], long, long]) == [0, 4, 6]


def test_a_partial_block_counts_its_own_tokens(path: Path) -> None:
    """Blocks of different sizes are distinct; a partial one has fewer tokens."""
    requests = load(path)
    assert requests.num_unique == 4 + 4
    ideal, best, lru = simulate(requests, ["lru"], ["100%"])
    counts = (2 + 3, 16 + 20, 13, 80)
    assert ideal == SimulationRow(str(path), "ideal", 8, *counts)
    assert best == SimulationRow(str(path), "optimum", 8, *counts)
    assert lru == SimulationRow(str(path), "lru", 8, *counts)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("50%", 100), ("0.1%", 1), ("7", 7), ("14.5%", 29), (" 2.5% ", 5)],
)
def test_a_capacity_is_a_number_or_a_share(text: str, blocks: int) -> None:
    """A share refers to the unique blocks; the capacity is at least one."""
    assert capacity_blocks(text, 200) == blocks


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "0%", "5%x", "nan%", "1.5", "%"])
def test_a_bad_capacity_is_refused(text: str) -> None:
    """The error contains the given text."""
    with pytest.raises(SetupError, match=r"--capacity .*must be a number of blocks"):
        capacity_blocks(text, 200)


def test_an_empty_trace_has_rows_without_hits() -> None:
    """An empty trace causes no division by zero."""
    empty = NumberedRequests("none", [], [], [], 0)
    rows = list(simulate(empty, ["lru"], ["10%"]))
    assert [row.block_accesses for row in rows] == [0, 0, 0]
    assert len(table(empty, rows).rows) == 3


def test_the_command_prints_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` prints rows, without it a table; wrong use is exit code 2."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["kvctl", "bench", "simulate", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        return int(exited.value.code or 0)

    policies = (str(path), "--policy", "lru,s3fifo")
    assert run(*policies, "--capacity", "3,50%", "--json") == 0
    rows = msgspec.json.decode(capsys.readouterr().out, type=list[SimulationRow])
    shown = [(row.policy, row.capacity_blocks) for row in rows]
    sizes = [(name, n) for n in (3, 4) for name in ("optimum", "lru", "s3fifo")]
    assert shown == [("ideal", 8), *sizes]
    assert run(*policies) == 0
    assert "of tokens" in capsys.readouterr().out
    assert run(str(path), "--policy", "zzz") == 2
    assert "--policy zzz: known policies are" in capsys.readouterr().err
