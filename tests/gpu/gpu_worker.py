"""A worker process whose caches lie in GPU memory; see tests/system/worker_process.py.

Each cache has a mirror in page-locked host memory, through which blocks are written and
read. Torch is not needed, so that it also runs over the stub of the driver.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from kvcore.cuda.ipc import export
from kvcore.keys import SessionKey
from kvcore.protocol import RegisterKVCache, RegisterReply
from tests.system.worker_process import PLAIN, Cache, Group, WorkerCommands, _counter


class GpuCache(Cache):
    """A cache on a device, and its mirror in host memory."""

    def __init__(
        self, device: Any, name: str, groups: tuple[Group, ...], num_blocks: int
    ) -> None:
        super().__init__(name, groups, num_blocks)
        self._device = device
        self._stream, self._done = device.stream(), device.event()
        self._mirror = self.segment.array.ctypes.data
        device.pin(self._mirror, self.segment.num_bytes)
        self.address = device.allocate(self.segment.num_bytes)
        self.handles = (export(self.address, self.segment.num_bytes, device),)  # type: ignore[assignment]
        self.push()

    def push(self) -> None:
        """Write the mirror to the device."""
        self._copy(self.address, self._mirror)

    def pull(self) -> None:
        """Read the device into the mirror."""
        self._copy(self._mirror, self.address)

    def _copy(self, destination: int, source: int) -> None:
        self._stream.copy(destination, source, self.segment.num_bytes)
        self._stream.record(self._done)
        self._done.wait()

    def close(self) -> None:
        """Free all memory."""
        self._stream.close()
        self._done.close()
        self._device.unpin(self._mirror)
        self._device.free(self.address)
        super().close()


class GpuWorkerCommands(WorkerCommands):
    """Commands of a worker with GPU memory."""

    def __init__(self, address: str, name: str, driver: str = "server") -> None:
        # Imported here: tests import this module without the bindings installed.
        from kvcore.cuda.driver import open_devices

        super().__init__(address, name, driver)
        self.devices = open_devices()
        self.event = self.devices[0].event(shared=True)
        self.stream = self.devices[0].stream()

    def register(  # type: ignore[override]
        self,
        instance_id: str,
        model: str,
        groups: tuple[Group, ...] = PLAIN,
        *,
        num_blocks: int = 64,
        number: int = 0,
    ) -> RegisterReply:
        """Allocate a cache on GPU `number` and register it."""
        name = f"{self.name}-{next(_counter)}"
        earlier = self.caches.get(instance_id)
        cache = GpuCache(self.devices[number], name, groups, num_blocks)
        self.caches[instance_id] = cache
        reply = self._register(instance_id, model, cache.handles)
        if earlier is not None:
            earlier.close()
        return reply

    def register_as(self, instance_id: str, model: str, **changes: Any) -> Any:
        """Register a known cache with other fields in its handle."""
        handle = self.caches[instance_id].handles[0]
        facts = {field: getattr(handle, field) for field in handle.__struct_fields__}
        return self._register(instance_id, model, (type(handle)(**facts | changes),))

    def cycle(self, instance_id: str, model: str, times: int) -> None:
        """Register and unregister a known cache repeatedly."""
        for _ in range(times):
            self._register(instance_id, model, self.caches[instance_id].handles)
            self.client.unregister_kv_cache(instance_id)

    def record(self) -> bytes:
        """Record this worker's event and return its handle."""
        self.stream.record(self.event)
        return self.event.handle()

    def store_behind(
        self,
        timeout_s: float,
        key: SessionKey,
        instance_id: str,
        end: int,
        blocks: list[int],
        tokens: list[int],
    ) -> Any:
        """Store after this worker's event."""
        event = self.record()
        return self.client.store(
            key, instance_id, 0, end, [blocks], tokens, event=event, timeout_s=timeout_s
        )

    def hold(self, held: bool) -> None:
        """Stop events from being reached; needs the stub of the driver."""
        ctypes.CDLL("libcuda.so.1").stub_hold(int(held))

    def fill(self, instance_id: str, blocks: list[int], seed: int = 0) -> None:
        """Write random bytes into blocks, of every group."""
        super().fill(instance_id, blocks, seed)
        self._cache(instance_id).push()

    def poison(self, instance_id: str, blocks: list[int]) -> None:
        """Overwrite blocks with a value that no store writes."""
        super().poison(instance_id, blocks)
        self._cache(instance_id).push()

    def copy(self, instance_id: str, source: list[int], target: list[int]) -> None:
        """Copy blocks into others."""
        super().copy(instance_id, source, target)
        self._cache(instance_id).push()

    def read(self, instance_id: str, blocks: list[int], group: int = 0) -> np.ndarray:
        """Return blocks, `[blocks, other axes in their order]`."""
        self._cache(instance_id).pull()
        return super().read(instance_id, blocks, group)

    def _cache(self, instance_id: str) -> GpuCache:
        cache = self.caches[instance_id]
        assert isinstance(cache, GpuCache)
        return cache

    def _register(self, instance_id: str, model: str, handles: Any) -> RegisterReply:
        groups = self.caches[instance_id].groups
        return self.client.register_kv_cache(
            RegisterKVCache(instance_id, "engine", model, 1, 0, handles, groups)
        )
