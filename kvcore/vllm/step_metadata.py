"""What the scheduler half tells the worker halves, once a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NewType

import msgspec
import numpy as np
import numpy.typing as npt

from kvcore.keys import ExtraKey
from kvcore.protocol import NULL_BLOCK

OpId = NewType("OpId", int)
"""Names one load or store of one engine; every rank acknowledges it once."""

ENGINE_NULL_BLOCK = 0
"""vLLM's block for positions outside a window; nothing is ever kept in it."""

GroupBlocks = tuple[bytes, ...]
"""Packed int32 block ids, one a group of the engine, NULL_BLOCK for none."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request of a step: `num_new` tokens after the `num_computed` first ones."""

    request_id: str
    num_computed: int
    num_new: int
    blocks: tuple[list[int], ...] | None
    replaces: bool
    """Whether `blocks` stand in place of those known, not after them."""


class LoadOp(msgspec.Struct, frozen=True, array_like=True):
    """Retrieve [start, end) into these blocks, the first `skip` tokens left alone."""

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
    """More of a request's tokens: packed uint32 from `offset` on, all its extras."""

    request_id: str
    offset: int
    packed: bytes
    extras: tuple[ExtraKey, ...]


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step, for every rank the same."""

    tokens: tuple[TokenUpdate, ...] = ()
    loads: tuple[LoadOp, ...] = ()
    stores: tuple[StoreOp, ...] = ()
    ended: tuple[str, ...] = ()
    """Requests that no later step names."""


def pack_blocks(ids: Sequence[int], num_null: int = 0) -> bytes:
    """Pack a group's block ids; the engine's null block and the first ones are none."""
    array = np.array(ids, dtype="<i4")
    array[array == ENGINE_NULL_BLOCK] = NULL_BLOCK
    array[:num_null] = NULL_BLOCK
    return array.tobytes()


def unpack_blocks(packed: bytes) -> npt.NDArray[np.int32]:
    """Read what `pack_blocks` wrote."""
    return np.frombuffer(packed, dtype="<i4")


def real_blocks(groups: Iterable[bytes]) -> list[int]:
    """List the blocks of all groups that are there, each as often as it is named."""
    ids = [unpack_blocks(packed) for packed in groups]
    joined = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return [int(block) for block in joined[joined != NULL_BLOCK]]
