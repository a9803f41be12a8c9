"""A registered cache: its layouts, its memory, and one lane per direction."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from kvcore.copy.paged_cache import PagedCache
from kvcore.copy.transport import AttachedMemory
from kvcore.engine.keyspace import Keyspace
from kvcore.errors import BadRequest, KVError, LayoutError
from kvcore.layout import KVLayout
from kvcore.protocol import Private, RegisterKVCache
from kvcore.storage.l1 import PartId, PartName


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
        client: Hashable,
        pid: int,
        request: RegisterKVCache,
        space: Keyspace,
        layouts: Sequence[KVLayout],
        memory: Future[AttachedMemory],
    ) -> None:
        self.client = client
        self.pid = pid
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
