"""Copies for their own sake: every size of piece, both orders, several workers at once.

What is declared of them and what comes out; `kvctl.lab.rank.copy_benchmark` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvcore.options import ByteSize, Options, require
from kvctl.lab.model_geometry import Geometry

TOKEN_BYTES = 2048
"""Of K or V of a layer where blocks can be made so small: 8 heads of 128, bfloat16."""
HEADS = 8
ITEM_BYTES = 2
Order = Literal["scattered", "contiguous"]


class Copies(Options, frozen=True):
    """Calls of one size with pieces of many, after the load.

    Every piece size in every order by the first number of workers, then the middle
    piece size, in the first order, by the others.
    """

    pieces: Annotated[
        tuple[ByteSize, ...], Meta(description="bytes of a block's K or V in a layer")
    ] = (ByteSize(32 << 10),)
    orders: Annotated[
        tuple[Order, ...], Meta(description="of a call's blocks in the cache")
    ] = ("scattered", "contiguous")
    workers: Annotated[
        tuple[int, ...], Meta(description="ranks that call at the same time")
    ] = (1,)
    chunk: Annotated[ByteSize, Meta(description="about, bytes of a chunk")] = ByteSize(
        32 << 20
    )
    chunks: Annotated[int, Meta(ge=1, description="of a call")] = 1
    rounds: Annotated[int, Meta(ge=1, description="calls of each kind")] = 8
    busy: Annotated[
        bool, Meta(description="while a matrix product runs in the worker's process")
    ] = False

    def check(self) -> None:
        """There is something to copy, in pieces that a chunk can consist of."""
        for name in ("pieces", "orders", "workers"):
            require(bool(getattr(self, name)), name, (), "at least one")
        require(min(self.workers) >= 1, "workers", min(self.workers), "at least 1")
        for piece in self.pieces:
            need = "a multiple of 16, at least 16 B"
            require(piece >= 16 and piece % 16 == 0, "pieces", str(piece), need)

    def settings(self) -> Iterator[Setting]:
        """Yield what is measured, in order."""
        first, *others = self.workers
        for piece in self.pieces:
            for order in self.orders:
                yield Setting(int(piece), order, first)
        middle = int(self.pieces[len(self.pieces) // 2])
        for number in others:
            yield Setting(middle, self.orders[0], number)


class Setting(msgspec.Struct, frozen=True):
    """One row of what is measured."""

    piece_bytes: int
    order: Order
    workers: int

    def geometry(self, chunk_bytes: int, chunk_size: int) -> Geometry:
        """Return a model whose blocks have such pieces, and chunks about so many bytes.

        A block is the largest power of two of tokens that leaves a token its usual
        bytes and divides a chunk.
        """
        block_size = 1
        while (
            block_size * 2 * TOKEN_BYTES <= self.piece_bytes
            and chunk_size % (block_size * 2) == 0
            and self.piece_bytes % (block_size * 2 * HEADS * ITEM_BYTES) == 0
        ):
            block_size *= 2
        token_bytes = self.piece_bytes // block_size
        heads = HEADS if token_bytes % (HEADS * ITEM_BYTES) == 0 else 1
        return Geometry(
            f"copies-{self.piece_bytes}",
            num_layers=max(1, round(chunk_bytes / (2 * chunk_size * token_bytes))),
            num_kv_heads=heads,
            head_dim=token_bytes // (heads * ITEM_BYTES),
            block_size=block_size,
        )


class CopyRow(msgspec.Struct, frozen=True):
    """Calls of one setting: medians over all workers, and how alike these were."""

    setting: Setting
    call_bytes: int
    chunk_bytes: int
    store_gb_per_s: Annotated[float, Meta(description="of one worker")]
    retrieve_gb_per_s: float
    store: Annotated[float, Meta(description="share of the plain copy beside it")]
    retrieve: float
    both_gb_per_s: Annotated[
        float, Meta(description="a store and a retrieve at once, bytes of both")
    ]
    both: float
    spread: Annotated[
        float, Meta(description="slowest worker's median call over the fastest's, - 1")
    ]
    server_s_per_chunk: Annotated[
        float | None, Meta(description="the server's CPU time for a chunk of a call")
    ] = None
    ways: Annotated[
        dict[str, int],
        Meta(description="calls that were copied on GPUs, by way and direction"),
    ] = {}
    product_slowdown: Annotated[
        float | None,
        Meta(description="of a matrix product beside the calls; 0: none"),
    ] = None
