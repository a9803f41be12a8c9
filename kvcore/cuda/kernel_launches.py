"""Launches of the Triton kernels, compiled once for each set of constants.

`triton.compile` needs no GPU. The cubin is loaded as it is and launched by the driver,
which needs no C compiler and no torch and takes about 5 us where Triton's own launcher
takes 20 to 50 us.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ctypes import c_int32, c_int64, sizeof
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from kvcore.blend.key_rotation import RAW_DTYPES, BlockRotation
from kvcore.cuda.copy_plan import PartRows
from kvcore.cuda.device_interface import Device, Function, Integer, Launch, Stream
from kvcore.cuda.staging import KernelTable
from kvcore.errors import DeviceFailed
from kvcore.layout import KVLayout
from kvcore.rope import Rope

PROGRAMS = 6
"""Blocks per launch, and so the most SMs. Gathers and scatters together take twelve."""
WARPS = 16
"""Per block. An SM has room for twice as many, so it need not be idle."""
LOADS = 4
"""Words of one piece that a thread reads before it writes; see `triton_kernels`."""
TILES = (1024, 256, 64, 16, 4, 1)
"""Sizes of pieces of a row, in words."""
MAX_WASTE = 1 / 8
"""Most of a row, as a share, that the last piece may exceed it by."""
_PARAMETER = re.compile(r"\.param \.[bsuf](\d+)")


@dataclass(frozen=True, slots=True)
class RowCopy:
    """A copy of [begin, end) of a plan's line: cache to staging, or the way back.

    `tables` are the device addresses of the plan's planes, int64 `[planes]`, ranges,
    int64 `[spans, 2]`, and blocks, int32 `[spans, blocks per chunk]`. `staging` is the
    address of `begin`. Bytes that the line does not have (null blocks, bytes outside
    the ranges) are left unchanged on the side that is written.
    """

    rows: PartRows
    tables: tuple[int, ...]
    staging: int
    begin: int
    end: int
    is_gather: bool
    """From the cache to staging."""

    @property
    def first_plane(self) -> int:
        """Number of the plane that `begin` lies in, counted along the line."""
        return self.begin // self.rows.plane_bytes

    @property
    def end_plane(self) -> int:
        """One past the number of the last plane that is copied from or to."""
        return -(-self.end // self.rows.plane_bytes)


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """A rotation of some blocks' keys in place, in double precision, then rounded.

    `planes` is the device address of the addresses of K's planes, int64 `[layers]`;
    `factors` that of cosines and sines, float64 `[rotary_dim / 2, 2]`. The heads of a
    slot are contiguous.
    """

    layout: KVLayout
    rope: Rope
    rotation: BlockRotation
    planes: int
    factors: int

    @property
    def num_heads(self) -> int:
        """Heads of a slot."""
        part = self.layout.part
        head_bytes = self.rope.head_dim * RAW_DTYPES[part.dtype].itemsize
        return part.unit_bytes // head_bytes


KernelTask = KernelTable | RowCopy | KeyRotation
"""What a kernel does. A `KernelTable` is uploaded by a kernel: a copy engine would do
it only after the large copies that are queued there."""


class Kernels(Protocol):
    """Runs tasks on a device's SMs."""

    def launch(self, stream: Stream, task: KernelTask) -> None:
        """Queue a task; returns before it has run."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of one launch of a program, and its compile-time constants."""

    program: str
    longs: Mapping[str, int]
    ints: Mapping[str, int]
    constants: Mapping[str, int | bool | str]

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of each argument, by name."""
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
        """Bytes of each parameter: our arguments, then pointers that Triton adds."""
        entry = self.ptx[self.ptx.index(".entry") :]
        bits = _PARAMETER.findall(entry[: entry.index("{")])
        return tuple(int(each) // 8 for each in bits)


@dataclass(frozen=True, slots=True)
class _LoadedKernel:
    """A program on the device, and the types of its arguments."""

    function: Function
    shared_bytes: int
    types: tuple[Integer, ...]


class NoKernels:
    """`Kernels` of a device that cannot run any; a launch raises the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def launch(self, stream: Stream, task: KernelTask) -> None:
        """Raise `DeviceFailed`."""
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
        self._loaded_for(arguments_of(KernelTable(0, 0, 0, ())))

    def launch(self, stream: Stream, task: KernelTask) -> None:
        """Queue a task; see `Kernels`."""
        arguments = arguments_of(task)
        loaded = self._loaded_for(arguments)
        ours = (*arguments.longs.values(), *arguments.ints.values())
        null_pointers = (0,) * (len(loaded.types) - len(ours))
        launch = Launch(
            PROGRAMS, WARPS, loaded.shared_bytes, ours + null_pointers, loaded.types
        )
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
        function = self._device.load(made.cubin, made.name, made.shared_bytes)
        return _LoadedKernel(function, made.shared_bytes, types)


