"""KV geometry of models, the cache groups of their ranks, and views of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvcore.errors import SetupError
from kvcore.layout import DTYPE_BYTES, CacheGroup, TensorView

CACHE_SHAPES = (
    "KNSHD",
    "NKSHD",
    "KNHSD",
    "NKHSD",
    "LKNSHD",
    "NLKSHD",
    "LNKSHD/views",
    "NLKSHD/views",
    "NP",
    "NLP",
    "NLP/views",
)
"""Axes of the engine's tensors, outermost first, in the letters of `CacheGroup.axes`.

Without L each layer is a separate tensor; with L one tensor holds all layers, and
`/views` registers each layer of it as a view. P is an opaque page. A model without
heads or without V (MLA) omits those letters.
"""

HANDLE_ALIGNMENT = 4096
LOGICAL_AXES = "NLKSHD"
"""Layers before K and V, as in every known engine: numpy keeps the memory order."""

Words = npt.NDArray[np.uint64] | npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32]
Seeds = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class RankCache:
    """The groups that one rank registers, and the bytes of each memory handle.

    A handle holds one tensor, or one storage that several views share. Sizes are
    multiples of 4 KiB, so that handles can be placed contiguously in a segment.
    """

    groups: tuple[CacheGroup, ...]
    handle_bytes: tuple[int, ...]


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers, heads and dtype of a model's KV, and the paging of its engine."""

    model: str
    num_layers: Annotated[int, Meta(ge=1)]
    num_kv_heads: Annotated[int, Meta(ge=1)] = 1
    head_dim: Annotated[
        int, Meta(ge=1, description="MLA: latent plus rope dimensions")
    ] = 1
    dtype: str = "bfloat16"
    block_size: Annotated[int, Meta(ge=1, description="tokens per block")] = 16
    latent: Annotated[bool, Meta(description="MLA: one latent per token, no V")] = False
    window: Annotated[int | None, Meta(description="of sliding-window layers")] = None
    layers_per_global: Annotated[
        int, Meta(ge=1, description="with a window: period of full-attention layers")
    ] = 1
    cache_shape: Annotated[str, Meta(description="one of CACHE_SHAPES")] = "KNSHD"

    def groups(self, num_blocks: int, rank: int, world_size: int) -> RankCache:
        """Return the layout of one rank's cache with `num_blocks` blocks per group.

        The full-attention group comes first, then the sliding-window group.

        Raises:
            SetupError: the ranks cannot share the heads, or an unknown cache shape.
        """
        if not 0 <= rank < world_size:
            raise SetupError(f"rank {rank} of {world_size}: must be below it")
        heads = self._heads_of_rank(world_size)
        builder = _GroupBuilder(self, heads, num_blocks)
        num_global = self.num_layers // self.layers_per_global
        if self.window is None:
            builder.add(self.num_layers, None)
        else:
            builder.add(num_global, None)
            builder.add(self.num_layers - num_global, self.window)
        return RankCache(tuple(builder.groups), tuple(builder.handle_bytes))

    def token_bytes(self, world_size: int) -> int:
        """Return the bytes of one token on one rank, in all layers."""
        row = self._heads_of_rank(world_size) * self.head_dim * self._item
        return row * self.num_layers * (1 if self.latent else 2)

    def piece_bytes(self, world_size: int) -> int:
        """Return the contiguous bytes of one block on one rank: a plane, or a page."""
        block = self._heads_of_rank(world_size) * self.head_dim * self._item
        block *= self.block_size
        return block * 2 if "P" in self.cache_shape and not self.latent else block

    @property
    def _item(self) -> int:
        if self.dtype not in DTYPE_BYTES:
            raise SetupError(
                f"model.dtype {self.dtype!r}: known are {', '.join(DTYPE_BYTES)}"
            )
        return DTYPE_BYTES[self.dtype]

    def _heads_of_rank(self, world_size: int) -> int:
        """Return the KV heads of a rank; more ranks than heads replicate them."""
        if self.latent:
            return 1
        many, few = sorted((self.num_kv_heads, world_size), reverse=True)
        if many % few:
            raise SetupError(
                f"{self.model} has {self.num_kv_heads} KV heads: {world_size} ranks "
                "cannot share them evenly",
                key="ranks",
            )
        return max(1, self.num_kv_heads // world_size)


class _GroupBuilder:
    """Builds groups and the memory handles of their tensors."""

    def __init__(self, geometry: Geometry, heads: int, num_blocks: int) -> None:
        if geometry.cache_shape not in CACHE_SHAPES:
            raise SetupError(
                f"model.cache_shape {geometry.cache_shape!r}: known are "
                f"{', '.join(CACHE_SHAPES)}"
            )
        self.geometry = geometry
        self.groups: list[CacheGroup] = []
        self.handle_bytes: list[int] = []
        axes, _, views = geometry.cache_shape.partition("/")
        self.axes = (
            axes.translate(str.maketrans("", "", "KH")) if geometry.latent else axes
        )
        self.views = bool(views)
        token_bytes = heads * geometry.head_dim * geometry._item
        self.item = 1 if "P" in axes else geometry._item
        self.sizes = {
            "K": 2,
            "N": num_blocks,
            "S": geometry.block_size,
            "H": heads,
            "D": geometry.head_dim,
            "P": geometry.block_size * token_bytes * (1 if geometry.latent else 2),
        }

    def add(self, num_layers: int, window: int | None) -> None:
        """Append a group of `num_layers` layers with new handles."""
        if num_layers == 0:
            return
        geometry = self.geometry
        pages = "P" in self.axes
        self.groups.append(
            CacheGroup(
                axes=self.axes.replace("L", "") if self.views else self.axes,
                dtype="uint8" if pages else geometry.dtype,
                block_size=geometry.block_size,
                tensors=self._tensors(num_layers),
                kind="pages" if pages else "tokens",
                window=window,
                replicated=geometry.latent,
            )
        )

    def _tensors(self, num_layers: int) -> tuple[TensorView, ...]:
        sizes = self.sizes | {"L": num_layers}
        shape = tuple(sizes[letter] for letter in self.axes)
        strides = _packed_strides(shape, self.item)
        if "L" not in self.axes:
            size = math.prod(shape) * self.item
            handles = [self._handle(size) for _ in range(num_layers)]
            return tuple(TensorView(handle, 0, shape, strides) for handle in handles)
        handle = self._handle(math.prod(shape) * self.item)
        if not self.views:
            return (TensorView(handle, 0, shape, strides),)
        at = self.axes.index("L")
        inner_shape = shape[:at] + shape[at + 1 :]
        inner_strides = strides[:at] + strides[at + 1 :]
        return tuple(
            TensorView(handle, layer * strides[at], inner_shape, inner_strides)
            for layer in range(num_layers)
        )

    def _handle(self, num_bytes: int) -> int:
        self.handle_bytes.append(-(-num_bytes // HANDLE_ALIGNMENT) * HANDLE_ALIGNMENT)
        return len(self.handle_bytes) - 1


def _packed_strides(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    return tuple(item * math.prod(shape[at + 1 :]) for at in range(len(shape)))


PRESETS: dict[str, Geometry] = {
    geometry.model: geometry
    for geometry in (
        Geometry("llama-3.1-8b", num_layers=32, num_kv_heads=8, head_dim=128),
        Geometry("llama-3.1-70b", num_layers=80, num_kv_heads=8, head_dim=128),
        Geometry("qwen3-32b", num_layers=64, num_kv_heads=8, head_dim=128),
        Geometry("deepseek-v3", num_layers=61, head_dim=512 + 64, latent=True),
        Geometry(
            "gemma-3-27b",
            num_layers=62,
            num_kv_heads=16,
            head_dim=128,
            window=1024,
            layers_per_global=6,
        ),
        Geometry("small-llama", num_layers=4, num_kv_heads=8, head_dim=128),
        Geometry("small-mla", num_layers=4, head_dim=512 + 64, latent=True),
        Geometry(
            "small-hybrid",
            num_layers=6,
            num_kv_heads=4,
            head_dim=128,
            window=512,
            layers_per_global=3,
        ),
        Geometry("tiny-llama", num_layers=2, num_kv_heads=2, head_dim=4),
        Geometry("tiny-mla", num_layers=2, head_dim=12, latent=True),
        Geometry(
            "tiny-hybrid",
            num_layers=3,
            num_kv_heads=2,
            head_dim=4,
            window=512,
            layers_per_global=3,
        ),
    )
}
"""Source: the models' config.json files. `small-` and `tiny-` keep a family's
shape with four full-size layers, or with some tens of bytes per token."""


def preset(name: str) -> Geometry:
    """Return a preset.

    Raises:
        SetupError: unknown; the message names the nearest preset.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SetupError(
        f"no model preset {name!r}{hint} (known: {', '.join(PRESETS)})", key="preset"
    )


def handle_starts(cache: RankCache) -> list[int]:
    """Return the byte offset of each handle when they are placed contiguously."""
    starts: list[int] = np.cumsum((0, *cache.handle_bytes[:-1])).tolist()
    return starts


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """A group as `[N, L, K, S, H, words]`, whatever its memory order.

    It is derived from the registered tensors, independently of the copy code that the
    server uses, so that each checks the other. Offset and strides are in bytes. Axes
    that the group lacks have size one; an opaque page is one row of words. A word has
    eight bytes if a row of D is a multiple of that, else one.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    word: int

    @classmethod
    def of(cls, group: CacheGroup, starts: Sequence[int]) -> BlockGrid:
        """Return the grid of a group whose handles begin at `starts` of one memory."""
        first = group.tensors[0]
        axes = group.axes.replace("P", "D")
        sizes = dict(zip(axes, first.shape, strict=True))
        strides = dict(zip(axes, first.strides, strict=True))
        row_bytes = sizes["D"] * DTYPE_BYTES[group.dtype]
        word = 8 if row_bytes % 8 == 0 else 1
        sizes["D"], strides["D"] = row_bytes // word, word
        offsets = [starts[tensor.handle] + tensor.offset for tensor in group.tensors]
        if "L" not in sizes:
            sizes["L"] = len(offsets)
            strides["L"] = offsets[1] - offsets[0] if len(offsets) > 1 else row_bytes
        return cls(
            tuple(sizes.get(axis, 1) for axis in LOGICAL_AXES),
            tuple(strides.get(axis, word) for axis in LOGICAL_AXES),
            offsets[0],
            word,
        )

    def view(self, memory: npt.NDArray[np.uint8]) -> Words:
        """Return the view of host memory `[num_bytes]` that the grid describes."""
        dtype = np.uint64 if self.word == 8 else np.uint8
        return np.ndarray(self.shape, dtype, memory.data, self.offset, self.strides)
