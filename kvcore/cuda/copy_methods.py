"""Which way a copy takes, by how fast each was found to be on this very device.

- staged: kernels pack and unpack, the link carries large copies. The link's own speed
  whatever the pieces, but it costs kernels' starts, a second passage through device
  memory, and a few SMs for a while;
- batched: one call hands all pieces to the copy engines. Nothing passes twice, but
  each piece costs some, so small ones are slow;
- single: a call a piece, for few pieces that are large.

Pieces are counted after neighbours were merged: contiguity shows as fewer and larger
pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import exp, log

import numpy as np

from kvcore.status import CopyRates, PieceRate

KERNEL_PRICE = 1.1
"""Staging must win by that: kernels take SMs from the model, copy engines do not."""


class CopyMethod(StrEnum):
    """How bytes get from one side to the other."""

    SINGLE = "single"
    BATCHED = "batched"
    STAGED = "staged"


def choose_method(
    rates: CopyRates,
    num_bytes: int,
    num_pieces: int,
    *,
    row_bytes: int,
    word: int,
    can_stage: bool = True,
) -> CopyMethod:
    """Return the way that ends first.

    `num_pieces` are merged ones; `row_bytes` is what a kernel finds in one place, in
    words of `word` bytes (rates are for 16).
    """
    link = num_bytes / rates.link_bytes_s
    batched = num_bytes / speed(rates.batched, num_bytes / max(num_pieces, 1))
    times = {
        CopyMethod.SINGLE: rates.start_s + max(num_pieces * rates.call_s, link),
        CopyMethod.BATCHED: rates.start_s + max(batched, link),
    }
    if can_stage:
        kernels = num_bytes / speed(rates.kernels, row_bytes) * 16 / word
        staged = rates.staged_start_s + max(kernels, link)
        times[CopyMethod.STAGED] = KERNEL_PRICE * staged
    return min(times, key=times.__getitem__)


def speed(rates: Sequence[PieceRate], piece_bytes: float) -> float:
    """Return bytes a second for a piece's size.

    Between two sizes that were measured it goes with a power of the size; beyond them
    it stays.
    """
    sizes = [log(rate.piece_bytes) for rate in rates]
    speeds = [log(rate.bytes_s) for rate in rates]
    return exp(float(np.interp(log(max(piece_bytes, 1)), sizes, speeds)))
