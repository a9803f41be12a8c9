"""Keyspace of one model: the seed of its chunk hashes and the ids of its parts.

A keyspace outlives its instances, since chunks do. It can be looked up only while every
rank has an instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvcore.keys import ChunkHash
from kvcore.layout import PartLayout
from kvcore.storage.l1 import PartId, PartName
from kvcore.storage.required_parts import RequiredPart, RequiredParts, RequiredWindow


@dataclass(slots=True)
class _RankLayouts:
    layouts: tuple[PartLayout, ...]
    num_instances: int = 0


@dataclass(slots=True)
class Keyspace:
    """One (model, world size) whose chunks share keys."""

    model: str
    world_size: int
    seed: ChunkHash
    bits: dict[tuple[int, int, str], PartId] = field(default_factory=dict)
    next_id: int = 0
    """Above every id in `bits`."""
    ranks: dict[int, _RankLayouts] = field(default_factory=dict)
    needs: RequiredParts | None = None
    """Parts that a lookup needs; None until every rank is registered."""

    def part_ids(self, rank: int, layouts: Iterable[PartLayout]) -> tuple[PartId, ...]:
        """Return the id of each group's part; all ranks share a replicated one.

        An id stands for one rank, group and layout fingerprint while the server runs,
        so bytes of another layout are another part.
        """
        return tuple(
            self._part_id((0 if layout.replicated else rank, group, layout.fingerprint))
            for group, layout in enumerate(layouts)
        )

    def _part_id(self, key: tuple[int, int, str]) -> PartId:
        part = self.bits.setdefault(key, PartId(self.next_id))
        self.next_id = max(self.next_id, part + 1)
        return part

    def part_name(self, rank: int, group: int, layout: PartLayout) -> PartName:
        """Return the name of a rank's part of a group in tiers and the journal."""
        rank = 0 if layout.replicated else rank
        return PartName(self.model, self.world_size, rank, group, layout.fingerprint)

    def restore(self, name: PartName, part: PartId) -> None:
        """Give a part the id that it had in an earlier run."""
        self.bits[name.rank, name.group, name.layout] = part
        self.next_id = max(self.next_id, part + 1)

    def missing_ranks(self) -> list[int]:
        """Return the ranks without an instance."""
        return [rank for rank in range(self.world_size) if rank not in self.ranks]

    def add(self, rank: int, layouts: tuple[PartLayout, ...]) -> None:
        """Add an instance of a rank."""
        self.ranks.setdefault(rank, _RankLayouts(layouts)).num_instances += 1
        self._update()

    def remove(self, rank: int) -> None:
        """Remove an instance of a rank; the last one takes its layouts with it."""
        held = self.ranks[rank]
        held.num_instances -= 1
        if not held.num_instances:
            del self.ranks[rank]
        self._update()

    def _update(self) -> None:
        if len(self.ranks) < self.world_size:
            self.needs = None
            return
        parts: dict[PartId, RequiredPart] = {}
        windows: dict[int, int] = {}
        for rank, held in self.ranks.items():
            bits = self.part_ids(rank, held.layouts)
            for group, (layout, bit) in enumerate(zip(held.layouts, bits, strict=True)):
                name = self.part_name(rank, group, layout)
                parts[bit] = RequiredPart(bit, name, layout.num_bytes, layout.window)
                if layout.window is not None:
                    windows[layout.window] = windows.get(layout.window, 0) | 1 << bit
        self.needs = RequiredParts(
            sum(1 << bit for bit, need in parts.items() if need.window is None),
            tuple(RequiredWindow(mask, size) for size, mask in windows.items()),
            tuple(parts.values()),
        )
