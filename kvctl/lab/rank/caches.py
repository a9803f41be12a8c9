"""Where a played rank's cache lies, and how it is registered by either driver."""

from __future__ import annotations

from kvcore.client.copying import CopyingClient
from kvcore.errors import SetupError
from kvcore.protocol import RegisterKVCache, RegisterReply
from kvctl.lab.geometry import RankCache
from kvctl.lab.rank.cache import Cache
from kvctl.lab.rank.paged import PagedCache
from kvctl.lab.systems.contract import Client


def make_cache(device: str, name: str, cache: RankCache, place: int) -> Cache:
    """Allocate a rank's cache.

    `name` is of its segment in host memory; `place`, its number on the host, deals the
    GPUs out.

    Raises:
        SetupError: there is no such device.
    """
    if device == "cpu":
        return PagedCache(name, cache)
    try:
        from kvctl.lab.rank.device_cache import DeviceCache
    except ImportError as error:
        raise SetupError(f'device = "{device}": {error}; see docs/gpu.md') from None
    return DeviceCache(cache, place)


def register(client: Client, request: RegisterKVCache, cache: Cache) -> RegisterReply:
    """Register a cache: its memory by a client that copies itself, else its handles."""
    if isinstance(client, CopyingClient):
        return client.register_kv_cache(request, cache.memory, cache.open)
    return client.register_kv_cache(request)
