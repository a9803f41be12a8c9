"""Data of one engine step: scheduled requests, and the plan sent to the workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NewType

import msgspec
import numpy as np
import numpy.typing as npt

from kvcore.keys import ExtraKey
from kvcore.protocol import NULL_BLOCK

OpId = NewType("OpId", int)
"""Identifies a load or store of one engine; every rank acknowledges it once."""

ENGINE_NULL_BLOCK = 0
"""vLLM's placeholder block for positions outside a window; it holds no KV."""

GroupBlocks = tuple[bytes, ...]
"""Packed int32 block ids, one item per engine group; NULL_BLOCK for no block."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request of a step: `num_new` tokens after the first `num_computed`."""

    request_id: str
    num_computed: int
    num_new: int
    blocks: tuple[list[int], ...] | None
    replaces: bool
    """Whether `blocks` replace the known blocks instead of extending them."""


class LoadOp(msgspec.Struct, frozen=True, array_like=True):
    """Retrieve [start, end) into these blocks, except the first `skip` tokens."""

    op: OpId
    request_id: str
    start: int
    end: int
    skip: int
    blocks: GroupBlocks


class StoreOp(msgspec.Struct, frozen=True, array_like=True):
    """Store the chunks of [start, end) from these blocks."""

    op: OpId
    request_id: str
    start: int
    end: int
    blocks: GroupBlocks


class TokenUpdate(msgspec.Struct, frozen=True, array_like=True):
    """A request's packed uint32 tokens from `offset` on, and all its extra keys."""

    request_id: str
    offset: int
    packed: bytes
    extras: tuple[ExtraKey, ...]


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """The plan of one step, the same for every rank."""

    tokens: list[TokenUpdate] = []
    loads: list[LoadOp] = []
    stores: list[StoreOp] = []
    ended: list[str] = []
    """Requests that no later step names."""


def pack_blocks(ids: Sequence[int], num_null: int = 0) -> bytes:
    """Pack a group's block ids as int32.

    vLLM's null block and the first `num_null` blocks become NULL_BLOCK.
    """
    array = np.array(ids, dtype="<i4")
    array[array == ENGINE_NULL_BLOCK] = NULL_BLOCK
    array[:num_null] = NULL_BLOCK
    return array.tobytes()


def unpack_blocks(packed: bytes) -> npt.NDArray[np.int32]:
    """Unpack block ids of `pack_blocks`; int32, shape [blocks]."""
    return np.frombuffer(packed, dtype="<i4")


def real_blocks(groups: Iterable[bytes]) -> list[int]:
    """Return the block ids of all groups without NULL_BLOCK; duplicates are kept."""
    ids = chain.from_iterable(unpack_blocks(packed).tolist() for packed in groups)
    return [block for block in ids if block != NULL_BLOCK]
