"""Single chunk spans, which tests build and change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcore.copy.block_arrays import BlockArray, ChunkSpans
from kvcore.extents import Allocation


@dataclass(frozen=True, slots=True, eq=False)
class ChunkSpan:
    """One chunk of `ChunkSpans`; `blocks` `[blocks per chunk]`."""

    extents: Allocation
    blocks: BlockArray
    first_token: int
    end_token: int


def stack_spans(spans: Sequence[ChunkSpan]) -> ChunkSpans:
    """Return the spans in the form that caches take; at least one."""
    return ChunkSpans(
        [span.extents for span in spans],
        np.array([span.blocks for span in spans], np.int32),
        np.array([(span.first_token, span.end_token) for span in spans], np.int64),
    )
