"""Model of the blend state machine: chunks, their expected bytes, requests."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.engine.registrations import Instance
from kvcore.engine.request_context import DeferredReply
from kvcore.errors import KVError
from kvcore.keys import ChunkHash, ExtraKey, pack_tokens
from kvcore.rope import Rope

SIZE = 4
"""Tokens per chunk."""
SLOTS = 64
SHAPE = (2, 2, SLOTS, 4)
"""Shape of a buffer in bytes. A token has two float16 numbers: one pair."""
ROPE = Rope(theta=1e4, head_dim=2, rotary_dim=2)
PART_BYTES = 64
"""One page."""
MODEL = "m"
START, END = 8, 9
"""Tokens that mark the start and the end of a paragraph."""

Buffer = npt.NDArray[np.uint8]
FAR_NS = 10**18
"""The manual clock is ahead of the real one, so no deadline passes in real time."""


def kv(key: ChunkHash, rank: int) -> Buffer:
    """Return the unique KV of a chunk on a rank, `[2, 2, SIZE, 4]`."""
    data = blake2b(key + bytes([rank]), digest_size=PART_BYTES).digest()
    # Finite numbers that remain finite when rotated.
    return np.frombuffer(data, np.uint8).reshape(2, 2, SIZE, 4) & 0x3F


def turned(keys: Buffer, distance: int) -> Buffer:
    """Rotate keys, `[2, SIZE, 4]`, by `distance` positions at frequency 1."""
    pairs = keys.view(np.float16).astype(np.float64)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = math.cos(distance), math.sin(distance)
    numbers = np.stack((a * cos - b * sin, a * sin + b * cos), axis=-1)
    return numbers.astype(np.float16).view(np.uint8)


@dataclass(frozen=True)
class Text:
    """Tokens of a document or a prompt, from its start to the end of a chunk."""

    is_document: bool
    salt: str
    tokens: tuple[int, ...]


def extras_of(salt: str, image: int | None = None) -> tuple[ExtraKey, ...]:
    """Return the extras of a prompt with a salt, and of an image in it."""
    extras = [ExtraKey(0, b'["salt", "%s"]' % salt.encode())] if salt else []
    return (*extras, *([ExtraKey(image, b"image")] if image is not None else []))


def packed(tokens: Sequence[int]) -> memoryview:
    """Return tokens as packed on the wire."""
    return memoryview(pack_tokens(np.array(tokens, np.uint32)))


@dataclass(eq=False)
class Operation:
    """A pending request, and its result."""

    kind: str
    client: str
    steps: Generator[None, None, Any] | None
    tokens: tuple[int, ...] = ()
    """Tokens of the prompt that are searched."""
    salt: str = ""
    session: Any = None
    instance: Instance | None = None
    request: Any = None
    deadline: float = 0.0
    running: DeferredReply | None = None
    copied: Sequence[ChunkHash] = ()
    """Chunks that the copy reads or writes."""
    lease: Any = None
    """The model's lease when the retrieve began."""
    reply: Any = None
    error: KVError | None = None
    is_over: bool = False
    is_void: bool = False
    """Whether its session ended or looked up again, or its client ended."""
