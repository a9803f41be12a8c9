"""Copies on the fake device, in every order of its work, against host copies."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.blend.key_rotation import BlockRotation, rotate_cached_keys
from kvcore.copy.host_cache import HostCache
from kvcore.cuda import calibration as calibrate
from kvcore.cuda.calibration import CopyMethod
from kvcore.cuda.cuda_cache import CudaCaches
from kvcore.cuda.staging import StagingSizes
from kvcore.errors import BadRequest, DeviceFailed, LayoutError
from kvcore.extents import Extent
from kvcore.layout import CacheGroup, KVLayout, TensorView
from kvcore.protocol import NULL_BLOCK
from tests.blend.test_key_rotation import ROPES
from tests.copy.chunk_spans import ChunkSpan, stack_spans
from tests.copy.test_host_cache import Move, moves
from tests.cuda.cuda_fixture import CudaFixture, cuda_fixture, favouring
from tests.cuda.fake_gpu import FakeDevice, FakeTimeline
from tests.cuda.layout_cases import (
    arena_of,
    gathered,
    job,
    numbers,
    places_apart,
    scattered,
)
from tests.cuda.numpy_kernels import PlainKernels

SEEDS = st.integers(0, 2**32)


def drop_blocks(move: Move, data: st.DataObject) -> None:
    """Make some blocks of every span null."""
    for span in move.spans:
        dropped = data.draw(st.sets(st.integers(0, len(span.blocks) - 1)) | st.just(()))
        span.blocks[list(dropped)] = NULL_BLOCK


@pytest.mark.parametrize("way", CopyMethod)
@given(move=moves(), seed=SEEDS)
def test_gathers_as_a_host_cache_does(way: CopyMethod, move: Move, seed: int) -> None:
    """In any order of work: the same bytes, and no other byte is written."""
    one = cuda_fixture(seed, way)
    placed = one.cache(move.case.layout, move.handles())
    expected = move.arena()
    HostCache(move.case.layout, move.handles()).gather(
        stack_spans(move.spans), expected
    )
    with one.pinned(move.arena()) as arena:
        placed.cache.gather(stack_spans(move.spans), arena)
        assert np.array_equal(arena, expected)
    assert all(map(np.array_equal, placed.bytes(), move.handles()))
    assert one.is_idle


@pytest.mark.parametrize("way", CopyMethod)
@given(move=moves(), seed=SEEDS, data=st.data())
def test_scatters_as_a_host_cache_does(
    way: CopyMethod, move: Move, seed: int, data: st.DataObject
) -> None:
    """Null blocks are skipped, and other blocks keep their bytes."""
    drop_blocks(move, data)
    one = cuda_fixture(seed, way)
    placed = one.cache(move.case.layout, move.handles())
    expected = move.handles()
    HostCache(move.case.layout, expected).scatter(
        stack_spans(move.spans), arena_of(move)
    )
    with one.pinned(arena_of(move)) as arena:
        placed.cache.scatter(stack_spans(move.spans), arena)
        assert np.array_equal(arena, arena_of(move))
    assert all(map(np.array_equal, placed.bytes(), expected))
    assert one.is_idle


@pytest.mark.parametrize("way", CopyMethod)
@given(seed=SEEDS, num_buffers=st.integers(1, 4))
def test_two_instances_both_ways_at_once(
    way: CopyMethod, seed: int, num_buffers: int
) -> None:
    """Four threads share the kernels' streams and few buffers, but no bytes."""
    one = cuda_fixture(seed, way, StagingSizes(512, 2048, num_buffers))
    stores = [job("block first", "bfloat16", seed=n) for n in (1, 2)]
    loads = [job("padded blocks", "bfloat16", seed=n) for n in (3, 4)]
    placed = [one.cache(m.case.layout, m.handles()) for m in (*stores, *loads)]
    arenas = [m.arena() for m in stores] + [arena_of(m) for m in loads]
    for arena in arenas:
        one.device.pin(arena.ctypes.data, arena.size)
    with ThreadPoolExecutor(4) as lanes:
        running = [
            lanes.submit(
                getattr(cache.cache, direction), stack_spans(move.spans), arena
            )
            for cache, direction, move, arena in zip(
                placed,
                ("gather", "gather", "scatter", "scatter"),
                (*stores, *loads),
                arenas,
                strict=True,
            )
        ]
        for each in running:
            each.result(30)
    for move, arena in zip(stores, arenas, strict=False):
        assert np.array_equal(arena, gathered(move))
    for move, cache, arena in zip(loads, placed[2:], arenas[2:], strict=True):
        assert all(map(np.array_equal, cache.bytes(), scattered(move, arena)))
    assert (
        one.caches.staging.num_bytes
        <= num_buffers * StagingSizes(512, 2048).buffer_bytes
    )
    assert one.is_idle


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("way", CopyMethod)
@given(seed=SEEDS, steps=st.integers(0, 60))
def test_a_device_that_fails_ends_the_call(
    way: CopyMethod, direction: str, seed: int, steps: int
) -> None:
    """The call raises an error, never hangs, and returns its buffer."""
    one = cuda_fixture(seed, way, StagingSizes(512, 2048, 1))
    move = job("block first", "bfloat16", seed=1)
    placed = one.cache(move.case.layout, move.handles())
    arena = move.arena()
    one.device.pin(arena.ctypes.data, arena.size)
    copy = partial(getattr(placed.cache, direction), stack_spans(move.spans), arena)
    with one.caches.staging.buffer():
        pass
    one.device.timeline.breaks_after = steps
    with pytest.raises(DeviceFailed):
        repeat(copy, 60)
    with one.caches.staging.buffer():
        pass


