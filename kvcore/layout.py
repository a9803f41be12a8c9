"""Where K and V lie: in an engine's paged cache, and in a chunk's part in L1.

A worker registers `CacheGroup`s. From each, with the chunk size, `KVLayout` derives
everything that is asked later, once, validated at construction:

- the `PartLayout`, what a part's bytes mean: equal for every instance that may share
  chunks, whatever its paging, and named by a fingerprint;
- the planes: where each (K or V, layer) begins and how far apart its blocks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Literal, NewType

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvcore.errors import LayoutError

Fingerprint = NewType("Fingerprint", str)
"""16 hexadecimal digits."""

DTYPE_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e5m2": 1,
    "int8": 1, "uint8": 1,
}  # fmt: skip


class TensorView(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in registered memory. Offset and strides are in bytes."""

    handle: Annotated[int, Meta(ge=0, description="index into the handles")]
    offset: Annotated[int, Meta(ge=0, description="bytes from the handle's start")]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class CacheGroup(msgspec.Struct, frozen=True):
    """Layers of one attention kind that share block ids.

    `axes` gives one letter for each dimension of every tensor: L layer, K the pair K
    and V, N block, S slot in the block, H head, D element of a head; a dimension
    that does not exist (no K with MLA, no L with one tensor a layer) is left out. In
    opaque groups, P stands for every dimension inside a block's page.
    """

    axes: Annotated[str, Meta(min_length=1, max_length=16)]
    dtype: str
    block_size: Annotated[int, Meta(ge=1, description="tokens a block")]
    tensors: Annotated[tuple[TensorView, ...], Meta(min_length=1)]
    kind: Annotated[
        Literal["tokens", "pages"],
        Meta(description="tokens: addressed one by one; pages: nobody looks inside"),
    ] = "tokens"
    window: Annotated[
        int | None, Meta(description="tokens of a sliding window; none: attends to all")
    ] = None
    replicated: Annotated[
        bool, Meta(description="every rank holds the same bytes (MLA)")
    ] = False


