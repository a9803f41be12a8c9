"""Who registered which cache, and the layout of a model's chunks.

A `Space` is one (model, world size): the seed of its hashes and the part bits of its
chunks. It outlives its instances, since chunks do; only while every rank of it is
registered can it be looked up.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from kvcore.engine.instance import Instance
from kvcore.errors import (
    InstanceExists,
    LayoutConflict,
    UnknownInstance,
    UnknownModel,
)
from kvcore.keys import ChunkHash, chain_seed
from kvcore.layout import PartLayout
from kvcore.storage.l1 import PartId


@dataclass(frozen=True, slots=True)
class Needs:
    """Parts that a lookup asks for, as masks over a chunk's ready parts."""

    full: int
    windows: tuple[WindowNeed, ...]


@dataclass(frozen=True, slots=True)
class WindowNeed:
    """Parts of one sliding-window group: needed in the last `num_chunks` only."""

    mask: int
    window: int


@dataclass(slots=True)
class _Rank:
    layouts: tuple[PartLayout, ...]
    num_instances: int = 0


@dataclass(slots=True)
class Space:
    """One (model, world size) whose chunks share keys."""

    model: str
    world_size: int
    seed: ChunkHash
    bits: dict[tuple[int, int, str], PartId] = field(default_factory=dict)
    ranks: dict[int, _Rank] = field(default_factory=dict)
    needs: Needs | None = None
    """What a lookup needs; None while not every rank is registered."""

    def part_ids(self, rank: int, layouts: Iterable[PartLayout]) -> tuple[PartId, ...]:
        """Return the bit of each group's part; all ranks share a replicated one.

        A bit names rank, group and layout fingerprint for as long as the server
        runs, so bytes of another layout are another part and never reached.
        """
        return tuple(
            self.bits.setdefault(
                (0 if layout.replicated else rank, group, layout.fingerprint),
                PartId(len(self.bits)),
            )
            for group, layout in enumerate(layouts)
        )

    def missing_ranks(self) -> list[int]:
        """Return the ranks that nobody has registered."""
        return [rank for rank in range(self.world_size) if rank not in self.ranks]

    def add(self, rank: int, layouts: tuple[PartLayout, ...]) -> None:
        """Count one more instance of a rank."""
        self.ranks.setdefault(rank, _Rank(layouts)).num_instances += 1
        self._update()

    def remove(self, rank: int) -> None:
        """Count one less; the layout of a rank goes with its last instance."""
        held = self.ranks[rank]
        held.num_instances -= 1
        if not held.num_instances:
            del self.ranks[rank]
        self._update()

    def _update(self) -> None:
        if len(self.ranks) < self.world_size:
            self.needs = None
            return
        full = 0
        windows: dict[int, int] = {}
        for rank, held in self.ranks.items():
            bits = self.part_ids(rank, held.layouts)
            for layout, bit in zip(held.layouts, bits, strict=True):
                if layout.window is None:
                    full |= 1 << bit
                else:
                    windows[layout.window] = windows.get(layout.window, 0) | 1 << bit
        self.needs = Needs(
            full, tuple(WindowNeed(mask, size) for size, mask in windows.items())
        )


class Registry:
    """Instances by id, spaces by (model, world size): both O(1). Loop thread only."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.instances: dict[str, Instance] = {}
        self._spaces: dict[tuple[str, int], Space] = {}

    def space(self, model: str, world_size: int) -> Space:
        """Return the space of a model, made when first named by an instance."""
        key = (model, world_size)
        space = self._spaces.get(key)
        if space is None:
            seed = chain_seed("prefix", model, world_size, self.chunk_size)
            space = self._spaces[key] = Space(model, world_size, seed)
        return space

    def lookup(self, model: str, world_size: int) -> tuple[Space, Needs]:
        """Return a space that every rank has registered, and what to look for.

        Raises:
            UnknownModel: nobody registered it, or the ranks named are missing.
        """
        space = self._spaces.get((model, world_size))
        if space is not None and space.needs is not None:
            return space, space.needs
        if space is None or not space.ranks:
            raise UnknownModel(
                f"nobody registered model {model!r} with world size {world_size}"
            )
        missing = ", ".join(map(str, space.missing_ranks()))
        raise UnknownModel(
            f"model {model!r} with world size {world_size}: no instance of rank "
            f"{missing} is registered"
        )

    def check(
        self,
        client: Hashable,
        instance_id: str,
        space: Space,
        rank: int,
        layouts: tuple[PartLayout, ...],
    ) -> None:
        """Refuse an instance that cannot stand beside the live ones.

        Raises:
            InstanceExists: its id is another live client's.
            LayoutConflict: naming both layouts.
        """
        known = self.instances.get(instance_id)
        if known is not None and known.client != client:
            raise InstanceExists(
                f"instance {instance_id!r} belongs to process {known.pid}, which lives"
            )
        alone = known is not None and known.space is space and known.rank == rank
        for other, held in space.ranks.items():
            if other == rank and alone and held.num_instances == 1:
                continue
            _agree(space, rank, layouts, other, held.layouts)

    def add(self, instance: Instance) -> None:
        """Enter a checked instance."""
        self.instances[instance.instance_id] = instance
        instance.space.add(instance.rank, instance.part_layouts)

    def remove(self, instance: Instance) -> None:
        """Take an instance out; its chunks stay."""
        del self.instances[instance.instance_id]
        instance.space.remove(instance.rank)

    def get(self, client: Hashable, instance_id: str) -> Instance:
        """Return an instance of this client's.

        Raises:
            UnknownInstance: no such instance, or not this client's.
        """
        instance = self.instances.get(instance_id)
        if instance is None or instance.client != client:
            raise UnknownInstance(f"this client has no instance {instance_id!r}")
        return instance

    def of_client(self, client: Hashable) -> list[Instance]:
        """Return a client's instances."""
        return [i for i in self.instances.values() if i.client == client]


def _agree(
    space: Space,
    rank: int,
    layouts: tuple[PartLayout, ...],
    other: int,
    others: tuple[PartLayout, ...],
) -> None:
    """Compare with a live rank: wholly with its own, group by group with another."""
    same_groups = len(layouts) == len(others) and all(
        (a.window, a.replicated) == (b.window, b.replicated)
        for a, b in zip(layouts, others, strict=True)
    )
    differ = not same_groups or any(
        a != b
        for a, b in zip(layouts, others, strict=True)
        if other == rank or a.replicated
    )
    if differ:
        raise LayoutConflict(
            f"model {space.model!r}, world size {space.world_size}: rank {rank} would "
            f"lay out its chunks as [{_name(layouts)}], but live instances of rank "
            f"{other} as [{_name(others)}]"
        )


def _name(layouts: tuple[PartLayout, ...]) -> str:
    return "; ".join(f"{layout} #{layout.fingerprint}" for layout in layouts)
