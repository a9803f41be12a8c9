"""What an engine's machine is about: engines, prompts, and the right bytes of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import shake_256
from math import prod
from typing import Any

import numpy as np

from kvcore.engine.request_context import DeferredReply
from kvcore.engine.sessions import Session
from kvcore.errors import KVError
from kvcore.extents import PartLocation
from kvcore.keys import (
    ChunkHash,
    ExtraKey,
    HashChain,
    SessionKey,
    chain_seed,
    pack_tokens,
)
from kvcore.layout import CacheGroup, TensorView
from tests.engine.manual_threads import ManualLane

CHUNK = 4
PAGE = 16
NUM_BLOCKS = 12
MAX_CHUNKS = 4
MAX_TICKETS = 3
LEASE_S = 10.0
FAR_NS = 10**18
"""The played clock is ahead of the real one: no deadline on it passes by itself."""


@dataclass(frozen=True)
class Shape:
    """A cache group: planes of slots of `width` bytes, one more by layout version."""

    width: int
    num_planes: int = 1
    window: int | None = None
    replicated: bool = False
    is_opaque: bool = False

    def group(self, handle: int, block_size: int, version: int) -> CacheGroup:
        """Describe it as registered."""
        dims = (self.num_planes, NUM_BLOCKS, block_size, self.width + version)
        axes = "KNSD"
        if self.num_planes == 1:
            dims, axes = dims[1:], axes[1:]
        if self.is_opaque:
            dims, axes = (dims[0], dims[1] * dims[2]), "NP"
        strides = tuple(prod(dims[at + 1 :]) for at in range(len(dims)))
        return CacheGroup(
            axes,
            "uint8",
            block_size,
            (TensorView(handle, 0, dims, strides),),
            "pages" if self.is_opaque else "tokens",
            self.window,
            self.replicated,
        )


@dataclass(frozen=True)
class Deployment:
    """One engine: its model, and which of its ranks copy themselves."""

    name: str
    model: str
    world_size: int
    private: tuple[int, ...] = ()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of its model's groups."""
        return SHAPES[self.model]

    @property
    def scheduler(self) -> bytes:
        """Its scheduler's client."""
        return f"{self.name}-scheduler".encode()

    def worker(self, rank: int) -> bytes:
        """A rank's client."""
        return f"{self.name}-{rank}".encode()


SHAPES = {
    "pair": (Shape(2, num_planes=2),),
    "window": (Shape(4), Shape(2, window=CHUNK + 1)),
    "same": (Shape(6, replicated=True),),
    "pages": (Shape(4, is_opaque=True),),
}
ENGINES = (
    Deployment("a", "pair", 2),
    Deployment("b", "pair", 2, private=(1,)),
    Deployment("c", "pair", 1),
    Deployment("d", "window", 1),
    Deployment("e", "window", 1, private=(0,)),
    Deployment("f", "same", 2, private=(0,)),
    Deployment("g", "pages", 1),
)
"""Some share chunks; some only look as if they did."""

PROMPTS = ("aaaa", "aabb", "abbb", "aaaa")
"""A letter a chunk: prompts share what they begin with. The last one is salted."""
SALT = (ExtraKey(0, b"salt"),)


def extras_of(prompt: int) -> tuple[ExtraKey, ...]:
    """Hash material of a prompt."""
    return SALT if prompt == 3 else ()


def tokens_of(prompt: int, start: int, end: int) -> memoryview:
    """Its tokens, packed."""
    tokens = [ord(c) * 10 + i for c in PROMPTS[prompt] for i in range(CHUNK)]
    return memoryview(pack_tokens(tokens[start:end]))


@dataclass(frozen=True)
class Ident:
    """What a chunk's bytes depend on beside rank, group and layout."""

    model: str
    world_size: int
    salted: bool
    prefix: str


@cache
def hashes_of(model: str, world_size: int, prompt: int) -> tuple[ChunkHash, ...]:
    """The chunk hashes of a whole prompt."""
    seed = chain_seed("prefix", model, world_size, CHUNK)
    chain = HashChain(seed, CHUNK, extras_of(prompt))
    for _ in chain.extend(tokens_of(prompt, 0, MAX_CHUNKS * CHUNK), 100):
        pass
    return tuple(chain.hashes)


IDENTS = {
    key: Ident(model, world_size, prompt == 3, PROMPTS[prompt][: index + 1])
    for model, world_size in {(e.model, e.world_size) for e in ENGINES}
    for prompt in range(len(PROMPTS))
    for index, key in enumerate(hashes_of(model, world_size, prompt))
}


@dataclass(frozen=True)
class PartOf:
    """Which part of a chunk."""

    rank: int
    group: int
    version: int


@cache
def content(ident: Ident, part: PartOf) -> np.ndarray[Any, Any]:
    """The right bytes of a part, `[planes, tokens, bytes]`."""
    shape = SHAPES[ident.model][part.group]
    dims = (shape.num_planes, CHUNK, shape.width + part.version)
    digest = shake_256(repr((ident, part)).encode()).digest(prod(dims))
    return np.frombuffer(digest, np.uint8).reshape(dims)


@dataclass(eq=False)
class Worker:
    """A registered cache, and what must be in it."""

    id: str
    engine: Deployment
    rank: int
    version: int
    block_size: int
    arrays: list[np.ndarray[Any, Any]] = field(default_factory=list)
    shadows: list[np.ndarray[Any, Any]] = field(default_factory=list)
    free: list[list[int]] = field(default_factory=list)
    lanes: tuple[ManualLane, ...] = ()
    is_gone: bool = False
    """No longer registered."""
    is_dead: bool = False
    """Its process has ended."""

    @property
    def is_private(self) -> bool:
        """It copies itself."""
        return self.rank in self.engine.private

    @property
    def client(self) -> bytes:
        """Whose it is."""
        return self.engine.worker(self.rank)

    def parts(self) -> list[PartOf]:
        """What it stores of each chunk."""
        return [
            PartOf(0 if shape.replicated else self.rank, number, self.version)
            for number, shape in enumerate(self.engine.shapes)
        ]


@dataclass(eq=False)
class Lease:
    """What a lookup was granted: who has still to read each chunk."""

    chunks: list[tuple[ChunkHash, int]]
    waiting: list[set[int]]
    client: bytes
    engine: str
    deadline: float
    session: Session | None

    def take(self, start: int, end: int, ranks: set[int]) -> bool:
        """Take ranks off; say whether anybody still waits."""
        for waiting in self.waiting[start:end]:
            waiting -= ranks
        return any(self.waiting)


@dataclass(eq=False)
class ModelRequest:
    """A request that has no answer yet."""

    kind: str
    client: bytes
    key: SessionKey | None = None
    prompt: int = 0
    has_tokens: bool = False
    deadline: float = 0.0
    engine: Deployment | None = None
    num_chunks: int = 0
    needs: list[list[PartOf]] = field(default_factory=list)
    """A lookup's: each rank's parts; empty for a model that cannot be looked up."""
    worker: Worker | None = None
    start: int = 0
    first: int = 0
    end: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    running: DeferredReply | None = None
    lease: Lease | None = None
    """That its read counts for."""
    is_ended: bool = False
    """Its session has ended since."""
    is_replaced: bool = False
    """It waited for a tier when its session looked up again, or its client died."""
    error: type[KVError] | None = None
    """What it must be answered."""


@dataclass(eq=False)
class Ticket:
    """What a worker was handed."""

    asked: ModelRequest
    places: Sequence[Sequence[PartLocation]]
    is_written: bool
