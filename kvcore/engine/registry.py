"""Who registered which cache, and whether those caches can share chunks."""

from __future__ import annotations

from collections.abc import Hashable

from kvcore.engine.instance import Instance
from kvcore.engine.keyspace import Keyspace
from kvcore.errors import (
    InstanceExists,
    LayoutConflict,
    UnknownInstance,
    UnknownModel,
)
from kvcore.keys import chain_seed
from kvcore.layout import PartLayout
from kvcore.storage.required_parts import RequiredParts

MAX_NAMED = 8
"""Missing ranks that an error names."""

GONE_MEANWHILE = "unregistered before the copy's turn came"


class Registry:
    """Instances by id, spaces by (model, world size): both O(1). Loop thread only."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.instances: dict[str, Instance] = {}
        self._spaces: dict[tuple[str, int], Keyspace] = {}

    def space(self, model: str, world_size: int) -> Keyspace:
        """Return the space of a model, made when first named by an instance."""
        key = (model, world_size)
        space = self._spaces.get(key)
        if space is None:
            seed = chain_seed("prefix", model, world_size, self.chunk_size)
            space = self._spaces[key] = Keyspace(model, world_size, seed)
        return space

    def lookup(self, model: str, world_size: int) -> tuple[Keyspace, RequiredParts]:
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
        ranks = [str(rank) for rank in space.missing_ranks()]
        missing = ", ".join(ranks[:MAX_NAMED])
        if len(ranks) > MAX_NAMED:
            missing += f" and {len(ranks) - MAX_NAMED} more"
        raise UnknownModel(
            f"model {model!r} with world size {world_size}: no instance of rank "
            f"{missing} is registered"
        )

    def check(
        self,
        client: Hashable,
        instance_id: str,
        space: Keyspace,
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

    def has(self, instance: Instance) -> bool:
        """Say whether this very instance is registered still."""
        return self.instances.get(instance.instance_id) is instance

    def check_registered(self, instance: Instance) -> None:
        """Refuse to copy when an instance went while its request was prepared."""
        if not self.has(instance):
            raise UnknownInstance(GONE_MEANWHILE)

    def of_client(self, client: Hashable) -> list[Instance]:
        """Return a client's instances."""
        return [i for i in self.instances.values() if i.client == client]


def _agree(
    space: Keyspace,
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
