"""A blend buffer as what the engine knows: a cache whose blocks are single tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvcore.engine.instance import Instance
from kvcore.errors import BadRequest, LayoutError
from kvcore.layout import DTYPE_BYTES, CacheGroup, TensorView
from kvcore.protocol import CBRegisterKVCache, RegisterKVCache
from kvcore.transport.paged import BlockIds


def as_paged(request: CBRegisterKVCache) -> RegisterKVCache:
    """Describe a contiguous `[K, L, T, D]` buffer as T blocks of one token.

    Raises:
        LayoutError: another number of dimensions, or an unknown dtype.
    """
    if len(request.shape) != 4 or min(request.shape) < 1 or request.shape[0] > 2:
        raise LayoutError(
            f"shape {request.shape}: a blend buffer is [2, L, T, D], or [1, L, T, D]"
        )
    if request.dtype not in DTYPE_BYTES:
        known = ", ".join(sorted(DTYPE_BYTES))
        raise LayoutError(f"dtype {request.dtype!r}: known are {known}")
    num_kv, num_layers, num_tokens, width = request.shape
    shape = (num_kv, num_layers, num_tokens, 1, width)
    item = DTYPE_BYTES[request.dtype]
    strides = tuple(item * math.prod(shape[at + 1 :]) for at in range(len(shape)))
    group = CacheGroup(
        axes="KLNSD",
        dtype=request.dtype,
        block_size=1,
        tensors=(TensorView(0, 0, shape, strides),),
        replicated=num_kv == 1,
    )
    return RegisterKVCache(
        instance_id=request.instance_id,
        engine_id=request.engine_id,
        model=request.model,
        world_size=request.world_size,
        rank=request.rank,
        handles=(request.handle,),
        groups=(group,),
    )


def check_slots(instance: Instance, first: int, num_tokens: int) -> None:
    """Refuse slots that a buffer does not have; `BadRequest` names them."""
    num_slots = instance.groups[0].layout.num_blocks
    if first + num_tokens > num_slots:
        raise BadRequest(
            f"slots {first} to {first + num_tokens}: the buffer has {num_slots}"
        )


def slots_of(starts: Sequence[int], num_tokens: int) -> BlockIds:
    """Return the slots of `num_tokens` tokens from each start on, a row each."""
    slots: BlockIds = np.arange(num_tokens, dtype=np.int32)
    return slots + np.array(starts, np.int32)[:, np.newaxis]
