"""Splitting a prompt into paragraphs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.blend.paragraphs import PRESETS, Markers, make_markers, split_paragraphs
from kvcore.config import BlendConfig
from kvcore.errors import SetupError


def pieces(tokens: list[int], markers: Markers) -> list[list[int]]:
    """Return the tokens of each paragraph."""
    array = np.array(tokens, np.uint32)
    return [tokens[p.start : p.end] for p in split_paragraphs(array, markers)]


@pytest.mark.parametrize(
    ("tokens", "start", "end", "expected"),
    [
        ([], (), (), []),
        ([1, 2, 3], (), (), [[1, 2, 3]]),
        ([1, 9, 2, 9, 3], ((9,),), (), [[2], [3]]),
        ([1, 8, 2, 8, 3], (), ((8,),), [[1], [2], [3]]),
        ([9, 1, 8, 5, 9, 2, 8, 6], ((9,),), ((8,),), [[1], [2]]),
        ([9, 1, 9, 2, 8], ((9,),), ((8,),), [[1], [2]]),
        ([9, 8, 9], ((9,),), ((8,),), []),
        ([1, 7, 7, 2, 7, 3], ((7, 7),), (), [[2, 7, 3]]),
        ([7, 7, 7, 1], ((7, 7),), (), [[7, 1]]),
        ([5, 5, 6, 1], ((5,), (5, 5, 6)), (), [[1]]),
        ([7], ((7, 7),), (), []),
    ],
)
def test_cuts(
    tokens: list[int],
    start: tuple[tuple[int, ...], ...],
    end: tuple[tuple[int, ...], ...],
    expected: list[list[int]],
) -> None:
    """Paragraphs begin after a start and end before an end or the next start."""
    assert pieces(tokens, Markers(start, end)) == expected


@given(tokens=st.lists(st.integers(0, 4), max_size=30))
def test_paragraphs_are_apart_and_hold_no_single_marker(tokens: list[int]) -> None:
    """Paragraphs are in order, not empty, and contain no marker."""
    markers = Markers(start=((0,),), end=((1,),))
    found = list(split_paragraphs(np.array(tokens, np.uint32), markers))
    assert all(p.start < p.end for p in found)
    assert all(a.end < b.start for a, b in pairwise(found))
    assert all(not {0, 1} & {*tokens[p.start : p.end]} for p in found)
    assert all(tokens[p.start - 1] == 0 for p in found)


@pytest.mark.parametrize("family", PRESETS)
def test_a_preset_cuts_its_family_s_messages(family: str) -> None:
    """Two messages in a family's template are two paragraphs."""
    markers = make_markers(BlendConfig(preset=family))
    begin, end = markers.start[0], markers.end[0]
    tokens = [*begin, 50, 51, *end, *markers.start[-1], 52, *end]
    assert pieces(tokens, markers) == [[50, 51], [52]]


def test_an_unknown_preset_is_named() -> None:
    """The error of an unknown preset lists the known ones."""
    with pytest.raises(SetupError, match=r"blend\.preset = 'gpt': known are gemma-3"):
        make_markers(BlendConfig(preset="gpt"))


@pytest.mark.parametrize(
    "options",
    [
        {"start": ((),)},
        {"end": ((1, -1),)},
        {"preset": "qwen", "start": ((1,),)},
    ],
)
def test_patterns_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    """An empty pattern, a negative token, or patterns together with a preset."""
    with pytest.raises(SetupError, match=r"^(blend|BlendConfig)\."):
        BlendConfig(**options)  # type: ignore[arg-type]
