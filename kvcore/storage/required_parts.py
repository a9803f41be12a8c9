"""Parts that a reader requires of chunks, and the number of chunks that hit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcore.storage.chunk import PartId, PartName


@dataclass(frozen=True, slots=True)
class RequiredPart:
    """One part of each chunk; with a window, only of the last chunks."""

    part: PartId
    name: PartName
    num_bytes: int
    window: int | None


@dataclass(frozen=True, slots=True)
class RequiredWindow:
    """Parts of one window's groups, required only in the chunks that it covers."""

    mask: int
    window: int


@dataclass(frozen=True, slots=True)
class RequiredParts:
    """Parts that a lookup requires, as masks and in detail.

    `parts` lists every rank's part of every group, for prefetches.
    """

    full: int
    windows: tuple[RequiredWindow, ...]
    parts: tuple[RequiredPart, ...] = ()
    chunk_bytes: int = field(init=False)
    """Bytes of all parts of a chunk."""

    def __post_init__(self) -> None:
        num_bytes = sum(need.num_bytes for need in self.parts)
        object.__setattr__(self, "chunk_bytes", num_bytes)


def count_hits(masks: Sequence[int], needs: RequiredParts, chunk_size: int) -> int:
    """Return how many leading chunks are a hit, given the mask of parts of each.

    n chunks are a hit when all n have their full-attention parts and every window
    group has the parts that cover the last window before token n, of all ranks. Older
    window parts are never read.
    """
    runs = [0] * len(needs.windows)
    best = 0
    for n, mask in enumerate(masks, 1):
        if mask & needs.full != needs.full:
            break
        fits = True
        for index, need in enumerate(needs.windows):
            runs[index] = runs[index] + 1 if mask & need.mask == need.mask else 0
            fits = fits and runs[index] >= min(
                n, num_window_chunks(need.window, chunk_size)
            )
        if fits:
            best = n
    return best


def num_window_chunks(window: int, chunk_size: int) -> int:
    """Return how many of the last chunks a window covers."""
    return -(-window // chunk_size)
