"""Conversion of vLLM's cache groups and tensors to the server's cache groups.

A block's inner layout is private to vLLM: its CPU backend stores K transposed, and
quantised caches contain scales. Blocks are therefore registered as opaque pages and
only whole blocks are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvcore.errors import LayoutError, SetupError
from kvcore.layout import DTYPE_BYTES, CacheGroup, TensorView
from kvcore.protocol import MemoryHandle

if TYPE_CHECKING:
    import torch

_WINDOW_FIELDS = {
    "FullAttentionSpec": None,
    "MLAAttentionSpec": None,
    "SinkFullAttentionSpec": None,
    "SlidingWindowSpec": "sliding_window",
    "SlidingWindowMLASpec": "sliding_window",
    "ChunkedLocalAttentionSpec": "attention_chunk_size",
}
"""For each kind of layer spec, the field with the size of its window; None for none."""


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """One cache group of the engine: layers that share block ids."""

    block_size: int
    window: int | None = None
    """Number of last tokens that the group keeps; None for all."""
    is_chunked: bool = False
    """Whether windows start at multiples of `window` instead of sliding."""
    is_mla: bool = False
    layers: tuple[str, ...] = ()

    def num_skipped(self, num_computed: int) -> int:
        """Return how many leading blocks the engine may have freed by then."""
        if self.window is None:
            return 0
        if self.is_chunked:
            return num_computed // self.window * self.window // self.block_size
        return max(num_computed - self.window + 1, 0) // self.block_size


@dataclass(frozen=True, slots=True)
class CacheDescription:
    """Handles and cache groups that a worker registers."""

    handles: tuple[MemoryHandle, ...]
    groups: tuple[CacheGroup, ...]
    sources: tuple[int, ...]
    """For each group, the index of its engine group."""


def check_engine(config: Any) -> None:
    """Check by vLLM's `VllmConfig` that the engine's KV can be shared.

    Raises:
        SetupError: it cannot; the message gives the reason.
    """
    parallel, role = config.parallel_config, config.kv_transfer_config.kv_role
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise SetupError(f"{name} over 1 spreads a block's tokens over ranks")
    if getattr(parallel, "nnodes_within_dp", 1) > 1:
        raise SetupError("an engine's ranks on several hosts; a server serves one")
    if role != "kv_both":
        raise SetupError(f"kv_role {role}; this connector stores and loads: kv_both")
    if getattr(config.model_config, "is_diffusion", False):
        raise SetupError("a diffusion model replaces tokens that it has computed")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise SetupError("calculate_kv_scales gives each start scales of its own")


def engine_groups(kv_cache_config: Any) -> tuple[EngineGroup, ...]:
    """Return the groups of vLLM's `KVCacheConfig`.

    Raises:
        LayoutError: a group's state is not per token (Mamba), or does not depend on
            the preceding tokens only.
    """
    return tuple(map(_engine_group, kv_cache_config.kv_cache_groups))


def _engine_group(group: Any) -> EngineGroup:
    spec = group.kv_cache_spec
    block_size = spec.block_size
    # Layers of one kind with different sizes: the first represents the kind.
    specs = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
    spec = specs[0]
    name = type(spec).__name__
    if name not in _WINDOW_FIELDS:
        raise LayoutError(f"layers of kind {name} cannot be cached by token")
    if not getattr(group, "enable_kv_transfer", True):
        raise LayoutError(f"vLLM does not let layers of kind {name} be transferred")
    if not all(getattr(one, "prefix_cacheable", True) for one in specs):
        raise LayoutError(f"vLLM keeps layers of kind {name} out of prefix caching")
    if any(getattr(one, "non_causal", False) for one in specs):
        raise LayoutError("layers that look ahead: a token's KV depends on later ones")
    field = _WINDOW_FIELDS[name]
    return EngineGroup(
        block_size,
        getattr(spec, field) if field else None,
        is_chunked="Chunked" in name,
        is_mla="MLA" in name,
        layers=tuple(group.layer_names),
    )


def describe_caches(
    groups: Sequence[EngineGroup],
    caches: Mapping[str, torch.Tensor],
    num_blocks: int,
    *,
    share: Callable[[torch.Tensor], MemoryHandle],
    replicate_mla: bool,
) -> CacheDescription:
    """Share the caches' memory and describe their groups.

    `share` is called once per storage (`SharedCacheMemory.share`). `replicate_mla`:
    whether every rank holds the same bytes of MLA layers.

    Raises:
        LayoutError, HandleError: they cannot be described or shared.
    """
    tables = _HandleTable(share)
    by_form: dict[_Form, list[TensorView]] = {}
    for source, group in enumerate(groups):
        for tensor in _distinct(
            caches[name] for name in group.layers if name in caches
        ):
            for view in _views(tensor, num_blocks, tables):
                form = _Form(source, view.shape, view.strides, _dtype(tensor))
                by_form.setdefault(form, []).append(view)
    if not by_form:
        raise LayoutError("the engine has no layers with a cache")
    return CacheDescription(
        tuple(tables.handles),
        tuple(
            CacheGroup(
                axes="N" + "P" * (len(form.shape) - 1),
                dtype=form.dtype,
                block_size=groups[form.source].block_size,
                tensors=tuple(views),
                kind="pages",
                window=groups[form.source].window,
                replicated=replicate_mla and groups[form.source].is_mla,
            )
            for form, views in by_form.items()
        ),
        tuple(form.source for form in by_form),
    )


class _Form(NamedTuple):
    """What the tensors of one group have in common."""

    source: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class _HandleTable:
    """Memory handles, one per storage, created on first use."""

    def __init__(self, share: Callable[[torch.Tensor], MemoryHandle]) -> None:
        self._share = share
        self.handles: list[MemoryHandle] = []
        self._numbers: dict[int, int] = {}

    def number(self, tensor: torch.Tensor) -> int:
        """Return the index of the handle of a tensor's storage."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._numbers:
            self.handles.append(self._share(tensor))
            # Sharing has moved the storage's memory, and so changed its address.
            self._numbers[storage.data_ptr()] = len(self.handles) - 1
        return self._numbers[storage.data_ptr()]


