"""Keyspace of one model: the seed of its chunk hashes and the ids of its parts.

A keyspace outlives its instances, since chunks do. An engine can look it up only while
each of its ranks has an instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvcore.errors import Overloaded
from kvcore.keys import ChunkHash
from kvcore.layout import PartLayout
from kvcore.storage.l1 import PartId, PartName
from kvcore.storage.required_parts import RequiredPart, RequiredParts, RequiredWindow

MAX_PART_IDS = 1024
"""Most part ids of a keyspace, beside 16 per rank. They are bits of chunks' masks."""


@dataclass(slots=True)
class _RankLayouts:
    layouts: tuple[PartLayout, ...]
    num_instances: int = 0


@dataclass(slots=True)
class EngineRanks:
    """The registered ranks of one engine, and what its lookups need of chunks.

    Each engine has its own: a chunk may have parts of several layouts, and an engine
    with another layout neither sees nor hinders the parts of this one.
    """

    ranks: dict[int, _RankLayouts] = field(default_factory=dict)
    needs: RequiredParts | None = None
    """Parts that a lookup needs; None until every rank is registered."""


@dataclass(slots=True)
class Keyspace:
    """One (model, world size) whose chunks share keys."""

    model: str
    world_size: int
    seed: ChunkHash
    bits: dict[tuple[int, int, str], PartId] = field(default_factory=dict)
    next_id: int = 0
    """Above every id in `bits`."""
    engines: dict[bytes, EngineRanks] = field(default_factory=dict)
    """By scope, in order of their first registration."""
    is_used: bool = False
    """Whether chunks may have been stored or looked up: its part ids must stay."""

    def part_ids(self, rank: int, layouts: Iterable[PartLayout]) -> tuple[PartId, ...]:
        """Return the id of each group's part; all ranks share a replicated one.

        An id stands for one rank, group and layout fingerprint while the server runs,
        so bytes of another layout are another part.

        Raises:
            Overloaded: too many layouts have been registered for this model.
        """
        return tuple(
            self._part_id((0 if layout.replicated else rank, group, layout.fingerprint))
            for group, layout in enumerate(layouts)
        )

    def _part_id(self, key: tuple[int, int, str]) -> PartId:
        if key not in self.bits and self.next_id >= MAX_PART_IDS + 16 * self.world_size:
            raise Overloaded(
                f"model {self.model!r}: {self.next_id} layouts of its parts have been "
                "registered since the server started; a restart forgets them"
            )
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

    def engine(self, scope: bytes) -> EngineRanks | None:
        """Return the ranks of an engine, or of any that is complete if it has none."""
        engine = self.engines.get(scope)
        if engine is not None:
            return engine
        others = self.engines.values()
        complete = (other for other in others if other.needs is not None)
        return next(complete, next(iter(others), None))

    def missing_ranks(self, engine: EngineRanks) -> list[int]:
        """Return the ranks without an instance."""
        return [rank for rank in range(self.world_size) if rank not in engine.ranks]

    def add(self, scope: bytes, rank: int, layouts: tuple[PartLayout, ...]) -> None:
        """Add an instance of an engine's rank."""
        engine = self.engines.setdefault(scope, EngineRanks())
        engine.ranks.setdefault(rank, _RankLayouts(layouts)).num_instances += 1
        self._update(engine)

    def remove(self, scope: bytes, rank: int) -> None:
        """Remove an instance of a rank; the last one takes its layouts with it."""
        engine = self.engines[scope]
        engine.ranks[rank].num_instances -= 1
        if not engine.ranks[rank].num_instances:
            del engine.ranks[rank]
        if not engine.ranks:
            del self.engines[scope]
        self._update(engine)

    def _update(self, engine: EngineRanks) -> None:
        if len(engine.ranks) < self.world_size:
            engine.needs = None
            return
        parts: dict[PartId, RequiredPart] = {}
        windows: dict[int, int] = {}
        for rank, held in engine.ranks.items():
            bits = self.part_ids(rank, held.layouts)
            for group, (layout, bit) in enumerate(zip(held.layouts, bits, strict=True)):
                name = self.part_name(rank, group, layout)
                parts[bit] = RequiredPart(bit, name, layout.num_bytes, layout.window)
                if layout.window is not None:
                    windows[layout.window] = windows.get(layout.window, 0) | 1 << bit
        engine.needs = RequiredParts(
            sum(1 << bit for bit, need in parts.items() if need.window is None),
            tuple(RequiredWindow(mask, size) for size, mask in windows.items()),
            tuple(parts.values()),
        )
