"""What a reader needs of chunks, and how many leading chunks give it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.storage.chunk import PartId, PartName


@dataclass(frozen=True, slots=True)
class RequiredPart:
    """One part of each chunk: what it is and how large; with a window, of the last."""

    part: PartId
    name: PartName
    num_bytes: int
    window: int | None


@dataclass(frozen=True, slots=True)
class RequiredWindow:
    """Parts of one window's groups: needed in the chunks that it covers only."""

    mask: int
    window: int


@dataclass(frozen=True, slots=True)
class RequiredParts:
    """Parts that a lookup asks for, as masks over a chunk's parts and one by one.

    `parts` is the layout to prefetch into: every rank's, every group's.
    """

    full: int
    windows: tuple[RequiredWindow, ...]
    parts: tuple[RequiredPart, ...] = ()

    @property
    def chunk_bytes(self) -> int:
        """Bytes of all parts of a chunk."""
        return sum(need.num_bytes for need in self.parts)


def count_hits(masks: Sequence[int], needs: RequiredParts, chunk_size: int) -> int:
    """Return how many leading chunks are a hit, given each one's mask of parts.

    n chunks are a hit when all n have their full-attention parts and every window
    group has the parts that cover the last window before token n, on all ranks;
    older window parts are never read.
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
    """Return how many last chunks a window needs."""
    return -(-window // chunk_size)
