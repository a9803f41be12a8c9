"""Settings and results of the copy benchmark, `[copies]` in a scenario.

It varies the contiguous bytes per copy, the block order and the number of concurrent
workers. `kvctl.lab.rank.copy_benchmark` executes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvcore.option_structs import ByteSize, Options, require
from kvctl.lab.config.model_geometry import Geometry

TOKEN_BYTES = 2048
"""Bytes of K or V per token and layer: 8 heads of 128, bfloat16."""
HEADS = 8
ITEM_BYTES = 2
Order = Literal["scattered", "contiguous"]


class Copies(Options, frozen=True):
    """Store and retrieve calls of one size, made after the load.

    Every piece size in every order with the first number of workers, then the middle
    piece size in the first order with the other numbers.
    """

    pieces: Annotated[
        tuple[ByteSize, ...],
        Meta(description="contiguous bytes: K or V of a block in one layer"),
    ] = (ByteSize(32 << 10),)
    orders: Annotated[
        tuple[Order, ...], Meta(description="order of a call's blocks in the cache")
    ] = ("scattered", "contiguous")
    workers: Annotated[
        tuple[int, ...], Meta(description="ranks that call concurrently")
    ] = (1,)
    chunk: Annotated[ByteSize, Meta(description="approximate bytes of a chunk")] = (
        ByteSize(32 << 20)
    )
    chunks: Annotated[int, Meta(ge=1, description="chunks per call")] = 1
    rounds: Annotated[int, Meta(ge=1, description="calls of each kind")] = 8
    busy: Annotated[
        bool, Meta(description="multiply matrices in the worker's process meanwhile")
    ] = False

    def check(self) -> None:
        """Raise `SetupError` for empty lists and for sizes that no chunk can have."""
        for name in ("pieces", "orders", "workers"):
            require(bool(getattr(self, name)), name, (), "at least one")
        require(min(self.workers) >= 1, "workers", min(self.workers), "at least 1")
        for piece in self.pieces:
            need = "a multiple of 16, at least 16 B"
            require(piece >= 16 and piece % 16 == 0, "pieces", str(piece), need)

    def settings(self) -> Iterator[Setting]:
        """Yield the settings in the order of measurement."""
        first, *others = self.workers
        for piece in self.pieces:
            for order in self.orders:
                yield Setting(int(piece), order, first)
        middle = int(self.pieces[len(self.pieces) // 2])
        for number in others:
            yield Setting(middle, self.orders[0], number)


class Setting(msgspec.Struct, frozen=True):
    """One combination of piece size, order and number of workers."""

    piece_bytes: int
    order: Order
    workers: int

    def geometry(self, chunk_bytes: int, chunk_size: int) -> Geometry:
        """Return a model with these piece bytes and about `chunk_bytes` per chunk.

        The block size is the largest power of two that leaves at least `TOKEN_BYTES`
        per token and divides `chunk_size`.
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
    """Medians of one setting over all workers, and their spread."""

    setting: Setting
    call_bytes: int
    chunk_bytes: int
    store_gb_per_s: Annotated[float, Meta(description="of one worker")]
    retrieve_gb_per_s: float
    store: Annotated[float, Meta(description="share of the plain copy's rate")]
    retrieve: float
    both_gb_per_s: Annotated[
        float, Meta(description="concurrent store and retrieve, bytes of both")
    ]
    both: float
    spread: Annotated[
        float, Meta(description="slowest worker's median call / fastest's - 1")
    ]
    server_s_per_chunk: Annotated[
        float | None, Meta(description="the server's CPU time per chunk")
    ] = None
    ways: Annotated[
        dict[str, int], Meta(description="copies on GPUs, by method and direction")
    ] = {}
    product_slowdown: Annotated[
        float | None,
        Meta(description="relative slowdown of matrix products by the calls"),
    ] = None