def _distinct(tensors: Any) -> list[torch.Tensor]:
    """Return distinct tensors (layers may share a cache), after checking their type."""
    seen: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if not hasattr(tensor, "untyped_storage"):
            raise LayoutError(f"a layer's cache is a {type(tensor).__name__}")
        seen.setdefault(tensor.data_ptr(), tensor)
    return list(seen.values())


def _views(
    tensor: torch.Tensor, num_blocks: int, tables: _HandleTable
) -> list[TensorView]:
    """Return views of a layer's tensor with blocks outermost: one, or K's and V's."""
    size = tensor.element_size()
    shape = tuple(tensor.shape)
    strides = tuple(stride * size for stride in tensor.stride())
    offsets = [tensor.storage_offset() * size]
    if shape[0] % num_blocks and shape[0] == 2:  # K and V are the two halves.
        offsets.append(offsets[0] + strides[0])
        shape, strides = shape[1:], strides[1:]
    ratio, remainder = divmod(shape[0], num_blocks)
    if remainder:
        raise LayoutError(
            f"no dimension of {tuple(tensor.shape)} counts the engine's {num_blocks} "
            "blocks"
        )
    if ratio > 1:  # A block consists of several kernel blocks.
        shape = (num_blocks, ratio, *shape[1:])
        strides = (strides[0] * ratio, *strides)
    handle = tables.number(tensor)
    return [TensorView(handle, offset, shape, strides) for offset in offsets]


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.").removesuffix("fn")
    if name in DTYPE_BYTES:
        return name
    # Pages are opaque, so any one-byte type is equivalent.
    if tensor.element_size() == 1:
        return "uint8"
    raise LayoutError(f"the cache's type {name} is not known")