def repeat(work: Callable[[], None], times: int) -> None:
    """Call `work` several times."""
    for _ in range(times):
        work()


class FailingKernels(PlainKernels):
    """Kernels whose n-th launch is refused; the device itself works."""

    def __init__(self, number: int) -> None:
        self.left = number

    def count(self) -> None:
        """Count a launch, and refuse the n-th."""
        self.left -= 1
        if self.left == 0:
            raise DeviceFailed("a launch was refused")

    def launch(self, *args) -> None:  # noqa: D102
        self.count()
        super().launch(*args)


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@given(seed=SEEDS, number=st.integers(1, 8))
def test_a_failed_call_leaves_nothing_behind(
    direction: str, seed: int, number: int
) -> None:
    """Queued work has ended when the error is raised, and later calls succeed."""
    kernels = FailingKernels(number)
    one = cuda_fixture(seed, sizes=StagingSizes(512, 2048, 1), kernels=kernels)
    move = job("block first", "bfloat16", seed=1)
    placed = one.cache(move.case.layout, move.handles())
    with one.pinned(arena_of(move)) as arena:
        with pytest.raises(DeviceFailed, match="refused"):
            getattr(placed.cache, direction)(stack_spans(move.spans), arena)
        assert one.is_idle
        placed.cache.scatter(stack_spans(move.spans), arena)
        assert all(map(np.array_equal, placed.bytes(), scattered(move, arena)))
        placed.cache.gather(stack_spans(move.spans), arena)
    placed.cache.close()
    one.caches.close()
    assert one.device.timeline.streams == []


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@given(seed=SEEDS)
def test_keys_are_rotated_in_place(dtype: str, name: str, seed: int) -> None:
    """As in host memory, also when a table has room for few rotations.

    Except for the last place of a few numbers, which kernels round twice.
    """
    rope = ROPES[name]
    move = job("blend buffer", dtype, seed=1, width=2 * rope.head_dim)
    handles = numbers(move)
    one = cuda_fixture(seed, sizes=StagingSizes(512, 400, 1))
    placed = one.cache(move.case.layout, handles)
    turns = [
        BlockRotation(1, 9, 3),
        BlockRotation(9, 11, 0),
        *(BlockRotation(n, n + 1, n) for n in range(11, 20)),
    ]
    placed.cache.rotate_keys(rope, turns)
    rotate_cached_keys(rope, turns, [HostCache(move.case.layout, handles)])
    apart = places_apart(placed.bytes()[0], handles[0], dtype)
    assert apart.max() <= (dtype != "float32")
    assert (apart != 0).mean() < 0.01


def test_keys_between_elements_are_refused() -> None:
    """A device cannot read a number at an odd address; no key is rotated."""
    tensor = TensorView(0, 1, (1, 1, 4, 1, 16), (128, 128, 32, 32, 2))
    layout = KVLayout.derive(
        CacheGroup("KLNSD", "bfloat16", 1, (tensor,)), [129], chunk_size=2
    )
    placed = cuda_fixture(0).cache(layout, [np.zeros(129, np.uint8)])
    with pytest.raises(LayoutError, match="multiples of 2"):
        placed.cache.rotate_keys(ROPES["plain"], [BlockRotation(0, 1, 1)])


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_bad_spans_copy_nothing(direction: str) -> None:
    """A wrong id in the last span is refused before the first one is copied."""
    one = cuda_fixture(0)
    move = job("block first", "bfloat16", seed=1)
    placed = one.cache(move.case.layout, move.handles())
    bad = ChunkSpan((Extent(0, 8),), np.array([1, 2, 3, 24], np.int32), 0, 16)
    with one.pinned(move.arena()) as arena:
        with pytest.raises(BadRequest, match="block 24"):
            getattr(placed.cache, direction)(stack_spans([*move.spans, bad]), arena)
        assert np.array_equal(arena, move.arena())
    assert all(map(np.array_equal, placed.bytes(), move.handles()))


