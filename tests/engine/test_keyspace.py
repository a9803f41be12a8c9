"""Ids of a keyspace's parts: distinct, stable, and assigned without a search."""

from __future__ import annotations

from typing import Any

from kvcore.engine.keyspace import Keyspace
from kvcore.keys import chain_seed
from kvcore.layout import CacheGroup, KVLayout, PartLayout, TensorView
from kvcore.storage.chunk import PartId

CHUNK = 16


class Unsearchable(dict[Any, PartId]):
    """A dict whose values cannot be listed: one more part must not cost all others."""

    def values(self) -> Any:
        """Fail."""
        raise AssertionError("every part was looked at")


def layouts(*widths: int) -> list[PartLayout]:
    """Return a layout for each width."""
    groups = [
        CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, w), (16 * w, w, 1)),))
        for w in widths
    ]
    return [KVLayout.derive(group, [1 << 20], CHUNK).part for group in groups]


def test_ids_are_distinct_and_stable() -> None:
    """Each rank, group and layout has its own id, also beside restored ones."""
    space = Keyspace("m", 2, chain_seed("prefix", "m", 2, CHUNK), Unsearchable())
    [restored] = layouts(32)
    space.restore(space.part_name(1, 0, restored), PartId(5))
    first = space.part_ids(0, layouts(8, 16))
    other = space.part_ids(1, layouts(8, 16))
    assert len({*first, *other, 5}) == 5
    assert space.part_ids(0, layouts(8, 16)) == first
    assert space.part_ids(1, [restored]) == (5,)
