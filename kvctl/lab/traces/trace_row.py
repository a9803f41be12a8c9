"""One request of a trace: its prompt as ids of chained token blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_ID = 2**64 - 1
MIN_BLOCK_SIZE = 2
"""An id is spelled out in a block's first two tokens."""

TAIL_STREAM = np.uint64(0x9E3779B97F4A7C15)
TOKEN_STEP = np.uint64(0xD1342543DE82EF95)
"""Odd, so that consecutive tokens of a block differ (a Weyl sequence)."""

Ids = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request. Ids are the trace's own, all 64 bits of them."""

    line: int
    arrival_s: float
    num_tokens: int
    output_length: int
    hash_ids: Ids
    block_size: int
    session_id: str | None

    def tokens(self) -> Tokens:
        """Make the prompt's token ids, `[num_tokens]`.

        Blocks are equal exactly when their ids are; tokens after the last id (some
        traces name whole blocks only) are this row's alone.
        """
        made = block_tokens(self.hash_ids, self.block_size).reshape(-1)
        missing = self.num_tokens - made.size
        if missing <= 0:
            return made[: self.num_tokens]
        own = np.array([self.line], np.uint64) * TAIL_STREAM
        return np.concatenate((made, block_tokens(own, max(missing, 2))[0, :missing]))


def block_tokens(ids: Ids, block_size: int) -> Tokens:
    """Spell ids as tokens, `[ids, block_size]`, different ids differently."""
    steps = np.arange(block_size, dtype=np.uint64) * TOKEN_STEP
    mixed = (ids[:, None] * TAIL_STREAM + steps) >> np.uint64(32)
    tokens = mixed.astype(np.uint32)
    tokens[:, 0] = ids & np.uint64(0xFFFFFFFF)
    tokens[:, 1] = ids >> np.uint64(32)
    return tokens


def make_row(
    line: int,
    arrival_s: float,
    num_tokens: int,
    output_length: int,
    hash_ids: list[int],
    block_size: int,
    session_id: str | None,
) -> TraceRow:
    """Build a row; `ValueError` says what cannot be right."""
    named = len(hash_ids)
    if not num_tokens // block_size <= named <= -(-num_tokens // block_size):
        raise ValueError(
            f"input_length {num_tokens} is {num_tokens / block_size:.1f} blocks of "
            f"{block_size}, hash_ids has {named}"
        )
    if hash_ids and not 0 <= min(hash_ids) <= max(hash_ids) <= MAX_ID:
        raise ValueError("hash_ids must lie in 0..2**64-1")
    ids = np.array(hash_ids, np.uint64)
    return TraceRow(
        line, arrival_s, num_tokens, output_length, ids, block_size, session_id
    )
