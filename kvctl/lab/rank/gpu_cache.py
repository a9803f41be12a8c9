"""A played worker's cache on a GPU: torch's memory, as an engine's is.

Bytes are made and checked on the device, with the same function as in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvcore.cuda.cuda_worker_memory import CudaWorkerMemory, DeviceWorkerMemory
from kvcore.cuda.driver import open_devices
from kvcore.cuda.ipc import export, open_caches
from kvcore.errors import SetupError
from kvcore.layout import KVLayout
from kvcore.protocol import MemoryHandle
from kvcore.shm import Bytes
from kvctl.lab.model_geometry import RankCache
from kvctl.lab.rank.byte_patterns import MIX_1, MIX_2, WEYL, batch_chunks_of, salts_of
from kvctl.lab.rank.rank_cache import POISON, BlockGrid, Indices, Seeds, handle_starts

WORD_BITS = 64


class DeviceCache:
    """One rank's cache in one allocation on one GPU, with plain copies' host memory."""

    def __init__(self, cache: RankCache, place: int) -> None:
        if not torch.cuda.is_available():
            raise SetupError('device = "cuda": torch finds no CUDA device here')
        number = place % torch.cuda.device_count()
        self.device = torch.device("cuda", number)
        torch.cuda.set_device(self.device)
        self._whole = torch.full(
            (sum(cache.handle_bytes),), POISON, dtype=torch.uint8, device=self.device
        )
        torch.cuda.synchronize(self.device)
        self._lay_out(cache)
        self.memory = tuple(self._whole.split(list(cache.handle_bytes)))
        self._gpu = open_devices()[number]
        self.handles: tuple[MemoryHandle, ...] = tuple(
            export(part.data_ptr(), part.nbytes, self._gpu) for part in self.memory
        )
        self._own: DeviceWorkerMemory | None = None
        self._host = torch.empty(0, dtype=torch.uint8)
        self._spare = torch.empty(0, dtype=torch.uint8, device=self.device)

    def _lay_out(self, cache: RankCache) -> None:
        self.groups = cache.groups
        self.num_bytes = sum(cache.handle_bytes)
        starts = handle_starts(cache)
        self.views = tuple(
            device_view(self._whole, BlockGrid.of(group, starts))
            for group in self.groups
        )

    def open(
        self, layouts: Sequence[KVLayout], memory: Sequence[torch.Tensor], arena: Bytes
    ) -> CudaWorkerMemory:
        """Reach the memory for a client that copies itself.

        Only here the device is measured and staging taken: a server that copies does
        both in its own process.
        """
        self._own = own_device(self.device.index)
        return self._own.open(layouts, memory, arena)

    def ways(self) -> dict[str, int]:
        """Count what this process has copied; a server that copies does so itself."""
        return self._own.status().copies if self._own else {}

    def num_blocks(self, group: int) -> int:
        """Blocks of a group."""
        return len(self.views[group])

    def block_bytes(self, group: int) -> int:
        """Bytes of a block in all layers of a group."""
        view = self.views[group]
        return int(view[0].numel() * view.element_size())

    def pattern(self, group: int, rank: int | None, chunk_blocks: int) -> DevicePattern:
        """Return what fills and checks a group; see `Cache`."""
        return DevicePattern(self.views[group], group, rank, chunk_blocks)

    def poison(self, group: int, blocks: Indices) -> None:
        """Overwrite blocks; null ones (-1) are left out."""
        view = self.views[group]
        words = np.full(view.element_size(), POISON, np.uint8).view(
            np.int64 if view.element_size() == 8 else np.uint8
        )
        view[_index(view, blocks[blocks >= 0])] = int(words[0])
        _finish(view)

    def copy_out(self, number: int, num_bytes: int) -> None:
        """Copy plainly to page-locked host memory."""
        self._grow(num_bytes)
        self._host[:num_bytes].copy_(self._part(number, num_bytes), non_blocking=True)
        _finish(self._whole)

    def copy_in(self, number: int, num_bytes: int) -> None:
        """Copy plainly from page-locked host memory to spare memory of the device."""
        del number
        self._grow(num_bytes)
        self._spare[:num_bytes].copy_(self._host[:num_bytes], non_blocking=True)
        _finish(self._whole)

    def copy_both(self, number: int, num_bytes: int) -> None:
        """Copy as many bytes each way at once."""
        self._grow(num_bytes)
        out, back = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        half = self._host.numel() // 2
        with torch.cuda.stream(out):
            source = self._part(number, num_bytes)
            self._host[:num_bytes].copy_(source, non_blocking=True)
        with torch.cuda.stream(back):
            source = self._host[half : half + num_bytes]
            self._spare[:num_bytes].copy_(source, non_blocking=True)
        _finish(self._whole)

    def _part(self, number: int, num_bytes: int) -> torch.Tensor:
        start = number % (self.num_bytes // num_bytes) * num_bytes
        return self._whole[start : start + num_bytes]

    def _grow(self, num_bytes: int) -> None:
        if self._spare.numel() >= num_bytes:
            return
        # A half for each direction, should both be under way.
        self._host = torch.ones(2 * num_bytes, dtype=torch.uint8).pin_memory()
        self._spare = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def close(self) -> None:
        """Give the memory back to torch."""
        empty = torch.empty(0, dtype=torch.uint8)
        self.views = self.memory = ()
        self._whole, self._host, self._spare = empty, empty, empty


@cache
def own_device(number: int) -> DeviceWorkerMemory:
    """Return what all caches of this process on a GPU share.

    One, since an arena is page-locked once in a process. It stays to the process's end.
    """
    gpu = open_devices()[number]
    return DeviceWorkerMemory(gpu, open_caches(gpu))


def device_view(memory: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """View a group in flat memory `[num_bytes]` as its grid says; words are int64."""
    flat = memory.view(torch.int64) if grid.word == 8 else memory
    strides = [stride // grid.word for stride in grid.strides]
    return torch.as_strided(flat, grid.shape, strides, grid.offset // grid.word)


class DevicePattern:
    """Writes and checks one group; `byte_patterns.HostPattern` on a device.

    Torch has no arithmetic on unsigned words: it is done on signed ones, which wrap
    alike, with the shift's sign bits cut off.
    """

    def __init__(
        self, view: torch.Tensor, group: int, rank: int | None, chunk_blocks: int
    ) -> None:
        self.view = view
        self.chunk_blocks = chunk_blocks
        planes = view.shape[1] * view.shape[2]
        block_bytes = view[0, 0, 0].numel() * view.element_size()
        self.block_words = block_bytes // view.element_size()
        num_words = -(-block_bytes // 8)
        steps = np.arange(chunk_blocks * num_words, dtype=np.uint64) * WEYL
        self.salts = _words(salts_of(rank, group, planes)).to(view.device)
        self.steps = _words(steps).to(view.device).view(chunk_blocks, 1, num_words)
        self.batch_chunks = batch_chunks_of(steps.size * planes)

    def write(self, seeds: Seeds, blocks: Indices) -> None:
        """Write the chunks' bytes into blocks; null ones (-1) are left out."""
        for index, words in self._batches(seeds, blocks):
            self.view[index] = words
        _finish(self.view)

    def count_wrong_bytes(self, seeds: Seeds, blocks: Indices) -> int:
        """Compare blocks with the chunks' bytes; null ones (-1) are left out."""
        wrong = 0
        for index, words in self._batches(seeds, blocks):
            actual = self.view[index]
            if not torch.equal(actual, words):
                unlike = actual.view(torch.uint8) != words.view(torch.uint8)
                wrong += int(unlike.sum())
        return wrong

    def _batches(
        self, seeds: Seeds, blocks: Indices
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield blocks' indices and their words, a few chunks at a time."""
        by_chunk = blocks.reshape(len(seeds), self.chunk_blocks)
        for first in range(0, len(seeds), self.batch_chunks):
            ids = by_chunk[first : first + self.batch_chunks]
            there = _index(self.view, np.flatnonzero(ids >= 0))
            words = self._make(seeds[first : first + self.batch_chunks])
            index = _index(self.view, ids.reshape(-1))[there]
            yield index, words[there].contiguous()

    def _make(self, seeds: Seeds) -> torch.Tensor:
        """Make whole chunks, `[chunks x blocks of a chunk, L, K, S, H, words]`."""
        ours = _words(seeds).to(self.view.device)
        planes = mix(ours[:, None] + self.salts)
        made = planes[:, None, :, None] + self.steps
        words = made.view(self.view.dtype)[..., : self.block_words]
        shape = (len(seeds) * self.chunk_blocks, *self.view.shape[1:])
        return words.reshape(shape)


def mix(values: torch.Tensor) -> torch.Tensor:
    """Scatter words so that close ones end far apart; as `pattern.mix`."""
    first, second = _words(np.array([MIX_1, MIX_2])).tolist()
    values = (values ^ _shift(values, 30)) * first
    values = (values ^ _shift(values, 27)) * second
    return values ^ _shift(values, 31)


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right, filling with zeros."""
    return (values >> bits) & ((1 << (WORD_BITS - bits)) - 1)


def _words(values: Seeds) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int64).copy())


def _index(view: torch.Tensor, ids: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(view.device)


def _finish(tensor: torch.Tensor) -> None:
    """Wait for what was asked of a device."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