def test_no_spans_are_no_work() -> None:
    """A request whose chunks are all present copies nothing."""
    one = cuda_fixture(0)
    move = job("block first", "bfloat16", seed=1)
    placed = one.cache(move.case.layout, move.handles())
    spans = stack_spans(move.spans)[:0]
    placed.cache.gather(spans, move.arena())
    placed.cache.scatter(spans, move.arena())
    assert one.caches.status().copies == {}
    assert one.caches.staging.num_bytes == 0


def test_requests_larger_than_a_table_are_split() -> None:
    """A table has room for two of three spans; one without room: no staging."""
    move = job("block first", "bfloat16", seed=1)
    for table_bytes, way in ((48 + 16 + 64 + 16, "staged"), (80, "batched")):
        device = FakeDevice(FakeTimeline(0))
        rates = favouring(CopyMethod.STAGED)
        caches = CudaCaches(
            device, PlainKernels(), rates=rates, sizes=StagingSizes(512, table_bytes, 1)
        )
        one = CudaFixture(device, caches)
        placed = one.cache(move.case.layout, move.handles())
        with one.pinned(move.arena()) as arena:
            placed.cache.gather(stack_spans(move.spans), arena)
            assert np.array_equal(arena, gathered(move))
        assert caches.status().copies == {f"{way}_to_host": 1}


def test_empty_parts_of_a_split_request_are_skipped() -> None:
    """A whole table of spans with empty ranges precedes others with bytes."""
    device = FakeDevice(FakeTimeline(0))
    caches = CudaCaches(
        device,
        PlainKernels(),
        rates=favouring(CopyMethod.STAGED),
        sizes=StagingSizes(512, 48 + 16 + 32, 1),
    )
    move = job("block first", "bfloat16", seed=1)
    spans = [replace(move.spans[0], end_token=0), *move.spans[1:]]
    expected = gathered(replace(move, spans=spans))
    one = CudaFixture(device, caches)
    placed = one.cache(move.case.layout, move.handles())
    with one.pinned(move.arena()) as arena:
        placed.cache.gather(stack_spans(spans), arena)
        assert np.array_equal(arena, expected)
    assert one.is_idle


def test_rates_are_measured_where_none_are_given() -> None:
    """Every rate of both directions is measured, and the memory is freed."""
    device = FakeDevice(FakeTimeline(1))
    sizes = StagingSizes(slot_bytes=1 << 20, table_bytes=16384, max_buffers=1)
    caches = CudaCaches(device, PlainKernels(), sizes=sizes)
    status = caches.status()
    for rates in (status.rates.to_host, status.rates.to_device):
        assert rates.link_bytes_s > 0
        assert min(rates.start_s, rates.call_s, rates.staged_start_s) > 0
        assert [rate.piece_bytes for rate in rates.batched] == [
            4096, 16384, 65536, 262144, 1 << 20
        ]  # fmt: skip
        assert [rate.piece_bytes for rate in rates.kernels] == [1024, 4096, 32768]
        assert all(rate.bytes_s > 0 for rate in (*rates.batched, *rates.kernels))
    assert status.rates.measured_s > 0
    assert status.staging_bytes == sizes.buffer_bytes
    caches.close()
    assert device.timeline.regions == {}
    assert device.timeline.streams == []


def test_rates_of_a_small_buffer_omit_large_pieces() -> None:
    """Pieces larger than a slot are not measured."""
    caches = CudaCaches(FakeDevice(FakeTimeline(1)), PlainKernels(), sizes=SMALLER)
    assert [rate.piece_bytes for rate in caches.rates.to_host.batched] == [4096]


def test_processes_measure_in_turn() -> None:
    """Processes of one installation measure one at a time."""
    could: list[bool] = []

    class Watched(FakeDevice):
        def allocate_host(self, num_bytes: int) -> int:
            could.append(could_measure())
            return super().allocate_host(num_bytes)

    for _ in range(2):
        CudaCaches(Watched(FakeTimeline(0)), PlainKernels(), sizes=SMALLER).close()
    assert could
    assert not any(could)


def test_a_hung_process_does_not_block_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After `TURN_S` a process measures anyway."""
    monkeypatch.setattr(calibrate, "TURN_S", 0.02)
    with open(calibrate.__file__, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        CudaCaches(FakeDevice(FakeTimeline(0)), PlainKernels(), sizes=SMALLER).close()


def could_measure() -> bool:
    """Return whether another process could measure now."""
    with open(calibrate.__file__, "rb") as others:
        try:
            fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


SMALLER = StagingSizes(slot_bytes=8192, table_bytes=8192, max_buffers=1)
