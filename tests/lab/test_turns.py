"""Two sides take turns, some requests each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvcore.config import L1Config
from kvcore.errors import SetupError
from kvcore.options import ByteSize
from kvctl.lab.interleaving import Interleaving, fit_at_once
from kvctl.lab.scenario import Chat, ModelConfig, Scenario

JOIN_S = 20


def play(place: str, number: int, played: Callable[[], None]) -> list[int]:
    """Play so many requests, two a turn; return how many were over at each end."""
    ends: list[int] = []
    count = 0

    def ended() -> None:
        ends.append(count)

    turns = Interleaving(place, 2, ended)
    for _ in range(number):
        turns.take()
        played()
        count += 1
        turns.done()
    turns.close()
    return ends


def test_two_sides_alternate_and_the_longer_goes_on(tmp_path: Path) -> None:
    """AABBAABB, then the rest of the one that has more to play."""
    order: list[str] = []
    path = tmp_path / "turns"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(play, f"first:{path}", 4, lambda: order.append("A"))
        second = pool.submit(play, f"second:{path}", 7, lambda: order.append("B"))
        assert first.result(JOIN_S) == [2, 4]
        assert second.result(JOIN_S) == [2, 4, 6]
    assert "".join(order) == "AABBAABBBBB"


def test_a_side_that_dies_leaves_the_other_playing(tmp_path: Path) -> None:
    """Nobody waits for a turn that cannot come."""
    path = tmp_path / "turns"
    met = threading.Event()

    def die() -> None:
        Interleaving(f"second:{path}", 2, lambda: None).close()
        met.set()

    with ThreadPoolExecutor(1) as pool:
        dead = pool.submit(die)
        assert play(f"first:{path}", 5, lambda: None) == [2, 4]
        dead.result(JOIN_S)
    assert met.is_set()


@pytest.mark.parametrize("place", ["", "third:/x", "first:", "first"])
def test_a_wrong_place_is_wrong_use(place: str) -> None:
    """The error says how it is written."""
    with pytest.raises(SetupError, match="first:PATH or second:PATH"):
        Interleaving(place, 1, lambda: None)


def test_sides_without_memory_for_both_do_not_meet() -> None:
    """The servers' L1 and the engines' caches count."""
    small = Scenario(ModelConfig("tiny-llama"), Chat())
    large = replace(
        small, server=replace(small.server, l1=L1Config(size=ByteSize(1 << 50)))
    )
    assert fit_at_once(small, replace(small, cache_blocks=64))
    assert not fit_at_once(small, large)
    assert not fit_at_once(small, replace(small, cache_blocks=1 << 40))
