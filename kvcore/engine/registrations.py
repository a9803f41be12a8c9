"""Registered caches: layouts, memory, lanes, and checks that they can share chunks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from kvcore.copy.memory_transports import AttachedMemory
from kvcore.copy.paged_cache import PagedCache
from kvcore.engine.keyspace import EngineRanks, Keyspace
from kvcore.engine.request_context import RequestContext
from kvcore.errors import (
    BadRequest,
    InstanceExists,
    KVError,
    LayoutConflict,
    LayoutError,
    Overloaded,
    UnknownInstance,
    UnknownModel,
)
from kvcore.keys import chain_seed
from kvcore.layout import KVLayout, PartLayout
from kvcore.protocol import Private, RegisterKVCache
from kvcore.storage.l1 import PartId, PartName
from kvcore.storage.required_parts import RequiredParts

MAX_PER_CLIENT = 16
"""Most instances of a client. Each may start two threads."""
MAX_INSTANCES = 1024
"""Most instances of all clients."""
MAX_MODELS = 4096
"""Most models and world sizes with chunks or instances."""
MAX_NAMED = 8
"""Most missing ranks that an error lists."""

GONE_MEANWHILE = "unregistered before its copy began"


@dataclass(frozen=True, slots=True)
class Group:
    """One cache group of an instance."""

    layout: KVLayout
    part: PartId
    name: PartName
    part_bytes: int


class Instance:
    """A worker's registered cache. Created by the loop thread, closed on the closer.

    Copies run on `store_lane` and `retrieve_lane`, one thread each, so that a large
    copy delays only its own direction.
    """

    def __init__(
        self,
        context: RequestContext,
        request: RegisterKVCache,
        space: Keyspace,
        layouts: Sequence[KVLayout],
        memory: Future[AttachedMemory],
    ) -> None:
        self.client = context.client
        self.pid = context.pid
        self.scope = context.scope
        self.instance_id = request.instance_id
        self.engine_id = request.engine_id
        self.rank = request.rank
        self.request = request
        self.space = space
        self.layouts = tuple(layouts)
        self.part_layouts = tuple(layout.part for layout in layouts)
        self.is_private = is_private(request)
        """Whether its worker copies; then there are no caches here."""
        self.memory = memory
        """May be pending: lanes wait for it, the loop thread never does."""
        parts = space.part_ids(request.rank, self.part_layouts)
        self.groups = tuple(
            Group(
                layout,
                part,
                space.part_name(request.rank, number, layout.part),
                layout.part.num_bytes,
            )
            for number, (layout, part) in enumerate(zip(layouts, parts, strict=True))
        )
        name = request.instance_id[:40]
        self.is_abandoned = False
        """Whether its client ended: a running store from it is not committed."""
        self.store_lane = ThreadPoolExecutor(1, f"store-{name}")
        self.retrieve_lane = ThreadPoolExecutor(1, f"retrieve-{name}")

    @property
    def caches(self) -> tuple[PagedCache, ...]:
        """The groups' caches; for lanes. Raises the error of attaching the memory."""
        return self.memory.result().caches

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's parts of this rank."""
        return sum(group.part_bytes for group in self.groups)

    @property
    def registered_bytes(self) -> int:
        """Bytes of the registered memory."""
        return sum(handle.length for handle in self.request.handles)

    def abandon(self) -> None:
        """Void the running copies after the client's end; they stop waiting for it."""
        self.is_abandoned = True
        self.memory.add_done_callback(_abandon)

    def close(self) -> None:
        """Cancel queued copies, wait for running ones, then unmap. May block."""
        for lane in (self.store_lane, self.retrieve_lane):
            lane.shutdown(wait=True, cancel_futures=True)
        with suppress(
            KVError
        ):  # Never attached: the registration has failed with this error.
            self.memory.result().close()


def _abandon(memory: Future[AttachedMemory]) -> None:
    if memory.exception() is None:
        memory.result().abandon()


def is_private(request: RegisterKVCache) -> bool:
    """Return whether the worker's memory is private."""
    return any(isinstance(handle, Private) for handle in request.handles)


def derive_layouts(request: RegisterKVCache, chunk_size: int) -> list[KVLayout]:
    """Validate a registration and return the layout of each group.

    Raises:
        BadRequest: the rank is not below the world size.
        LayoutError: naming group and field.
    """
    if request.rank >= request.world_size:
        raise BadRequest(f"rank {request.rank} of a world size of {request.world_size}")
    if not request.groups:
        raise LayoutError("groups: at least one cache group is needed")
    sizes = [handle.length for handle in request.handles]
    layouts = []
    for index, group in enumerate(request.groups):
        try:
            layouts.append(KVLayout.derive(group, sizes, chunk_size))
        except LayoutError as error:
            raise LayoutError(f"groups[{index}]: {error.message}") from None
    return layouts