class MemoryLayoutDesc(msgspec.Struct, frozen=True):
    """Shapes and dtypes of the buffers that hold some tokens of a chunk."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


class PartLayout(msgspec.Struct, frozen=True):
    """What the bytes of a part mean: planes of units, `[KV, L, units, unit bytes]`.

    `order` is "token" when a unit is one token, so a part is `[KV, L, T, D]`; "block"
    when a unit is a block with its inside as the engine has it (`inner`, letters of
    `CacheGroup.axes`), where single tokens would be tiny pieces; "page" when nobody
    looks inside a block.
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
        """Pairs of (K or V, layer), K first."""
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
        """Name of this value, the same in every process."""
        return Fingerprint(sha256(msgspec.msgpack.encode(self)).hexdigest()[:16])

    def desc(self, num_tokens: int) -> MemoryLayoutDesc:
        """Shape and dtype of the first `num_tokens` tokens, whole units of them."""
        units = -(-num_tokens // self.unit_tokens)
        if self.order != "page":
            size = self.unit_bytes // DTYPE_BYTES[self.dtype]
            shape = (self.num_kv, self.num_layers, units, size)
            return MemoryLayoutDesc((shape,), (self.dtype,))
        return MemoryLayoutDesc(((self.num_layers, units, self.unit_bytes),), ("uint8",))

    def __str__(self) -> str:
        heads = "" if self.num_kv == 2 else ", one plane a layer"
        window = f", window {self.window}" if self.window else ""
        unit = "token" if self.unit_tokens == 1 else f"{self.unit_tokens}-token {self.order}"
        return (
            f"{self.num_layers} layers{heads}, {self.unit_bytes} bytes a {unit}"
            f" ({self.dtype}){window}{', replicated' if self.replicated else ''}"
        )


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One cache group of one instance, ready to be copied.

    A token t of block b of plane p lies in handle `plane_handles[p]` at
    `plane_offsets[p] + b * block_stride + t * slot_stride`, `part.unit_bytes` long; in
    block and page order, block b of plane p is `part.unit_bytes` contiguous bytes.
    """

    part: PartLayout
    block_size: int
    num_blocks: int
    block_stride: int
    slot_stride: int
    plane_handles: tuple[int, ...]
    plane_offsets: npt.NDArray[np.int64]

    @classmethod
    def derive(
        cls, group: CacheGroup, handle_bytes: Sequence[int], chunk_size: int
    ) -> KVLayout:
        """Validate a registered group against the sizes of its handles.

        Raises:
            LayoutError: naming the field that cannot be right.
        """
        return _Derivation(group, handle_bytes, chunk_size).layout()


class _Derivation:
    """One registered group on its way to a `KVLayout`."""

    def __init__(
        self, group: CacheGroup, handle_bytes: Sequence[int], chunk_size: int
    ) -> None:
        self.group = group
        self.handle_bytes = handle_bytes
        self.chunk_size = chunk_size
        allowed, needed = ("LNP", "NP") if group.kind == "pages" else ("LKNSHD", "NSD")
        names = group.axes if group.kind == "tokens" else group.axes.replace("P", "", group.axes.count("P") - 1)
        if set(names) - set(allowed) or set(needed) - set(names) or len(set(names)) != len(names):
            raise LayoutError(
                f"axes {group.axes!r}: {group.kind} take each of {allowed} at most "
                f"once and need {needed}"
            )
        if group.dtype not in DTYPE_BYTES:
            raise LayoutError(
                f"dtype {group.dtype!r}: known are {', '.join(sorted(DTYPE_BYTES))}"
            )
        if chunk_size % group.block_size:
            raise LayoutError(
                f"block_size {group.block_size} does not divide the chunk size "
                f"{chunk_size}"
            )
        if group.window is not None and group.window < 1:
            raise LayoutError(f"window {group.window}: must be at least 1")
        self.item = DTYPE_BYTES[group.dtype]
        first = group.tensors[0]
        for index, tensor in enumerate(group.tensors):
            self._check(index, tensor)
            if (tensor.shape, tensor.strides) != (first.shape, first.strides):
                raise LayoutError(
                    f"tensors[{index}]: shape and strides differ from tensors[0]'s; "
                    "layers of other shapes make a group of their own"
                )
        self.size = dict(zip(group.axes, first.shape, strict=True))
        self.stride = dict(zip(group.axes, first.strides, strict=True))

    def _check(self, index: int, tensor: TensorView) -> None:
        where = f"tensors[{index}]"
        rank = len(self.group.axes)
        if len(tensor.shape) != rank or len(tensor.strides) != rank:
            raise LayoutError(f"{where}: axes {self.group.axes!r} need {rank} dimensions")
        if tensor.handle >= len(self.handle_bytes):
            raise LayoutError(f"{where}: no handle {tensor.handle}")
        if min(tensor.shape) < 1 or min(tensor.strides) < 1:
            raise LayoutError(f"{where}: sizes and strides must be positive")
        extent = self.item
        for size, stride in sorted(zip(tensor.shape, tensor.strides, strict=True), key=lambda dim: dim[1]):
            if size > 1 and stride < extent:
                raise LayoutError(f"{where}: strides {tensor.strides} overlap")
            extent += (size - 1) * stride
        room = self.handle_bytes[tensor.handle]
        if tensor.offset + extent > room:
            raise LayoutError(
                f"{where}: ends at byte {tensor.offset + extent} of a handle of {room}"
            )

    def layout(self) -> KVLayout:
        group, size, stride = self.group, self.size, self.stride
        order, unit_bytes, slot_stride, inner = self._unit()
        tensors_have_layers = "L" in size
        num_layers = len(group.tensors) * size.get("L", 1)
        num_kv = size.get("K", 1)
        if num_kv > 2:
            raise LayoutError(f"axis K is K and V, not {num_kv}")
        planes = [
            (t.handle, t.offset + kv * stride.get("K", 0) + layer * stride.get("L", 0))
            for kv in range(num_kv)
            for t in group.tensors
            for layer in range(size["L"] if tensors_have_layers else 1)
        ]
        part = PartLayout(
            order=order,
            num_kv=num_kv,
            num_layers=num_layers,
            unit_tokens=1 if order == "token" else group.block_size,
            unit_bytes=unit_bytes,
            chunk_size=self.chunk_size,
            dtype=group.dtype,
            inner=inner,
            window=group.window,
            replicated=group.replicated,
        )
        return KVLayout(
            part=part,
            block_size=group.block_size,
            num_blocks=size["N"],
            block_stride=stride["N"],
            slot_stride=slot_stride,
            plane_handles=tuple(handle for handle, _ in planes),
            plane_offsets=np.array([offset for _, offset in planes], dtype=np.int64),
        )

    def _unit(self) -> tuple[Literal["token", "block", "page"], int, int, str]:
        """Return order, unit bytes, bytes from slot to slot, and a block's inside."""
        size, stride, item = self.size, self.stride, self.item
        if self.group.kind == "pages":
            page = self._contiguous([i for i, a in enumerate(self.group.axes) if a == "P"])
            if page is None:
                raise LayoutError("axes P: a page must be contiguous")
            return "page", page, 0, ""
        if size["S"] != self.group.block_size:
            raise LayoutError(
                f"axis S has {size['S']} slots, block_size is {self.group.block_size}"
            )
        row = self._contiguous([i for i, a in enumerate(self.group.axes) if a in "HD"])
        head_major = size.get("H", 1) > 1 and stride["H"] > stride["S"]
        if row is not None and not head_major:
            return "token", row, stride["S"], ""
        inside = [i for i, a in enumerate(self.group.axes) if a in "SHD"]
        block = self._contiguous(inside)
        if block is None:
            raise LayoutError(
                "neither a token's heads nor a block's inside is contiguous: register "
                "such a cache as opaque pages"
            )
        letters = sorted((self.group.axes[i] for i in inside), key=lambda a: -stride[a])
        dims = ",".join(f"{letter}{size[letter]}" for letter in letters)
        return "block", block, item, dims

    def _contiguous(self, dims: list[int]) -> int | None:
        """Return the bytes that these dimensions cover without a gap, else None."""
        tensor = self.group.tensors[0]
        extent = self.item
        for size, stride in sorted(
            ((tensor.shape[i], tensor.strides[i]) for i in dims), key=lambda dim: dim[1]
        ):
            if size > 1 and stride != extent:
                return None
            extent *= size
        return extent
