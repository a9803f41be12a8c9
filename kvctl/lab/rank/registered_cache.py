"""A rank's cache with its byte patterns and its registration at a server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from kvcore.errors import KVError, SetupError
from kvcore.protocol import RegisterKVCache, RegisterReply
from kvcore.worker.copying_client import CopyingClient
from kvctl.lab.config.model_geometry import Geometry, Indices, RankCache, Seeds
from kvctl.lab.process_messages import EnginePlan
from kvctl.lab.rank.rank_cache import SEGMENT_PREFIX, HostCache, RankCacheMemory
from kvctl.lab.systems.system_interface import Client


def make_cache(
    device: str, name: str, layout: RankCache, index: int
) -> RankCacheMemory:
    """Allocate a rank's cache.

    `name` is that of its segment in host memory; `index`, the rank's number on the
    host, selects the GPU.

    Raises:
        SetupError: the device, or torch, does not exist.
    """
    if device == "cpu":
        return HostCache(name, layout)
    try:
        from kvctl.lab.rank.gpu_cache import GpuCache
    except ImportError as error:
        raise SetupError(f'device = "{device}": {error}; see docs/gpu.md') from None
    return GpuCache(layout, index)


class RegisteredCache:
    """A rank's cache, its byte patterns, and its registration at a server.

    `name` is that of the instance within its engine.

    Raises:
        KVError: the server refuses the registration.
        SetupError: the device, or torch, does not exist.
    """

    def __init__(
        self,
        client: Client,
        plan: EnginePlan,
        geometry: Geometry,
        num_blocks: int,
        *,
        name: str,
        model: str,
        world_size: int,
        rank: int,
        index: int,
    ) -> None:
        self.client = client
        self.chunk_size = client.chunk_size
        self.block_size = geometry.block_size
        self.chunk_blocks = self.chunk_size // self.block_size
        self.instance_id = f"{plan.engine_id}/{name}"
        segment = f"{SEGMENT_PREFIX}{plan.engine_id}-{name}"
        layout = geometry.groups(num_blocks, rank, world_size)
        self.cache = make_cache(plan.scenario.device, segment, layout, index)
        self.patterns = [
            self.cache.pattern(
                number, None if group.replicated else rank, self.chunk_blocks
            )
            for number, group in enumerate(self.cache.groups)
        ]
        self.registration = RegisterKVCache(
            instance_id=self.instance_id,
            engine_id=plan.engine_id,
            model=model,
            world_size=world_size,
            rank=rank,
            handles=self.cache.handles,
            groups=self.cache.groups,
        )
        try:
            self.chunk_bytes = self.register().chunk_bytes
        except BaseException:
            self.close()
            raise

    def register(self) -> RegisterReply:
        """Register: by the memory if the client copies, else by its handles."""
        if isinstance(self.client, CopyingClient):
            return self.client.register_kv_cache(
                self.registration, self.cache.memory, self.cache.open
            )
        return self.client.register_kv_cache(self.registration)

    def write(self, seeds: Seeds, blocks: Sequence[Indices]) -> None:
        """Write chunks into their blocks of each group, except null blocks (-1)."""
        for pattern, ids in zip(self.patterns, blocks, strict=True):
            pattern.write(seeds, ids)

    def poison(self, blocks: Sequence[Indices]) -> None:
        """Overwrite blocks of each group, except null blocks (-1)."""
        for group, ids in enumerate(blocks):
            self.cache.poison(group, ids)

    def count_wrong_bytes(self, seeds: Seeds, blocks: Sequence[Indices]) -> int:
        """Return the wrong bytes of chunks in their blocks of each group."""
        return sum(
            pattern.count_wrong_bytes(seeds, ids)
            for pattern, ids in zip(self.patterns, blocks, strict=True)
        )

    def close(self) -> None:
        """Unregister and release the cache."""
        with suppress(KVError):
            _ = self.client.server  # Raises if the server, and the registration, ended.
            self.client.unregister_kv_cache(self.instance_id)
        self.patterns.clear()
        self.cache.close()
