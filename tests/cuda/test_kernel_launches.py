"""The Triton programs, interpreted against numpy and compiled for Hopper."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from ctypes import sizeof
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import pytest

from kvcore.blend.key_rotation import RAW_DTYPES, BlockRotation, rotate_cached_keys
from kvcore.copy.host_cache import HostCache
from kvcore.cuda.copy_plan import WORDS, PartRows
from kvcore.cuda.kernel_launches import (
    TILES,
    Arguments,
    CompiledKernel,
    KeyRotation,
    RowCopy,
    arguments_of,
    compiled,
    types_of,
)
from kvcore.cuda.staging import KernelTable, StagingSizes
from kvcore.errors import DeviceFailed
from kvcore.rope import Rope
from tests.blend.test_key_rotation import ROPES
from tests.copy.chunk_spans import stack_spans
from tests.cuda import numpy_kernels as plain
from tests.cuda.cuda_fixture import CudaFixture, cuda_fixture
from tests.cuda.interpreted_kernels import InterpretedKernels, run
from tests.cuda.layout_cases import (
    DTYPES,
    LAYOUTS,
    arena_of,
    case,
    gathered,
    job,
    numbers,
    places_apart,
    scattered,
    with_nulls,
)

pytest.importorskip("triton", reason="needs triton: make test-torch")
pytestmark = pytest.mark.torch
HOPPER = 90
EIFMT_SVAL, EIATTR_KPARAM_INFO = 4, 0x17
SIZES = StagingSizes(slot_bytes=1 << 15, table_bytes=4096, max_buffers=1)


def interpreted(seed: int) -> CudaFixture:
    """Return a fake device that runs the real programs."""
    return cuda_fixture(seed, sizes=SIZES, kernels=InterpretedKernels())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_dtype_byte_for_byte(name: str, dtype: str) -> None:
    """The programs copy exactly the bytes of plain indexing."""
    move = job(name, dtype, seed=len(name))
    one = interpreted(seed=1)
    placed = one.cache(move.case.layout, move.handles())
    with one.pinned(move.arena()) as arena:
        placed.cache.gather(stack_spans(move.spans), arena)
        assert np.array_equal(arena, gathered(move))
    assert all(map(np.array_equal, placed.bytes(), move.handles()))
    move = with_nulls(move)
    with one.pinned(arena_of(move)) as arena:
        placed.cache.scatter(stack_spans(move.spans), arena)
        expected = scattered(move, arena_of(move))
    assert all(map(np.array_equal, placed.bytes(), expected))


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Memory for one launch: two parts, a null block, ranges that cut rows."""

    rows: PartRows
    cache: np.ndarray
    staging: np.ndarray
    tables: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, row_words: int, word: int) -> Work:
        """Return memory of 5 blocks per part, each with 2 rows of `row_words` words."""
        size = row_words * word
        rows = PartRows(2, 10 * size, 5, 2, size, 3 * size, size + word, word)
        noise = np.random.default_rng(row_words)
        stride = 11 * rows.block_stride
        planes = np.array([0, stride + word], np.int64)
        ranges = np.array([[0, 10 * size], [word, 9 * size]], np.int64)
        blocks = noise.permutation(10).astype(np.int32)
        blocks[3] = -1
        cache = aligned(noise.integers(0, 256, 2 * stride, dtype=np.uint8))
        planes += cache.ctypes.data
        staging = aligned(noise.integers(0, 256, 2 * rows.part_bytes, dtype=np.uint8))
        return cls(rows, cache, staging, (planes, ranges, blocks))

    def row_copy(self, begin: int, end: int, *, is_gather: bool) -> RowCopy:
        """Return the copy of a section of the line."""
        tables = tuple(table.ctypes.data for table in self.tables)
        at = self.staging.ctypes.data
        return RowCopy(self.rows, tables, at, begin, end, is_gather)

    def after(self, run: Callable[[], None]) -> np.ndarray:
        """Return all memory after a run, and restore it."""
        before = self.cache.copy(), self.staging.copy()
        run()
        memory = np.concatenate((self.cache, self.staging))
        self.cache[:], self.staging[:] = before
        return memory


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy at an address that is a multiple of 16."""
    room = np.empty(array.size + 15, np.uint8)
    first = -room.ctypes.data % 16
    room[first : first + array.size] = array
    return room[first : first + array.size]


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("row_words", [1, 5, 16, 63, 257, 1024])
def test_every_tile_copies_exactly_its_rows(
    row_words: int, word: int, gather: bool
) -> None:
    """Every tile size, several programs, ranges that begin and end within planes."""
    work = Work.of(row_words, word)
    size, part = work.rows.row_bytes, work.rows.part_bytes
    for begin, end in [(0, 2 * part), (size - word, part + 3 * size + word)]:
        copy = work.row_copy(begin, end, is_gather=gather)
        arguments = arguments_of(copy)
        expected = work.after(partial(plain.copy_rows, copy))
        got = work.after(partial(run, arguments, pieces=8, programs=3))
        assert np.array_equal(got, expected)


def test_tables_are_uploaded_whole() -> None:
    """Several programs copy every byte of a table, and no byte after it."""
    table = aligned(np.random.default_rng(0).integers(0, 256, 4800, dtype=np.uint8))
    there = aligned(np.zeros(4816, np.uint8))
    written = KernelTable(there.ctypes.data, table.ctypes.data, 4800, ())
    run(arguments_of(written), words=64, programs=3)
    assert np.array_equal(there[:4800], table)
    assert not there[4800:].any()


@pytest.mark.parametrize("dtype", RAW_DTYPES)
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("layout", ["K and V inside a token", "blend buffer", "latent"])
def test_keys_are_rotated_as_in_host_memory(layout: str, name: str, dtype: str) -> None:
    """The same numbers, except for the last place of those that are rounded twice.

    Triton's interpreter truncates to bfloat16; a device rounds to nearest (see below).
    """
    rope = ROPES[name]
    move = job(layout, dtype, seed=1, width=rope.head_dim)
    handles, turns = (
        numbers(move),
        [BlockRotation(1, 3, 700), BlockRotation(4, 5, 0), BlockRotation(5, 6, -3)],
    )
    one = interpreted(seed=1)
    placed = one.cache(move.case.layout, handles)
    placed.cache.rotate_keys(rope, turns)
    rotate_cached_keys(rope, turns, [HostCache(move.case.layout, handles)])
    for got, expected in zip(placed.bytes(), handles, strict=True):
        apart = places_apart(got, expected, dtype)
        assert apart.max() <= (dtype != "float32")
        assert dtype == "bfloat16" or (apart != 0).mean() < 0.01


# -- compiled for Hopper, which needs no GPU ------------------------------------------


def name_of(arguments: Arguments) -> str:
    """Return a test id from a launch's constants."""
    return "-".join(f"{k}={v}" for k, v in arguments.constants.items())