def types_of(arguments: Arguments, made: CompiledKernel) -> tuple[Integer, ...]:
    """Return the types of a launch: our arguments, then null pointers to scratch.

    Raises:
        DeviceFailed: the program's parameters differ, so it would misread them.
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
            f"and {made.scratch_bytes} of scratch: this Triton is not supported"
        )
    return types


def tile_words(row_words: int) -> int:
    """Return the size of a row's pieces in words; see `TILES` and `MAX_WASTE`."""
    for tile in TILES:
        if -row_words % tile <= MAX_WASTE * row_words:
            return tile
    return TILES[-1]


def arguments_of(task: KernelTask) -> Arguments:
    """Return the program and the arguments of a task."""
    match task:
        case KernelTable():
            return _upload_arguments(task)
        case RowCopy():
            return _copy_arguments(task)
        case KeyRotation():
            return _rotation_arguments(task)


def _upload_arguments(table: KernelTable) -> Arguments:
    return Arguments(
        "upload",
        longs={"destination": table.on_device, "source": table.on_host},
        ints={"num_words": table.num_bytes // 8},
        constants={"words": 64 * WARPS, "programs": PROGRAMS},
    )


def _copy_arguments(copy: RowCopy) -> Arguments:
    rows = copy.rows
    planes, ranges, blocks = copy.tables
    tile = tile_words(rows.row_bytes // rows.word)
    loads = LOADS if tile > 1 else 1
    words = tile // loads
    return Arguments(
        "copy_rows",
        longs={
            "planes": planes,
            "ranges": ranges,
            "blocks": blocks,
            "staging": copy.staging,
            "skip": copy.begin - copy.first_plane * rows.plane_bytes,
            "length": copy.end - copy.begin,
            "plane_bytes": rows.plane_bytes,
            "block_stride": rows.block_stride,
            "row_stride": rows.row_stride,
            "row_bytes": rows.row_bytes,
        },
        ints={
            "first_plane": copy.first_plane,
            "end_plane": copy.end_plane,
            "num_planes": rows.num_planes,
            "num_blocks": rows.num_blocks,
            "block_rows": rows.block_rows,
        },
        constants={
            "gather": copy.is_gather,
            "word": rows.word,
            "loads": loads,
            "pieces": 32 * WARPS // words,
            "words": words,
            "programs": PROGRAMS,
        },
    )


def _rotation_arguments(task: KeyRotation) -> Arguments:
    layout, rope = task.layout, task.rope
    num_pairs = rope.rotary_dim // 2
    width = 1 << (num_pairs - 1).bit_length()
    return Arguments(
        "rotate_keys",
        longs={
            "planes": task.planes,
            "factors": task.factors,
            "block_stride": layout.block_stride,
            "slot_stride": layout.slot_stride,
        },
        ints={
            "first_block": task.rotation.first_block,
            "end_block": task.rotation.end_block,
            "num_planes": layout.part.num_layers,
            "block_slots": layout.block_size,
            "num_heads": task.num_heads,
            "head_dim": rope.head_dim,
            "first_dim": rope.first_dim,
            "num_pairs": num_pairs,
        },
        constants={
            "interleaved": rope.interleaved,
            "dtype": layout.part.dtype,
            "heads": max(1, 2 * 32 * WARPS // width),
            "pairs": width,
            "programs": PROGRAMS,
        },
    )


def compiled(arguments: Arguments, capability: int) -> CompiledKernel:
    """Return a program compiled for a compute capability, 90 for Hopper. Needs no GPU.

    Raises:
        DeviceFailed: Triton is not installed, or cannot compile it.
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
    # Fused multiply-adds round once less in key rotations; copies have none.
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    try:
        made = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    except triton.TritonError as error:
        *_, reason = str(error).splitlines() or ("",)
        raise DeviceFailed(f"Triton: {type(error).__name__}: {reason}") from error
    return CompiledKernel(
        cubin=made.asm["cubin"],
        name=made.metadata.name,
        ptx=made.asm["ptx"],
        shared_bytes=made.metadata.shared,
        scratch_bytes=made.metadata.global_scratch_size,
    )
