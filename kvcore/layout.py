"""Locations of K and V in an engine's paged cache, and in a chunk's part in L1.

A worker registers `CacheGroup`s. `KVLayout.derive` validates each against the chunk
size and the registered memory, and derives from it:

- the `PartLayout`, the meaning of a part's bytes: equal for all instances that may
  share chunks, independent of their paging, and identified by a fingerprint;
- the planes: the offset of each (K or V, layer), and the stride of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Literal, NamedTuple, NewType

import msgspec
import numpy as np
from msgspec import Meta

from kvcore.errors import LayoutError

Fingerprint = NewType("Fingerprint", str)
"""16 hexadecimal digits."""

DTYPE_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e5m2": 1,
    "int8": 1, "uint8": 1,
}  # fmt: skip


MAX_PLANES = 16_384
"""Limit of planes per cache group: K and V of 8,192 layers."""


class TensorView(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in registered memory. Offset and strides are in bytes."""

    handle: Annotated[int, Meta(ge=0, description="index into the handles")]
    offset: Annotated[int, Meta(ge=0, description="bytes from the handle's start")]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class CacheGroup(msgspec.Struct, frozen=True):
    """Layers of one attention kind that share block ids.

    `axes` has one letter per dimension of the tensors: L layer, K the pair K and V, N
    block, S slot in the block, H head, D element of a head. Dimensions that a tensor
    lacks (K with MLA, L with one tensor per layer) are left out. In opaque groups, P
    stands for each dimension inside a block's page.
    """

    axes: Annotated[str, Meta(min_length=1, max_length=16)]
    dtype: Annotated[str, Meta(max_length=16)]
    block_size: Annotated[int, Meta(ge=1, description="tokens per block")]
    tensors: Annotated[tuple[TensorView, ...], Meta(min_length=1)]
    kind: Annotated[
        Literal["tokens", "pages"],
        Meta(description="tokens: addressed one by one; pages: opaque"),
    ] = "tokens"
    window: Annotated[
        int | None, Meta(description="tokens of a sliding window; none: attends to all")
    ] = None
    replicated: Annotated[
        bool, Meta(description="every rank holds the same bytes (MLA)")
    ] = False


def token_buffer(shape: tuple[int, ...], dtype: str) -> CacheGroup:
    """Return the group of a contiguous buffer `[K, L, T, D]`: T blocks of one token.

    K is 2, or 1 with MLA, where every rank holds the same bytes.

    Raises:
        LayoutError: another number of dimensions, or an unknown dtype.
    """
    if len(shape) != 4 or min(shape) < 1 or shape[0] > 2:
        raise LayoutError(
            f"shape {shape}: a blend buffer is [2, L, T, D], or [1, L, T, D]"
        )
    num_kv, num_layers, num_tokens, width = shape
    axes = (num_kv, num_layers, num_tokens, 1, width)
    item = _item_bytes(dtype)
    strides = tuple(item * math.prod(axes[at + 1 :]) for at in range(len(axes)))
    return CacheGroup(
        axes="KLNSD",
        dtype=dtype,
        block_size=1,
        tensors=(TensorView(0, 0, axes, strides),),
        replicated=num_kv == 1,
    )


def _item_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        known = ", ".join(sorted(DTYPE_BYTES))
        raise LayoutError(f"dtype {dtype!r}: known are {known}")
    return DTYPE_BYTES[dtype]


