"""Copies by the fake device, whatever order it runs things in, against host copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.layout import KVLayout
from kvcore.protocol import NULL_BLOCK, DeviceRates
from kvcore.transport.cuda.cache import CudaCache, CudaCaches
from kvcore.transport.cuda.staging import Sizes
from kvcore.transport.cuda.ways import Way, published
from kvcore.transport.host import HostCache
from tests.transport.cuda.fake import FakeDevice, World, array_at
from tests.transport.cuda.plain import PlainKernels
from tests.transport.test_host import Move, moves

SMALL = Sizes(slot_bytes=96, table_bytes=4096, max_buffers=2)
SLOW = 1e6


def favouring(way: Way) -> DeviceRates:
    """Rates by which one way is always the fastest."""
    rates = published().to_host
    if way is not Way.STAGED:
        rates = msgspec.structs.replace(rates, staged_start_s=SLOW)
    if way is not Way.SINGLE:
        rates = msgspec.structs.replace(rates, call_s=SLOW)
    if way is Way.STAGED:
        rates = msgspec.structs.replace(rates, start_s=SLOW)
    return DeviceRates(rates, rates, 0.0)


@dataclass(frozen=True, slots=True)
class Rig:
    """A fake device with caches on it."""

    device: FakeDevice
    caches: CudaCaches

    def cache(self, layout: KVLayout, handles: Sequence[np.ndarray]) -> Placed:
        """Put a cache onto the device."""
        addresses = []
        for handle in handles:
            addresses.append(self.device.allocate(max(handle.size, 1)))
            array_at(addresses[-1], handle.size)[:] = handle
        return Placed(self.caches.cache(layout, addresses), addresses, handles)

    @contextmanager
    def pinned(self, arena: np.ndarray) -> Iterator[np.ndarray]:
        """Page-lock an arena for a while."""
        if arena.size:
            self.device.pin(arena.ctypes.data, arena.size)
        yield arena
        if arena.size:
            self.device.unpin(arena.ctypes.data)


@dataclass(frozen=True, slots=True)
class Placed:
    """A cache, its addresses and what was put there."""

    cache: CudaCache
    addresses: list[int]
    handles: Sequence[np.ndarray]

    def bytes(self) -> list[np.ndarray]:
        """What its handles hold now."""
        pairs = zip(self.addresses, self.handles, strict=True)
        return [array_at(address, handle.size).copy() for address, handle in pairs]


def rig(seed: int, way: Way = Way.STAGED, sizes: Sizes = SMALL) -> Rig:
    """Make a device that runs its work in an order of its own."""
    device = FakeDevice(World(seed))
    caches = CudaCaches(device, PlainKernels(), rates=favouring(way), sizes=sizes)
    return Rig(device, caches)


def drop_blocks(move: Move, data: st.DataObject) -> None:
    """Make some blocks of every span null."""
    for span in move.spans:
        dropped = data.draw(st.sets(st.integers(0, len(span.blocks) - 1)) | st.just(()))
        span.blocks[list(dropped)] = NULL_BLOCK


@pytest.mark.parametrize("way", Way)
@given(move=moves(), seed=st.integers(0, 2**32))
def test_gathers_as_a_host_cache_does(way: Way, move: Move, seed: int) -> None:
    """Whatever order the device takes: the same bytes, and nothing else is touched."""
    one = rig(seed, way)
    placed = one.cache(move.case.layout, move.handles())
    expected = move.arena()
    HostCache(move.case.layout, move.handles()).gather(move.spans, expected)
    with one.pinned(move.arena()) as arena:
        placed.cache.gather(move.spans, arena)
        assert np.array_equal(arena, expected)
    assert all(map(np.array_equal, placed.bytes(), move.handles()))
    assert not any(stream.queue for stream in one.device.world.streams)


@pytest.mark.parametrize("way", Way)
@given(move=moves(), seed=st.integers(0, 2**32), data=st.data())
def test_scatters_as_a_host_cache_does(
    way: Way, move: Move, seed: int, data: st.DataObject
) -> None:
    """Null blocks are left out, and other blocks keep their bytes."""
    drop_blocks(move, data)
    one = rig(seed, way)
    placed = one.cache(move.case.layout, move.handles())
    noise = np.random.default_rng(move.seed + 1)
    source = noise.integers(0, 256, move.arena_bytes, dtype=np.uint8)
    expected = move.handles()
    HostCache(move.case.layout, expected).scatter(move.spans, source)
    with one.pinned(source.copy()) as arena:
        placed.cache.scatter(move.spans, arena)
        assert np.array_equal(arena, source)
    assert all(map(np.array_equal, placed.bytes(), expected))
    assert not any(stream.queue for stream in one.device.world.streams)
