"""Registered instances, and checks that their caches can share chunks."""

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
"""Most missing ranks that an error lists."""

GONE_MEANWHILE = "unregistered before its copy began"


class Registry:
    """Instances by id, keyspaces by (model, world size). Loop thread only."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.instances: dict[str, Instance] = {}
        self._spaces: dict[tuple[str, int], Keyspace] = {}

    def space(self, model: str, world_size: int) -> Keyspace:
        """Return the keyspace of a model; create it for the first instance."""
        key = (model, world_size)
        space = self._spaces.get(key)
        if space is None:
            seed = chain_seed("prefix", model, world_size, self.chunk_size)
            space = self._spaces[key] = Keyspace(model, world_size, seed)
        return space

    def lookup(self, model: str, world_size: int) -> tuple[Keyspace, RequiredParts]:
        """Return a keyspace that every rank has registered, and its required parts.

        Raises:
            UnknownModel: no instance registered it, or some ranks are missing.
        """
        space = self._spaces.get((model, world_size))
        if space is not None and space.needs is not None:
            return space, space.needs
        if space is None or not space.ranks:
            raise UnknownModel(
                f"no instance of model {model!r} with world size {world_size} is "
                "registered"
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
        """Check an instance against the registered ones.

        Raises:
            InstanceExists: its id is another live client's.
            LayoutConflict: naming both layouts.
        """
        known = self.instances.get(instance_id)
        if known is not None and known.client != client:
            raise InstanceExists(
                f"instance {instance_id!r} belongs to live process {known.pid}"
            )
        alone = known is not None and known.space is space and known.rank == rank
        for other, held in space.ranks.items():
            if other == rank and alone and held.num_instances == 1:
                continue
            _agree(space, rank, layouts, other, held.layouts)

    def add(self, instance: Instance) -> None:
        """Register a checked instance."""
        self.instances[instance.instance_id] = instance
        instance.space.add(instance.rank, instance.part_layouts)

    def remove(self, instance: Instance) -> None:
        """Unregister an instance; its chunks stay in L1."""
        del self.instances[instance.instance_id]
        instance.space.remove(instance.rank)

    def get(self, client: Hashable, instance_id: str) -> Instance:
        """Return a client's instance.

        Raises:
            UnknownInstance: no such instance, or not this client's.
        """
        instance = self.instances.get(instance_id)
        if instance is None or instance.client != client:
            raise UnknownInstance(f"this client has no instance {instance_id!r}")
        return instance

    def has(self, instance: Instance) -> bool:
        """Return whether this instance, not a later one of its id, is registered."""
        return self.instances.get(instance.instance_id) is instance

    def check_registered(self, instance: Instance) -> None:
        """Raise `UnknownInstance` if an instance was unregistered meanwhile."""
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
    """Compare with a registered rank: all layouts with the same one, else by group."""
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
