"""A blend buffer as what the engine knows: a cache whose blocks are single tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcore.copy.paged_cache import BlockIds
from kvcore.engine.instance import Instance
from kvcore.errors import BadRequest, HandleError
from kvcore.layout import token_buffer
from kvcore.protocol import CBRegisterKVCache, Private, RegisterKVCache


def as_paged(request: CBRegisterKVCache) -> RegisterKVCache:
    """Put a buffer as a paged cache.

    Raises:
        HandleError: the server could not reach its memory, as these requests must.
        LayoutError: as of `token_buffer`.
    """
    if isinstance(request.handle, Private):
        raise HandleError(
            "handle: a blend buffer's memory must be the server's to open"
        )
    return RegisterKVCache(
        instance_id=request.instance_id,
        engine_id=request.engine_id,
        model=request.model,
        world_size=request.world_size,
        rank=request.rank,
        handles=(request.handle,),
        groups=(token_buffer(request.shape, request.dtype),),
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
