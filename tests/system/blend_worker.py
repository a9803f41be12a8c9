"""A worker process with blend buffers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.blend.blend_client import BlendClient
from kvcore.layout import DTYPE_BYTES
from kvcore.protocol import CBRegisterKVCache, PosixShm
from kvcore.rope import Rope
from kvcore.shm import Segment
from tests.system.worker_process import POISON, WorkerCommands

SHAPE = (2, 2, 1024, 32)
"""Of a buffer of uint8, whose chunks are like those of `worker.PLAIN`."""

_counter = itertools.count()


class BlendWorkerCommands(WorkerCommands):
    """Commands on buffers `[K, L, T, D]`, by instance."""

    def __init__(self, address: str, name: str, driver: str) -> None:
        super().__init__(address, name, driver)
        self.blend_client = BlendClient(self.client)
        self.buffers: dict[str, Segment] = {}
        self.requests: dict[str, CBRegisterKVCache] = {}

    def register_buffer(
        self,
        instance_id: str,
        model: str,
        *,
        shape: tuple[int, ...] = SHAPE,
        dtype: str = "uint8",
        rank: int = 0,
        world_size: int = 1,
        rope: Rope | None = None,
        missing: int = 0,
    ) -> Any:
        """Allocate a poisoned buffer, `missing` bytes too small, and register it."""
        size = math.prod(shape) * DTYPE_BYTES.get(dtype, 1)
        name = f"{self.name}-buffer-{next(_counter)}"
        segment = Segment.create(name, max(size, 1), touch=True)
        segment.array[:] = POISON
        request = CBRegisterKVCache(
            instance_id=instance_id,
            engine_id="engine",
            model=model,
            world_size=world_size,
            rank=rank,
            handle=PosixShm(name, 0, segment.num_bytes - missing),
            shape=shape,
            dtype=dtype,
            rope=rope,
        )
        try:
            reply = self.blend_client.register(request)
        except BaseException:
            self._remove(segment)
            raise
        earlier = self.buffers.get(instance_id)
        if earlier is not None:
            self._remove(earlier)
        self.buffers[instance_id] = segment
        self.requests[instance_id] = request
        return reply

    def blend(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the blend client."""
        return getattr(self.blend_client, method)(*args, **options)

    def write(self, instance_id: str, first: int, values: npt.NDArray[Any]) -> None:
        """Write slots, `[K, L, tokens, D]`."""
        self._view(instance_id)[:, :, first : first + values.shape[2]] = values

    def read_slots(self, instance_id: str, first: int, end: int) -> npt.NDArray[Any]:
        """Return slots, `[K, L, tokens, D]`."""
        return self._view(instance_id)[:, :, first:end].copy()

    def poison_all(self, instance_id: str) -> None:
        """Fill all slots with bytes that no store wrote."""
        self.buffers[instance_id].array[:] = POISON

    def _view(self, instance_id: str) -> npt.NDArray[Any]:
        request = self.requests[instance_id]
        dtype = np.dtype(request.dtype)
        return self.buffers[instance_id].array.view(dtype).reshape(request.shape)

    def _remove(self, segment: Segment) -> None:
        segment.unlink()
        segment.close()

    def close(self) -> None:
        """Close the client and remove the buffers."""
        super().close()
        for segment in self.buffers.values():
            self._remove(segment)
