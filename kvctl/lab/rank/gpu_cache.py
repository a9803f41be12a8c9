"""The paged KV cache of a simulated rank on a GPU, in torch's memory.

Bytes are generated and checked on the device, with the same function as on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvcore.cuda.driver import open_devices
from kvcore.cuda.ipc import export, open_caches
from kvcore.cuda.worker_device_memory import CudaWorkerMemory, DeviceWorkerMemory
from kvcore.errors import SetupError
from kvcore.layout import KVLayout
from kvcore.shm import Bytes
from kvctl.lab.config.model_geometry import (
    BlockGrid,
    Indices,
    RankCache,
    Seeds,
    handle_starts,
)
from kvctl.lab.rank.byte_patterns import (
    MIX_1,
    MIX_2,
    POISON,
    BlockPattern,
)
from kvctl.lab.rank.rank_cache import RankCacheMemory

WORD_BITS = 64


class GpuCache(RankCacheMemory):
    """One rank's cache in one allocation on one GPU.

    `index`, the rank's number on the host, selects the GPU.

    Raises:
        SetupError: torch finds no CUDA device.
    """

    def __init__(self, layout: RankCache, index: int) -> None:
        if not torch.cuda.is_available():
            raise SetupError('device = "cuda": torch finds no CUDA device')
        super().__init__(layout)
        number = index % torch.cuda.device_count()
        self.device = torch.device("cuda", number)
        torch.cuda.set_device(self.device)
        self._whole = torch.full(
            (self.num_bytes,), POISON, dtype=torch.uint8, device=self.device
        )
        torch.cuda.synchronize(self.device)
        starts = handle_starts(layout)
        self.views = tuple(
            device_view(self._whole, BlockGrid.of(group, starts))
            for group in self.groups
        )
        self.memory = tuple(self._whole.split(list(layout.handle_bytes)))
        gpu = open_devices()[number]
        self.handles = tuple(
            export(part.data_ptr(), part.nbytes, gpu) for part in self.memory
        )
        self._worker_memory: DeviceWorkerMemory | None = None
        self._host = torch.empty(0, dtype=torch.uint8)
        self._spare = torch.empty(0, dtype=torch.uint8, device=self.device)

    def open(
        self, layouts: Sequence[KVLayout], memory: Sequence[torch.Tensor], arena: Bytes
    ) -> CudaWorkerMemory:
        """Return access to the memory for a client that copies in its own process.

        Measures the device and allocates staging memory, which a server that copies
        does in its process instead.
        """
        self._worker_memory = worker_memory_of(self.device.index)
        return self._worker_memory.open(layouts, memory, arena)

    def copy_counts(self) -> dict[str, int]:
        """Return this process's copies on the GPU, by method and direction."""
        return self._worker_memory.status().copies if self._worker_memory else {}

    def pattern(self, group: int, rank: int | None, chunk_blocks: int) -> DevicePattern:
        """Return the pattern of a group; see `RankCacheMemory`."""
        return DevicePattern(self.views[group], group, rank, chunk_blocks)

    def poison(self, group: int, blocks: Indices) -> None:
        """Overwrite blocks, except null blocks (-1)."""
        view = self.views[group]
        words = np.full(view.element_size(), POISON, np.uint8).view(
            np.int64 if view.element_size() == 8 else np.uint8
        )
        view[_index(view, blocks[blocks >= 0])] = int(words[0])
        _finish(view)

    def copy_out(self, number: int, num_bytes: int) -> None:
        """Make a plain copy to page-locked host memory."""
        self._grow(num_bytes)
        self._host[:num_bytes].copy_(self._part(number, num_bytes), non_blocking=True)
        _finish(self._whole)

    def copy_in(self, number: int, num_bytes: int) -> None:
        """Make a plain copy from page-locked host memory to spare device memory."""
        del number
        self._grow(num_bytes)
        self._spare[:num_bytes].copy_(self._host[:num_bytes], non_blocking=True)
        _finish(self._whole)

    def copy_both(self, number: int, num_bytes: int) -> None:
        """Make a plain copy in each direction, concurrently."""
        self._grow(num_bytes)
        to_host, to_device = (
            torch.cuda.Stream(self.device),
            torch.cuda.Stream(self.device),
        )
        half = self._host.numel() // 2
        with torch.cuda.stream(to_host):
            source = self._part(number, num_bytes)
            self._host[:num_bytes].copy_(source, non_blocking=True)
        with torch.cuda.stream(to_device):
            source = self._host[half : half + num_bytes]
            self._spare[:num_bytes].copy_(source, non_blocking=True)
        _finish(self._whole)

    def _part(self, number: int, num_bytes: int) -> torch.Tensor:
        start = number % (self.num_bytes // num_bytes) * num_bytes
        return self._whole[start : start + num_bytes]

    def _grow(self, num_bytes: int) -> None:
        if self._spare.numel() >= num_bytes:
            return
        # One half per direction, for concurrent copies.
        self._host = torch.ones(2 * num_bytes, dtype=torch.uint8).pin_memory()
        self._spare = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def close(self) -> None:
        """Release the memory."""
        empty = torch.empty(0, dtype=torch.uint8)
        self.views = self.memory = ()
        self._whole, self._host, self._spare = empty, empty, empty


@cache
def worker_memory_of(number: int) -> DeviceWorkerMemory:
    """Return the worker memory of a GPU, shared by all caches of this process.

    An arena can be page-locked only once per process; it stays so until its end.
    """
    gpu = open_devices()[number]
    return DeviceWorkerMemory(gpu, open_caches(gpu))


def device_view(memory: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Return the view of flat memory `[num_bytes]` that a grid describes."""
    flat = memory.view(torch.int64) if grid.word == 8 else memory
    strides = [stride // grid.word for stride in grid.strides]
    return torch.as_strided(flat, grid.shape, strides, grid.offset // grid.word)


class DevicePattern(BlockPattern):
    """The pattern of a group in a GPU's memory.

    Torch has no arithmetic on unsigned words. Signed words wrap equally; a shift has
    to clear the sign bits.
    """

    def __init__(
        self, view: torch.Tensor, group: int, rank: int | None, chunk_blocks: int
    ) -> None:
        super().__init__(view, group, rank, chunk_blocks)
        self._device_salts = _words(self.salts).to(view.device)
        self._device_steps = _words(self.steps).to(view.device)

    def write(self, seeds: Seeds, blocks: Indices) -> None:
        """Write the chunks' bytes into blocks, and wait for the device."""
        super().write(seeds, blocks)
        _finish(self.view)

    def _words(self, seeds: Seeds) -> torch.Tensor:
        device_seeds = _words(seeds).to(self.view.device)
        planes = mix(device_seeds[:, None] + self._device_salts)
        made = planes[:, None, :, None] + self._device_steps
        words = made.view(self.view.dtype)[..., : self.block_words]
        return words.reshape(len(seeds), self.chunk_blocks, *self.view.shape[1:])

    def _index(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return _index(self.view, array)

    def _count_different(self, actual: torch.Tensor, expected: torch.Tensor) -> int:
        if torch.equal(actual, expected):
            return 0
        bytes_expected = expected.contiguous().view(torch.uint8)
        return int((actual.view(torch.uint8) != bytes_expected).sum())


def mix(values: torch.Tensor) -> torch.Tensor:
    """Return the mixed words, as `byte_patterns.mix` does."""
    first, second = _words(np.array([MIX_1, MIX_2])).tolist()
    values = (values ^ _shift(values, 30)) * first
    values = (values ^ _shift(values, 27)) * second
    return values ^ _shift(values, 31)


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the logical shift to the right."""
    return (values >> bits) & ((1 << (WORD_BITS - bits)) - 1)


def _words(values: Seeds) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int64).copy())


def _index(view: torch.Tensor, array: npt.NDArray[Any]) -> torch.Tensor:
    """Return block ids, or a mask of blocks, on the device of a view."""
    dtype = np.bool_ if array.dtype == np.bool_ else np.int64
    return torch.from_numpy(array.astype(dtype)).to(view.device)


def _finish(tensor: torch.Tensor) -> None:
    """Wait for the device of a tensor."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
