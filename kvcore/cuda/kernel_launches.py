"""Launches of the Triton kernels, compiled once for each set of constants.

`triton.compile` needs no GPU. The cubin is loaded as it is and launched by the driver,
which needs no C compiler and no torch and takes about 5 us where Triton's own launcher
takes 20 to 50 us.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from ctypes import c_int32, c_int64, sizeof
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol, Self

import numpy as np

from kvcore.blend.key_rotation import RAW_DTYPES, BlockRotation, rotation_factors
from kvcore.cuda.copy_plan import I64, PartRows
from kvcore.cuda.device_interface import Device, Function, Integer, Launch, Stream
from kvcore.cuda.staging import FilledBuffer
from kvcore.errors import DeviceFailed, LayoutError
from kvcore.layout import KVLayout
from kvcore.rope import Rope

PROGRAMS = 6
"""Blocks of a launch, so at most as many SMs: gathers and scatters share twelve."""
WARPS = 16
"""Of a block. A whole SM has twice as many: ours need not be empty of others."""
LOADS = 4
"""Words that a thread reads of one piece before it writes; see `programs`."""
TILES = (1024, 256, 64, 16, 4, 1)
"""Words that a row is cut into pieces of."""
MAX_WASTE = 1 / 8
"""Share of a row's last piece that may be nothing, before smaller pieces are taken."""
_PARAMETER = re.compile(r"\.param \.[bsuf](\d+)")