def every_row_copy() -> Iterator[Arguments]:
    """Yield the arguments of every shape of row copy."""
    for tile, word, gather in product(TILES, WORDS, (True, False)):
        rows = PartRows(2, 10 * tile * word, 10, 1, tile * word, tile * word, 0, word)
        yield arguments_of(RowCopy(rows, (0, 0, 0), 0, 0, 0, gather))


def every_rotation() -> Iterator[Arguments]:
    """Yield the arguments of every kind of rotation, with usual numbers of pairs."""
    for dtype, interleaved, dims in product(RAW_DTYPES, (True, False), (64, 96, 128)):
        rope = Rope(1e4, head_dim=128, rotary_dim=dims, interleaved=interleaved)
        layout = case("blend buffer", dtype, width=128).layout
        yield arguments_of(KeyRotation(layout, rope, BlockRotation(0, 1, 1), 0, 0))


def test_no_other_shapes_are_launched() -> None:
    """Rows of any size lead to one of the row copies that are compiled below."""
    known = {tuple(one.constants.values()) for one in every_row_copy()}
    for row_words, word in product(range(1, 5000, 7), WORDS):
        rows = PartRows(2, row_words * word, 1, 1, row_words * word, 1, 0, word)
        one = arguments_of(RowCopy(rows, (0, 0, 0), 0, 0, 0, is_gather=True))
        assert tuple(one.constants.values()) in known