class Registry:
    """Instances by client and id, keyspaces by model. Loop thread only."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self._instances: dict[tuple[Hashable, str], Instance] = {}
        self._spaces: dict[tuple[str, int], Keyspace] = {}

    def space(self, model: str, world_size: int) -> Keyspace:
        """Return the keyspace of a model, a new one if it has none; `add` enters it.

        Raises:
            Overloaded: there are too many.
        """
        key = (model, world_size)
        space = self._spaces.get(key)
        if space is None:
            if len(self._spaces) >= MAX_MODELS:
                raise Overloaded(f"{MAX_MODELS} models have been registered")
            seed = chain_seed("prefix", model, world_size, self.chunk_size)
            space = Keyspace(model, world_size, seed)
        return space

    def restore(self, name: PartName, part: PartId) -> None:
        """Give a part that an earlier run stored the id that it had there."""
        space = self.space(name.model, name.world_size)
        self._spaces[name.model, name.world_size] = space
        space.is_used = True
        space.restore(name, part)

    def lookup(
        self, model: str, world_size: int, scope: bytes = b""
    ) -> tuple[Keyspace, RequiredParts]:
        """Return a keyspace whose ranks an engine has registered, and required parts.

        Those are the parts of the engine with this scope, or of another engine if it
        has registered none.

        Raises:
            UnknownModel: no instance registered it, or some ranks are missing.
        """
        space = self._spaces.get((model, world_size))
        engine = space.engine(scope) if space is not None else None
        if space is None or engine is None:
            raise UnknownModel(
                f"no instance of model {model!r} with world size {world_size} is "
                "registered"
            )
        if engine.needs is not None:
            space.is_used = True
            return space, engine.needs
        ranks = [str(rank) for rank in space.missing_ranks(engine)]
        missing = ", ".join(ranks[:MAX_NAMED])
        if len(ranks) > MAX_NAMED:
            missing += f" and {len(ranks) - MAX_NAMED} more"
        raise UnknownModel(
            f"model {model!r} with world size {world_size}: no instance of rank "
            f"{missing} is registered"
        )

    def check(
        self,
        context: RequestContext,
        instance_id: str,
        space: Keyspace,
        rank: int,
        layouts: tuple[PartLayout, ...],
    ) -> None:
        """Check an instance against the registered ones of its engine.

        Raises:
            InstanceExists: another live client of the engine has registered its id.
            LayoutConflict: naming both layouts.
            Overloaded: there are too many.
        """
        for one in self._instances.values():
            same_name = one.instance_id == instance_id and one.scope == context.scope
            if same_name and one.client != context.client:
                raise InstanceExists(
                    f"instance {instance_id!r} belongs to live process {one.pid}"
                )
        known = self.find(context.client, instance_id)
        if known is None:
            self._check_number(context.client)
        alone = known is not None and known.space is space and known.rank == rank
        engine = space.engines.get(context.scope, EngineRanks())
        for other, held in engine.ranks.items():
            if other == rank and alone and held.num_instances == 1:
                continue
            _agree(space, rank, layouts, other, held.layouts)

    def _check_number(self, client: Hashable) -> None:
        num_own = len(self.of_client(client))
        if num_own >= MAX_PER_CLIENT or len(self._instances) >= MAX_INSTANCES:
            raise Overloaded(
                f"{num_own} instances of this client and {len(self._instances)} in all "
                f"are registered; at most {MAX_PER_CLIENT} and {MAX_INSTANCES} can be"
            )

    def add(self, instance: Instance) -> None:
        """Register a checked instance."""
        self._instances[instance.client, instance.instance_id] = instance
        space = instance.space
        self._spaces[space.model, space.world_size] = space
        space.add(instance.scope, instance.rank, instance.part_layouts)

    def remove(self, instance: Instance) -> None:
        """Unregister an instance; its chunks stay in L1."""
        del self._instances[instance.client, instance.instance_id]
        space = instance.space
        space.remove(instance.scope, instance.rank)
        if not (space.engines or space.is_used):
            del self._spaces[space.model, space.world_size]

    def find(self, client: Hashable, instance_id: str) -> Instance | None:
        """Return a client's instance, None if it has none of this id."""
        return self._instances.get((client, instance_id))

    def get(self, client: Hashable, instance_id: str) -> Instance:
        """Return a client's instance.

        Raises:
            UnknownInstance: no such instance, or not this client's.
        """
        instance = self.find(client, instance_id)
        if instance is None:
            raise UnknownInstance(f"this client has no instance {instance_id!r}")
        return instance

    def has(self, instance: Instance) -> bool:
        """Return whether this instance, not a later one of its id, is registered."""
        return self.find(instance.client, instance.instance_id) is instance

    def check_registered(self, instance: Instance) -> None:
        """Raise `UnknownInstance` if an instance was unregistered meanwhile."""
        if not self.has(instance):
            raise UnknownInstance(GONE_MEANWHILE)

    def of_client(self, client: Hashable) -> list[Instance]:
        """Return a client's instances."""
        return [i for i in self._instances.values() if i.client == client]

    def all(self) -> list[Instance]:
        """Return every instance."""
        return list(self._instances.values())


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