class MemoryLayoutDesc(msgspec.Struct, frozen=True):
    """Shapes and dtypes of the buffers that hold some tokens of a chunk."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


class PartLayout(msgspec.Struct, frozen=True):
    """Meaning of the bytes of a part: planes of units, `[KV, L, units, unit bytes]`.

    `order` is "token" if a unit is one token, so that a part is `[KV, L, T, D]`;
    "block" if a unit is a whole block in the engine's own order, because its tokens are
    not contiguous; "page" if blocks are opaque. `inner` names the axes inside a unit
    with their sizes, outermost first; it is empty for pages and for tokens that are
    `[head, dim]`.
    """

    order: Literal["token", "block", "page"]
    num_kv: int
    num_layers: int
    unit_tokens: int
    unit_bytes: int
    chunk_size: int
    dtype: str
    inner: str
    window: int | None
    replicated: bool

    @property
    def num_planes(self) -> int:
        """Number of pairs (K or V, layer); the planes of K come first."""
        return self.num_kv * self.num_layers

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane of a whole part."""
        return self.chunk_size // self.unit_tokens * self.unit_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of a whole part."""
        return self.num_planes * self.plane_bytes

    @property
    def fingerprint(self) -> Fingerprint:
        """Identifier of this value, equal in all processes."""
        return Fingerprint(sha256(msgspec.msgpack.encode(self)).hexdigest()[:16])

    def desc(self, num_tokens: int) -> MemoryLayoutDesc:
        """Return shape and dtype of the units that hold the first `num_tokens`."""
        units = -(-num_tokens // self.unit_tokens)
        if self.order != "page":
            size = self.unit_bytes // DTYPE_BYTES[self.dtype]
            shape = (self.num_kv, self.num_layers, units, size)
            return MemoryLayoutDesc((shape,), (self.dtype,))
        pages = (self.num_layers, units, self.unit_bytes)
        return MemoryLayoutDesc((pages,), ("uint8",))

    def __str__(self) -> str:
        heads = "" if self.num_kv == 2 else ", one plane per layer"
        window = f", window {self.window}" if self.window else ""
        layers = f"{self.num_layers} layer{'s' * (self.num_layers != 1)}"
        size = "" if self.order == "token" else f"{self.unit_tokens}-token "
        replicated = ", replicated" if self.replicated else ""
        return (
            f"{layers}{heads}, {self.unit_bytes} bytes per "
            f"{size}{self.order} ({self.dtype}){window}{replicated}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class KVLayout:
    """Locations of one cache group of one instance; offsets and strides in bytes.

    Token t of block b of plane p lies in handle `plane_handles[p]` at
    `plane_offsets[p] + b * block_stride + t * slot_stride` and is `part.unit_bytes`
    long. In block and page order, block b of plane p is `part.unit_bytes` contiguous
    bytes. `plane_offsets` is `int64[part.num_planes]`.
    """

    part: PartLayout
    block_size: int
    num_blocks: int
    block_stride: int
    slot_stride: int
    plane_handles: tuple[int, ...]
    plane_offsets: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def derive(
        cls, group: CacheGroup, handle_bytes: Sequence[int], chunk_size: int
    ) -> KVLayout:
        """Return the layout of a registered group.

        `handle_bytes` holds the size of each handle, `chunk_size` counts tokens.

        Raises:
            LayoutError: naming the field that is invalid.
        """
        return _Derivation(group, handle_bytes, chunk_size).layout()


_AXES = {"tokens": ("LKNSHD", "NSD"), "pages": ("LNP", "NP")}
"""By kind: the axes that are allowed, and those that are required."""


class _Dim(NamedTuple):
    """One dimension of a tensor; the smaller the stride, the further inside."""

    stride: int
    size: int
    axis: str


class _Unit(NamedTuple):
    """Bytes that are copied as one; see `PartLayout` and `KVLayout`."""

    order: Literal["token", "block", "page"]
    num_bytes: int
    slot_stride: int
    inner: str


class _Derivation:
    """Derivation of a `KVLayout` from a registered group."""

    def __init__(
        self, group: CacheGroup, handle_bytes: Sequence[int], chunk_size: int
    ) -> None:
        self.group = group
        self.handle_bytes = handle_bytes
        self.chunk_size = chunk_size
        self.item = _item_bytes(group.dtype)
        self._check_group()
        for index, tensor in enumerate(group.tensors):
            self._check_tensor(f"tensors[{index}]", tensor)
        first = group.tensors[0]
        dims = zip(first.strides, first.shape, group.axes, strict=True)
        self.dims = sorted(map(_Dim._make, dims))
        """Those of all tensors, from the innermost out."""
        self._check_bounds()
        self.size = {dim.axis: dim.size for dim in self.dims}
        self.stride = {dim.axis: dim.stride for dim in self.dims}

    def layout(self) -> KVLayout:
        """Return the layout, after the checks that need the sizes of the axes."""
        group, stride = self.group, self.stride
        unit = self._unit()
        num_kv, num_layers = self.size.get("K", 1), self.size.get("L", 1)
        if num_kv > 2:
            raise LayoutError(f"axes K: is K and V, not {num_kv}")
        if num_kv * num_layers * len(group.tensors) > MAX_PLANES:
            raise LayoutError(
                f"{num_layers} layers of {len(group.tensors)} tensors: at most "
                f"{MAX_PLANES} planes (K or V of a layer)"
            )
        planes = [
            (t.handle, t.offset + kv * stride.get("K", 0) + layer * stride.get("L", 0))
            for kv in range(num_kv)
            for t in group.tensors
            for layer in range(num_layers)
        ]
        part = PartLayout(
            order=unit.order,
            num_kv=num_kv,
            num_layers=len(group.tensors) * num_layers,
            unit_tokens=1 if unit.order == "token" else group.block_size,
            unit_bytes=unit.num_bytes,
            chunk_size=self.chunk_size,
            dtype=group.dtype,
            inner=unit.inner,
            window=group.window,
            replicated=group.replicated,
        )
        return KVLayout(
            part=part,
            block_size=group.block_size,
            num_blocks=self.size["N"],
            block_stride=stride["N"],
            slot_stride=unit.slot_stride,
            plane_handles=tuple(handle for handle, _ in planes),
            plane_offsets=np.array([offset for _, offset in planes], dtype=np.int64),
        )

    def _check_group(self) -> None:
        group, axes = self.group, self.group.axes
        allowed, needed = _AXES[group.kind]
        names = axes.replace("P", "") + "P" * ("P" in axes)
        known = set(needed) <= set(names) <= set(allowed)
        if not known or len(set(names)) != len(names):
            raise LayoutError(
                f"axes {axes!r}: {group.kind} take each of {allowed} at most once (P "
                f"may be several) and need {needed}"
            )
        if self.chunk_size % group.block_size:
            raise LayoutError(
                f"block_size {group.block_size} does not divide the chunk size "
                f"{self.chunk_size}"
            )
        if group.window is not None and group.window < 1:
            raise LayoutError(f"window {group.window}: must be at least 1")

    def _check_tensor(self, where: str, tensor: TensorView) -> None:
        rank, first = len(self.group.axes), self.group.tensors[0]
        if len(tensor.shape) != rank or len(tensor.strides) != rank:
            raise LayoutError(
                f"{where}: axes {self.group.axes!r} need {rank} dimensions"
            )
        if (tensor.shape, tensor.strides) != (first.shape, first.strides):
            raise LayoutError(
                f"{where}: shape and strides differ from tensors[0]'s; layers of other "
                "shapes need a group of their own"
            )
        if tensor.handle >= len(self.handle_bytes):
            raise LayoutError(f"{where}: no handle {tensor.handle}")
        if min(tensor.shape) < 1 or min(tensor.strides) < 1:
            raise LayoutError(f"{where}: sizes and strides must be positive")

    def _check_bounds(self) -> None:
        extent, tensors = self.item, self.group.tensors
        for dim in self.dims:
            if dim.size > 1 and dim.stride < extent:
                raise LayoutError(f"tensors[0]: strides {tensors[0].strides} overlap")
            extent += (dim.size - 1) * dim.stride
        for index, tensor in enumerate(tensors):
            end, room = tensor.offset + extent, self.handle_bytes[tensor.handle]
            if end > room:
                raise LayoutError(
                    f"tensors[{index}]: ends at byte {end} of a handle of {room}"
                )

    def _unit(self) -> _Unit:
        if self.group.kind == "pages":
            page = self._contiguous("P")
            if page is None:
                raise LayoutError("axes P: a page must be contiguous")
            return _Unit("page", page, 0, "")
        num_slots, block_size = self.size["S"], self.group.block_size
        if num_slots != block_size:
            raise LayoutError(
                f"axes S: {num_slots} slots, but block_size is {block_size}"
            )
        token, block = self._contiguous("HD"), self._contiguous("SHD")
        if token is not None:
            inner = self._inner("HD")
            transposed = inner.startswith("D") and "," in inner
            return _Unit("token", token, self.stride["S"], inner if transposed else "")
        if block is not None:
            return _Unit("block", block, self.item, self._inner("SHD"))
        raise LayoutError(
            "axes: neither a token's heads nor a block's inside is contiguous; "
            "register such a cache as opaque pages"
        )

    def _inner(self, axes: str) -> str:
        """Return these axes with their sizes, outermost first, without those of 1."""
        dims = [dim for dim in self.dims if dim.axis in axes and dim.size > 1]
        return ",".join(f"{dim.axis}{dim.size}" for dim in reversed(dims))

    def _contiguous(self, axes: str) -> int | None:
        """Return the bytes that these axes cover without a gap, else None."""
        extent = self.item
        for dim in self.dims:
            if dim.axis not in axes or dim.size == 1:
                continue
            if dim.stride != extent:
                return None
            extent *= dim.size
        return extent