@pytest.mark.parametrize("arguments", [*every_row_copy()], ids=name_of)
def test_row_copies_compile_for_hopper(arguments: Arguments) -> None:
    """A word of 16 bytes is one load and one store; no scratch memory is used."""
    made = compiled(arguments, HOPPER)
    word, loads = arguments.constants["word"], arguments.constants["loads"]
    kind = {16: r"v2\.b64", 4: "b32", 1: "b8"}[int(word)]
    assert len(re.findall(rf"st\.global\.{kind}", made.ptx)) == loads
    assert len(re.findall(rf"ld\.global\.{kind}", made.ptx)) >= loads
    check_launch(arguments, made)


@pytest.mark.parametrize(
    "arguments",
    [*every_rotation(), arguments_of(KernelTable(0, 0, 8, ()))],
    ids=name_of,
)
def test_the_others_compile_for_hopper(arguments: Arguments) -> None:
    """Keys are rotated in double precision and rounded to nearest."""
    made = compiled(arguments, HOPPER)
    check_launch(arguments, made)
    if arguments.program == "rotate_keys":
        assert "cvt.rn.f32.f64" in made.ptx
        kind = {"float16": "cvt.rn.f16.f32", "bfloat16": "cvt.rn.bf16.f32"}
        assert kind.get(str(arguments.constants["dtype"]), "") in made.ptx


def check_launch(arguments: Arguments, made: CompiledKernel) -> None:
    """A launch packs the parameters that PTX and cubin declare."""
    types = types_of(arguments, made)
    assert parameters_of(made) == [*map(sizeof, types)]
    assert len(types) == len(arguments.longs) + len(arguments.ints) + 2
    assert made.shared_bytes <= 48 << 10


def parameters_of(made: CompiledKernel) -> list[int]:
    """Return each parameter's bytes from a cubin's notes, as the driver does."""
    cubin = made.cubin
    assert cubin.startswith(b"\x7fELF")
    notes = sections_of(cubin)[f".nv.info.{made.name}"]
    found, at = {}, 0
    while at < len(notes):
        form, kind, size = struct.unpack_from("<BBH", notes, at)
        at += 4
        if form != EIFMT_SVAL:
            continue
        if kind == EIATTR_KPARAM_INFO:
            number, offset, packed = struct.unpack_from("<4xHHI", notes, at)
            found[number] = offset, packed >> 18
        at += size
    ordered = [found[number] for number in sorted(found)]
    # Each follows the one before it, at a multiple of its size.
    end = 0
    for offset, size in ordered:
        assert offset == -(-end // size) * size
        end = offset + size
    return [size for _, size in ordered]


def sections_of(elf: bytes) -> dict[str, bytes]:
    """Return the sections of a 64-bit ELF file by name."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_at = struct.unpack_from("<HHH", elf, 58)
    heads = [struct.unpack_from("<I20xQQ", elf, start + n * size) for n in range(count)]
    names = elf[heads[names_at][1] :]
    return {
        names[name : names.index(0, name)].decode(): elf[offset : offset + length]
        for name, offset, length in heads
    }


def test_unexpected_parameters_are_refused() -> None:
    """Kernels of a Triton that packs parameters differently are not used."""
    arguments = arguments_of(KernelTable(0, 0, 8, ()))
    made = compiled(arguments, HOPPER)
    narrow = replace(made, ptx=made.ptx.replace(".param .u64", ".param .u32", 1))
    for other in (
        narrow,
        replace(made, scratch_bytes=16),
        replace(made, ptx=".entry {"),
    ):
        with pytest.raises(DeviceFailed, match="takes parameters of"):
            types_of(arguments, other)
