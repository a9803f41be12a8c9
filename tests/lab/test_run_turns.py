"""Turns of two interleaved runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvcore.config import L1Config
from kvcore.errors import SetupError
from kvcore.option_structs import ByteSize
from kvctl.lab.config.scenario import ModelConfig, Scenario
from kvctl.lab.config.workload_config import Chat
from kvctl.lab.run_turns import RunTurns, fit_in_memory

JOIN_S = 20


def run(address: str, num_requests: int, execute: Callable[[], None]) -> list[int]:
    """Run two requests per turn; return the requests done after each full turn."""
    counts: list[int] = []
    with closing(RunTurns(address)) as turns:
        for number in range(1, num_requests + 1):
            turns.acquire()
            execute()
            if number % 2 == 0:
                counts.append(number)
                turns.release()
    return counts


def test_two_runs_alternate_and_the_longer_one_continues(tmp_path: Path) -> None:
    """AABBAABB, then the rest of the run with more requests."""
    order: list[str] = []
    path = tmp_path / "turns"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, f"first:{path}", 4, lambda: order.append("A"))
        second = pool.submit(run, f"second:{path}", 7, lambda: order.append("B"))
        assert first.result(JOIN_S) == [2, 4]
        assert second.result(JOIN_S) == [2, 4, 6]
    assert "".join(order) == "AABBAABBBBB"


def test_a_run_continues_after_the_end_of_the_other(tmp_path: Path) -> None:
    """It does not wait for a token that cannot come."""
    path = tmp_path / "turns"
    met = threading.Event()

    def die() -> None:
        RunTurns(f"second:{path}").close()
        met.set()

    with ThreadPoolExecutor(1) as pool:
        dead = pool.submit(die)
        assert run(f"first:{path}", 5, lambda: None) == [2, 4]
        dead.result(JOIN_S)
    assert met.is_set()


@pytest.mark.parametrize("address", ["", "third:/x", "first:", "first"])
def test_a_wrong_address_is_a_setup_error(address: str) -> None:
    """The error describes the format."""
    with pytest.raises(SetupError, match="first:PATH or second:PATH"):
        RunTurns(address)


def test_runs_without_memory_for_both_are_not_interleaved() -> None:
    """Memory of the servers' L1 and of the engines' caches counts."""
    small = Scenario(ModelConfig("tiny-llama"), Chat())
    large = replace(
        small, server=replace(small.server, l1=L1Config(size=ByteSize(1 << 50)))
    )
    assert fit_in_memory(small, replace(small, cache_blocks=64))
    assert not fit_in_memory(small, large)
    assert not fit_in_memory(small, replace(small, cache_blocks=1 << 40))