@dataclass(frozen=True, slots=True)
class RowCopy:
    """A stretch [begin, end) of a plan's line, between the caches and staging.

    `planes`, `ranges` and `blocks` are addresses of the plan's tables on the device:
    int64 `[planes]`, int64 `[spans, 2]`, int32 `[spans, blocks a chunk]`. Bytes that
    the line does not have there (null blocks, ranges) are left as they are on the
    side that is written. `staging` is where `begin` lies.
    """

    rows: PartRows
    planes: int
    ranges: int
    blocks: int
    staging: int
    begin: int
    end: int

    @property
    def first_plane(self) -> int:
        """Count of planes on the line before the one that `begin` lies in."""
        return self.begin // self.rows.plane_bytes

    @property
    def end_plane(self) -> int:
        """One past the last plane of which something is meant."""
        return -(-self.end // self.rows.plane_bytes)


@dataclass(frozen=True, slots=True)
class RotateLaunch:
    """Keys of the blocks [first_block, end_block) that move by one distance.

    `planes` is the address of K's planes' addresses, int64 `[planes]`; `factors` of
    cosines and sines, float64 `[rotary_dim / 2, 2]`. A slot's heads lie together.
    """

    rope: Rope
    dtype: str
    planes: int
    factors: int
    num_planes: int
    first_block: int
    end_block: int
    block_slots: int
    block_stride: int
    slot_stride: int
    num_heads: int


class Kernels(Protocol):
    """Work that a device's SMs do. A call returns before it has run."""

    def upload(self, stream: Stream, table: FilledBuffer) -> None:
        """Copy a table from page-locked memory to the device.

        A copy engine would do it behind whatever large copy it has under way.
        """

    def gather(self, stream: Stream, move: RowCopy) -> None:
        """Copy from caches to staging."""

    def scatter(self, stream: Stream, move: RowCopy) -> None:
        """Copy from staging to caches."""

    def turn(self, stream: Stream, turn: RotateLaunch) -> None:
        """Turn keys in place, computed in double precision and rounded."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a launch gives to a program: its own arguments, then constants."""

    program: str
    longs: Mapping[str, int]
    ints: Mapping[str, int]
    constants: Mapping[str, int | bool | str]

    @property
    def signature(self) -> dict[str, str]:
        """Names and Triton's types."""
        return {
            **dict.fromkeys(self.longs, "i64"),
            **dict.fromkeys(self.ints, "i32"),
            **dict.fromkeys(self.constants, "constexpr"),
        }


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A program for one architecture."""

    cubin: bytes
    name: str
    ptx: str
    shared_bytes: int
    scratch_bytes: int

    @property
    def parameter_bytes(self) -> tuple[int, ...]:
        """Of each that it takes: those of ours, then pointers that Triton adds."""
        entry = self.ptx[self.ptx.index(".entry") :]
        bits = _PARAMETER.findall(entry[: entry.index("{")])
        return tuple(int(each) // 8 for each in bits)


@dataclass(frozen=True, slots=True)
class _LoadedKernel:
    """A program on the device, and what else its launches take."""

    function: Function
    shared_bytes: int
    types: tuple[Integer, ...]
    added: tuple[int, ...]


class NoKernels:
    """`Kernels` of a device that cannot have any; each call says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def upload(self, stream: Stream, table: FilledBuffer) -> None:
        """Refuse."""
        raise DeviceFailed(self.reason)

    def gather(self, stream: Stream, move: RowCopy) -> None:
        """Refuse."""
        raise DeviceFailed(self.reason)

    def scatter(self, stream: Stream, move: RowCopy) -> None:
        """Refuse."""
        raise DeviceFailed(self.reason)

    def turn(self, stream: Stream, turn: RotateLaunch) -> None:
        """Refuse."""
        raise DeviceFailed(self.reason)


class TritonKernels:
    """`Kernels` of a real device. Any thread may use it.

    The first launch of a shape compiles it, 0.2 to 1 s, or finds it in Triton's cache.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._loaded: dict[tuple[str, tuple[int | bool | str, ...]], _LoadedKernel] = {}
        self._lock = Lock()

    def check(self) -> None:
        """Load one program; raises `DeviceFailed` where none can be."""
        self._loaded_for(upload_arguments(FilledBuffer(0, 0, 0, ())))

    def upload(self, stream: Stream, table: FilledBuffer) -> None:
        """Copy a table from page-locked memory; see `Kernels`."""
        self._launch(stream, upload_arguments(table))

    def gather(self, stream: Stream, move: RowCopy) -> None:
        """Copy from caches to staging; see `Kernels`."""
        self._launch(stream, move_arguments(move, gather=True))

    def scatter(self, stream: Stream, move: RowCopy) -> None:
        """Copy from staging to caches; see `Kernels`."""
        self._launch(stream, move_arguments(move, gather=False))

    def turn(self, stream: Stream, turn: RotateLaunch) -> None:
        """Turn keys in place; see `Kernels`."""
        self._launch(stream, turn_arguments(turn))

    def _launch(self, stream: Stream, arguments: Arguments) -> None:
        loaded = self._loaded_for(arguments)
        values = (*arguments.longs.values(), *arguments.ints.values(), *loaded.added)
        launch = Launch(PROGRAMS, WARPS, loaded.shared_bytes, values, loaded.types)
        stream.launch(loaded.function, launch)

    def _loaded_for(self, arguments: Arguments) -> _LoadedKernel:
        key = (arguments.program, tuple(arguments.constants.values()))
        loaded = self._loaded.get(key)
        if loaded is None:
            with self._lock:
                loaded = self._loaded.get(key) or self._load(arguments)
                self._loaded[key] = loaded
        return loaded

    def _load(self, arguments: Arguments) -> _LoadedKernel:
        made = compiled(arguments, self._device.compute_capability)
        types = types_of(arguments, made)
        return _LoadedKernel(
            self._device.load(made.cubin, made.name, made.shared_bytes),
            made.shared_bytes,
            types,
            (0,) * (len(types) - len(arguments.longs) - len(arguments.ints)),
        )


def types_of(arguments: Arguments, made: CompiledKernel) -> tuple[Integer, ...]:
    """Return what a launch packs: our arguments, then null pointers to scratch.

    Raises:
        DeviceFailed: the program takes something else, and would read it amiss.
    """
    ours: tuple[Integer, ...] = (
        *(c_int64 for _ in arguments.longs),
        *(c_int32 for _ in arguments.ints),
    )
    added = len(made.parameter_bytes) - len(ours)
    types = (*ours, *(c_int64 for _ in range(added)))
    if made.scratch_bytes or tuple(map(sizeof, types)) != made.parameter_bytes:
        raise DeviceFailed(
            f"Triton's {made.name} takes parameters of {made.parameter_bytes} bytes "
            f"and {made.scratch_bytes} of scratch: a version that is not known here"
        )
    return types


def tile_words(row_words: int) -> int:
    """Return how many words of a row make a piece: many, but little beyond its end."""
    for tile in TILES:
        if -row_words % tile <= MAX_WASTE * row_words:
            return tile
    return TILES[-1]


def upload_arguments(table: FilledBuffer) -> Arguments:
    """Return what the program `upload` is launched with."""
    return Arguments(
        "upload",
        longs={"destination": table.on_device, "source": table.on_host},
        ints={"num_words": table.num_bytes // 8},
        constants={"words": 64 * WARPS, "programs": PROGRAMS},
    )


def move_arguments(move: RowCopy, *, gather: bool) -> Arguments:
    """Return what the program `move` is launched with."""
    rows = move.rows
    tile = tile_words(rows.row_bytes // rows.word)
    loads = LOADS if tile > 1 else 1
    words = tile // loads
    return Arguments(
        "move",
        longs={
            "planes": move.planes,
            "ranges": move.ranges,
            "blocks": move.blocks,
            "staging": move.staging,
            "skip": move.begin - move.first_plane * rows.plane_bytes,
            "length": move.end - move.begin,
            "plane_bytes": rows.plane_bytes,
            "block_stride": rows.block_stride,
            "row_stride": rows.row_stride,
            "row_bytes": rows.row_bytes,
        },
        ints={
            "first_plane": move.first_plane,
            "end_plane": move.end_plane,
            "num_planes": rows.num_planes,
            "num_blocks": rows.num_blocks,
            "block_rows": rows.block_rows,
        },
        constants={
            "gather": gather,
            "word": rows.word,
            "loads": loads,
            "pieces": 32 * WARPS // words,
            "words": words,
            "programs": PROGRAMS,
        },
    )


def turn_arguments(turn: RotateLaunch) -> Arguments:
    """Return what the program `turn` is launched with."""
    rope = turn.rope
    num_pairs = rope.rotary_dim // 2
    width = 1 << (num_pairs - 1).bit_length()
    return Arguments(
        "turn",
        longs={
            "planes": turn.planes,
            "factors": turn.factors,
            "block_stride": turn.block_stride,
            "slot_stride": turn.slot_stride,
        },
        ints={
            "first_block": turn.first_block,
            "end_block": turn.end_block,
            "num_planes": turn.num_planes,
            "block_slots": turn.block_slots,
            "num_heads": turn.num_heads,
            "head_dim": rope.head_dim,
            "first_dim": rope.first_dim,
            "num_pairs": num_pairs,
        },
        constants={
            "interleaved": rope.interleaved,
            "dtype": turn.dtype,
            "heads": max(1, 2 * 32 * WARPS // width),
            "pairs": width,
            "programs": PROGRAMS,
        },
    )


def compiled(arguments: Arguments, capability: int) -> CompiledKernel:
    """Compile a program for a compute capability, 90 for Hopper; needs no card.

    Raises:
        DeviceFailed: Triton is not there, or cannot compile it.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from kvcore.cuda import triton_kernels as programs
    except ImportError as error:
        raise DeviceFailed(f"Triton cannot be imported: {error}") from None

    source = ASTSource(
        programs.KERNELS[arguments.program],
        arguments.signature,
        dict(arguments.constants),
    )
    # Fusing multiplications and additions rounds less; copies have neither.
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    try:
        made = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    except triton.TritonError as error:
        *_, told = str(error).splitlines() or ("",)
        raise DeviceFailed(f"Triton: {type(error).__name__}: {told}") from error
    return CompiledKernel(
        cubin=made.asm["cubin"],
        name=made.metadata.name,
        ptx=made.asm["ptx"],
        shared_bytes=made.metadata.shared,
        scratch_bytes=made.metadata.global_scratch_size,
    )


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """The keys of one cache in token order, as one rotation sees them.

    `planes` are K's alone.
    """

    layout: KVLayout
    planes: I64
    rope: Rope

    @classmethod
    def of(cls, layout: KVLayout, planes: I64, rope: Rope) -> Self:
        """Take K's planes, which come first.

        Raises:
            LayoutError: keys that do not lie at multiples of an element's size.
        """
        item = RAW_DTYPES[layout.part.dtype].itemsize
        planes = planes[: layout.part.num_layers]
        places = (layout.block_stride, layout.slot_stride, *planes.tolist())
        if any(place % item for place in places):
            raise LayoutError(f"rope: keys do not lie at multiples of {item} bytes")
        return cls(layout, planes, rope)

    @property
    def factor_bytes(self) -> int:
        """Bytes of one turn's factors."""
        return self.rope.rotary_dim // 2 * 16

    def max_turns(self, table_bytes: int) -> int:
        """Return how many turns a table has room for, at least one."""
        return max((table_bytes - self.planes.nbytes - 16) // self.factor_bytes, 1)

    def arrays(self, turns: Sequence[BlockRotation]) -> list[np.ndarray[Any, Any]]:
        """Return a table: planes' addresses, then the factors of each turn."""
        by = [rotation_factors(self.rope, turn.distance) for turn in turns]
        return [self.planes, np.array(by, np.complex128)]

    def launches(
        self, turns: Sequence[BlockRotation], planes: int, factors: int
    ) -> list[RotateLaunch]:
        """Return the work, with the table's two arrays at these addresses."""
        layout, rope = self.layout, self.rope
        head_bytes = rope.head_dim * RAW_DTYPES[layout.part.dtype].itemsize
        return [
            RotateLaunch(
                rope=rope,
                dtype=layout.part.dtype,
                planes=planes,
                factors=factors + number * self.factor_bytes,
                num_planes=len(self.planes),
                first_block=turn.first_block,
                end_block=turn.end_block,
                block_slots=layout.block_size,
                block_stride=layout.block_stride,
                slot_stride=layout.slot_stride,
                num_heads=layout.part.unit_bytes // head_bytes,
            )
            for number, turn in enumerate(turns)
        ]
