"""Where a played rank's cache lies, and how it is registered by either driver."""

from __future__ import annotations

from kvcore.errors import SetupError
from kvcore.protocol import RegisterKVCache, RegisterReply
from kvcore.worker.copying_client import CopyingClient
from kvctl.lab.model_geometry import RankCache
from kvctl.lab.rank.host_paged_cache import PagedCache
from kvctl.lab.rank.rank_cache import RankCacheMemory
from kvctl.lab.systems.system_interface import Client


def make_cache(device: str, name: str, cache: RankCache, place: int) -> RankCacheMemory:
    """Allocate a rank's cache.

    `name` is of its segment in host memory; `place`, its number on the host, deals the
    GPUs out.

    Raises:
        SetupError: there is no such device.
    """
    if device == "cpu":
        return PagedCache(name, cache)
    try:
        from kvctl.lab.rank.gpu_cache import DeviceCache
    except ImportError as error:
        raise SetupError(f'device = "{device}": {error}; see docs/gpu.md') from None
    return DeviceCache(cache, place)


def register(
    client: Client, request: RegisterKVCache, cache: RankCacheMemory
) -> RegisterReply:
    """Register a cache: its memory by a client that copies itself, else its handles."""
    if isinstance(client, CopyingClient):
        return client.register_kv_cache(request, cache.memory, cache.open)
    return client.register_kv_cache(request)
