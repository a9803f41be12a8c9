"""A worker process whose cache is torch tensors on a GPU, as in an engine."""

from __future__ import annotations

from typing import Any

from kvcore.cuda.ipc import export_tensor
from kvcore.errors import HandleError
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import RegisterKVCache
from tests.system.worker_process import BLOCK, WorkerCommands

LAYERS, HEADS, SIZE = 2, 2, 16
SPIN_CYCLES = 400_000_000
"""Cycles of a kernel before it writes: some 0.2 s, longer than a request takes."""


class TorchWorkerCommands(WorkerCommands):
    """Caches of one tensor `[2, NB, BS, H, D]` bfloat16 per layer."""

    def __init__(self, address: str, name: str, driver: str = "server") -> None:
        import torch

        from kvcore.vllm.memory_handles import CudaEvents

        super().__init__(address, name, driver)
        self.torch = torch
        self.tensors: dict[str, list[Any]] = {}
        self.record_event = CudaEvents().record

    def register(  # type: ignore[override]
        self, instance_id: str, model: str, num_blocks: int = 64
    ) -> Any:
        """Allocate a cache and register it."""
        torch = self.torch
        shape = (2, num_blocks, BLOCK, HEADS, SIZE)
        layers = [
            torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
            for _ in range(LAYERS)
        ]
        torch.cuda.synchronize()
        self.tensors[instance_id] = layers
        strides = tuple(2 * stride for stride in layers[0].stride())
        views = tuple(
            TensorView(n, 2 * layer.storage_offset(), shape, strides)
            for n, layer in enumerate(layers)
        )
        group = CacheGroup("KNSHD", "bfloat16", BLOCK, views)
        handles = tuple(export_tensor(layer) for layer in layers)
        return self.client.register_kv_cache(
            RegisterKVCache(instance_id, "engine", model, 1, 0, handles, (group,))
        )

    def store_late(
        self,
        key: SessionKey,
        instance_id: str,
        end: int,
        blocks: list[int],
        tokens: list[int],
    ) -> Any:
        """Queue a slow kernel that writes, and store after it; do not wait for it.

        Returns the reply, and whether the write was pending when the request was sent.
        """
        torch = self.torch
        # First: this copy to the device waits for all queued work.
        where = torch.tensor(blocks, device="cuda")
        torch.cuda._sleep(SPIN_CYCLES)
        for layer, tensor in enumerate(self.tensors[instance_id]):
            tensor.index_fill_(1, where, float(layer + 1))
        probe = torch.cuda.Event()
        probe.record()
        event = self.record_event()
        future = self.client.submit_store(
            key, instance_id, 0, end, [blocks], tokens, event=event
        )
        was_early = not probe.query()
        return future.result(20), was_early

    def fill(self, instance_id: str, blocks: list[int], seed: int = 0) -> None:
        """Write random numbers into blocks."""
        torch = self.torch
        torch.manual_seed(seed)
        for tensor in self.tensors[instance_id]:
            tensor[:, blocks] = torch.randn_like(tensor[:, blocks])

    def poison(self, instance_id: str, blocks: list[int]) -> None:
        """Overwrite blocks with a value that no store writes."""
        for tensor in self.tensors[instance_id]:
            tensor[:, blocks] = -7.0
        self.torch.cuda.synchronize()

    def store_now(
        self,
        key: SessionKey,
        instance_id: str,
        end: int,
        blocks: list[int],
        tokens: list[int],
    ) -> Any:
        """Store after the queued work."""
        return self.client.store(
            key, instance_id, 0, end, [blocks], tokens, event=self.record_event()
        )

    def values(self, instance_id: str, blocks: list[int]) -> list[Any]:
        """Return the blocks' numbers, one array per layer."""
        return [
            tensor[:, blocks].float().cpu().numpy()
            for tensor in self.tensors[instance_id]
        ]

    def free_bytes(self) -> int:
        """Return the GPU's free memory."""
        free, _ = self.torch.cuda.mem_get_info()
        return int(free)

    def cycle(self, instance_id: str, model: str, times: int) -> None:
        """Register and unregister a cache repeatedly."""
        for _ in range(times):
            self.register(instance_id, model, num_blocks=256)
            self.client.unregister_kv_cache(instance_id)

    def export_virtual(self) -> str:
        """Try to export memory; return the error message, or an empty string."""
        torch = self.torch
        tensor = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        try:
            export_tensor(tensor)
        except HandleError as error:
            return error.message
        return ""

    def close(self) -> None:
        """Close the client."""
        self.client.close()
