"""Conversion of vLLM's cache groups and tensors to the server's cache groups.

A block's inner layout is private to vLLM: its CPU backend stores K transposed, and
quantised caches contain scales. Blocks are therefore registered as opaque pages and
only whole blocks are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcore.errors import LayoutError, SetupError
from kvcore.layout import DTYPE_BYTES, CacheGroup, TensorView
from kvcore.protocol import MemoryHandle
from kvcore.vllm.memory_handles import Tensor

_Form = tuple[tuple[int, ...], tuple[int, ...], str]
"""Shape, strides, dtype: what the tensors of one group have in common."""

_SPECS_FULL = ("FullAttentionSpec", "MLAAttentionSpec", "SinkFullAttentionSpec")
_SPECS_WINDOW = {
    "SlidingWindowSpec": "sliding_window",
    "SlidingWindowMLASpec": "sliding_window",
    "ChunkedLocalAttentionSpec": "attention_chunk_size",
}
"""Specs of groups that keep only the last tokens, and the field with their number."""


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """One cache group of the engine: layers that share block ids."""

    layers: tuple[str, ...]
    block_size: int
    window: int | None
    is_mla: bool
    is_chunked: bool = False
    """Whether windows start at multiples of `window` instead of sliding."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Block size and window of one engine group, for the scheduler side."""

    block_size: int
    window: int | None = None
    is_chunked: bool = False
    """Whether windows start at multiples of `window` instead of sliding."""

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
    if name not in _SPECS_FULL and name not in _SPECS_WINDOW:
        raise LayoutError(f"layers of kind {name} cannot be cached by token")
    if not getattr(group, "enable_kv_transfer", True):
        raise LayoutError(f"vLLM does not let layers of kind {name} be transferred")
    if not all(getattr(one, "prefix_cacheable", True) for one in specs):
        raise LayoutError(f"vLLM keeps layers of kind {name} out of prefix caching")
    if any(getattr(one, "non_causal", False) for one in specs):
        raise LayoutError("layers that look ahead: a token's KV depends on later ones")
    window = getattr(spec, _SPECS_WINDOW[name]) if name in _SPECS_WINDOW else None
    return EngineGroup(
        tuple(group.layer_names),
        block_size,
        window,
        is_mla="MLA" in name,
        is_chunked="Chunked" in name,
    )


def describe_caches(
    groups: Sequence[EngineGroup],
    caches: Mapping[str, Tensor],
    num_blocks: int,
    *,
    share: Callable[[Tensor], MemoryHandle],
    replicate_mla: bool,
) -> CacheDescription:
    """Share the caches' memory and describe their groups.

    `share` is called once per storage (`SharedCacheMemory.share`). `replicate_mla`:
    whether every rank holds the same bytes of MLA layers.

    Raises:
        LayoutError, HandleError: they cannot be described or shared.
    """
    described = []
    tables = _HandleTable(share)
    for source, group in enumerate(groups):
        by_form: dict[_Form, list[TensorView]] = {}
        for tensor in _distinct(
            caches[name] for name in group.layers if name in caches
        ):
            for view in _views(tensor, num_blocks, tables):
                form = (view.shape, view.strides, _dtype(tensor))
                by_form.setdefault(form, []).append(view)
        for form, views in by_form.items():
            cache_group = CacheGroup(
                axes="N" + "P" * (len(views[0].shape) - 1),
                dtype=form[2],
                block_size=group.block_size,
                tensors=tuple(views),
                kind="pages",
                window=group.window,
                replicated=replicate_mla and group.is_mla,
            )
            described.append((cache_group, source))
    if not described:
        raise LayoutError("the engine has no layers with a cache")
    return CacheDescription(
        tuple(tables.handles),
        tuple(group for group, _ in described),
        tuple(source for _, source in described),
    )


class _HandleTable:
    """Memory handles, one per storage, created on first use."""

    def __init__(self, share: Callable[[Tensor], MemoryHandle]) -> None:
        self._share = share
        self.handles: list[MemoryHandle] = []
        self._numbers: dict[int, int] = {}

    def number(self, tensor: Tensor) -> int:
        """Return the index of the handle of a tensor's storage."""
        # Sharing moves the storage's memory, so its address is read afterwards.
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self._numbers:
            handle = self._share(tensor)
            self._numbers[tensor.untyped_storage().data_ptr()] = len(self.handles)
            self.handles.append(handle)
        return self._numbers[tensor.untyped_storage().data_ptr()]


def _distinct(tensors: Any) -> list[Tensor]:
    """Return distinct tensors (layers may share a cache), after checking their type."""
    seen: dict[int, Tensor] = {}
    for tensor in tensors:
        if not hasattr(tensor, "untyped_storage"):
            raise LayoutError(f"a layer's cache is a {type(tensor).__name__}")
        seen.setdefault(tensor.data_ptr(), tensor)
    return list(seen.values())


def _views(tensor: Tensor, num_blocks: int, tables: _HandleTable) -> list[TensorView]:
    """Return views of a layer's tensor with blocks outermost: one, or K's and V's."""
    size = tensor.element_size()
    shape = tuple(tensor.shape)
    strides = tuple(stride * size for stride in tensor.stride())
    offset = tensor.storage_offset() * size
    handle = tables.number(tensor)
    if shape[0] % num_blocks == 0:
        return [_view(handle, offset, shape, strides, num_blocks)]
    if shape[0] == 2 and shape[1] % num_blocks == 0:
        return [
            _view(
                handle, offset + half * strides[0], shape[1:], strides[1:], num_blocks
            )
            for half in range(2)
        ]
    raise LayoutError(
        f"no dimension of {shape} counts the engine's {num_blocks} blocks"
    )


def _view(
    handle: int,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    num_blocks: int,
) -> TensorView:
    """Return one view; a block may consist of several kernel blocks."""
    ratio = shape[0] // num_blocks
    if ratio > 1:
        shape = (num_blocks, ratio, *shape[1:])
        strides = (strides[0] * ratio, *strides)
    return TensorView(handle, offset, shape, strides)


def _dtype(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.").removesuffix("fn")
    if name in DTYPE_BYTES:
        return name
    # Pages are opaque, so any one-byte type is equivalent.
    if tensor.element_size() == 1:
        return "uint8"
    raise LayoutError(f"the cache's type {name} is not known")
