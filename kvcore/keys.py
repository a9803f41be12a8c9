"""Chunk keys: packed tokens, chained hashes, extra hash material.

A chunk's hash is SHA-256 over its parent's hash, its packed tokens and the extra
material that begins in it. The chain starts from a seed that names the space
(prefix or document), the model, the world size and the chunk size, so equal hashes
mean equal bytes up to rank, group and layout, which the stored part carries.
SHA-256 because a key must resist forging: in a shared cache, whoever can make two
prompts collide can feed one user's KV to another. With SHA extensions it is also the
fastest cryptographic hash measured (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Annotated, Any, NewType

import msgspec
import numpy as np

from kvcore.errors import BadRequest

ChunkHash = NewType("ChunkHash", bytes)
"""32 bytes."""

TOKEN_BYTES = 4
HASH_ALGORITHM = "sha256/chain-1"
"""Named in the handshake: two sides that hash differently must not share chunks."""


class SessionKey(msgspec.Struct, frozen=True, array_like=True):
    """One request of one engine. Not part of a chunk's identity."""

    engine_id: Annotated[str, msgspec.Meta(max_length=1024)]
    request_id: Annotated[str, msgspec.Meta(max_length=1024)]


class ScopedKey(SessionKey, frozen=True, array_like=True):
    """A session inside the server; `scope` identifies the engine key that owns it.

    The server derives the scope from the client, so that no client can address a
    session of another engine by its name.
    """

    scope: bytes = b""


def scope_of(key: SessionKey) -> bytes:
    """Return the scope of a session; empty outside a server."""
    return key.scope if isinstance(key, ScopedKey) else b""


class SaltedKey(SessionKey, frozen=True, array_like=True):
    """A session as the owner of stores and loads; `salt` selects the quota."""

    salt: str | None = None


class ExtraKey(msgspec.Struct, frozen=True, array_like=True):
    """Hash material beside the tokens (cache salt, LoRA, image) from `start` on.

    It is hashed into the chunk that holds token `start`, and through the chain into all
    later chunks.
    """

    start: Annotated[int, msgspec.Meta(ge=0, description="position of a token")]
    material: bytes


def cache_salt(extras: Iterable[ExtraKey]) -> str | None:
    """Return the salt among a prompt's extras: the JSON `["salt", NAME]` at token 0."""
    for extra in extras:
        if extra.start == 0 and extra.material.startswith(b'["salt",'):
            try:
                _, name = msgspec.json.decode(extra.material, type=tuple[str, str])
            except msgspec.MsgspecError:
                continue
            return name
    return None


Tokens = Sequence[int] | np.ndarray[Any, np.dtype[np.integer]]


def pack_tokens(tokens: Tokens) -> bytes:
    """Return token ids packed as little-endian uint32.

    Packing an array of integers is some 100 times faster than packing a list.

    Raises:
        BadRequest: an id is negative or over 2**32 - 1.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise BadRequest("tokens must be a flat sequence of integers") from None
    if array.size == 0:
        return b""
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise BadRequest("tokens must be a flat sequence of integers")
    if array.dtype != np.uint32 and (array.min() < 0 or array.max() > 0xFFFFFFFF):
        raise BadRequest("token ids must lie in 0..2**32-1")
    return array.astype("<u4", copy=False).tobytes()


def view_tokens(tokens: Tokens) -> memoryview:
    """Return packed tokens as `pack_tokens` does, without a copy of packed arrays.

    A contiguous `uint32[n]` is returned as a view of its bytes, which is valid until
    the caller changes the array (docs/performance.md has the gain).

    Raises:
        BadRequest: an id is negative or over 2**32 - 1.
    """
    packed = (
        isinstance(tokens, np.ndarray)
        and tokens.dtype == np.dtype("<u4")
        and tokens.ndim == 1
        and tokens.size > 0
        and tokens.flags.c_contiguous
    )
    if packed:
        return memoryview(tokens).cast("B")  # type: ignore[arg-type]
    return memoryview(pack_tokens(tokens))


def chain_seed(
    space: str,
    model: str,
    world_size: int,
    chunk_size: int,
    materials: Sequence[bytes] = (),
) -> ChunkHash:
    """Return the parent of first chunks; other `materials` give separate keys."""
    identity = (HASH_ALGORITHM, space, model, world_size, chunk_size, *materials)
    return ChunkHash(sha256(msgspec.msgpack.encode(identity)).digest())


def child_hash(parent: ChunkHash, packed: bytes | memoryview) -> ChunkHash:
    """Return the hash of a chunk that follows `parent`, without extra material."""
    state = sha256(parent)
    state.update(packed)
    return ChunkHash(state.digest())


class HashChain:
    """Chained chunk hashes of one token sequence, extended incrementally.

    It keeps the hashes and the tokens after the last whole chunk, not the hashed
    tokens. `extend` is a generator so that an event loop can serve other clients
    between slices: SHA-256 over 1 KiB holds the GIL.
    """

    __slots__ = ("chunk_bytes", "extras", "hashes", "seed", "tail")

    def __init__(
        self, seed: ChunkHash, chunk_size: int, extras: tuple[ExtraKey, ...] = ()
    ) -> None:
        self.seed = seed
        self.chunk_bytes = chunk_size * TOKEN_BYTES
        self.extras = extras
        self.hashes: list[ChunkHash] = []
        self.tail = b""

    @property
    def num_tokens(self) -> int:
        """Number of tokens: the hashed ones and the tail."""
        return (len(self.hashes) * self.chunk_bytes + len(self.tail)) // TOKEN_BYTES

    def rewind(self, num_chunks: int) -> None:
        """Discard everything after the first `num_chunks` chunks."""
        del self.hashes[num_chunks:]
        self.tail = b""

    def extend(self, packed: bytes | memoryview, slice_chunks: int) -> Iterable[None]:
        """Append packed tokens, yielding after every `slice_chunks` chunks."""
        if self.tail:
            packed = b"".join((self.tail, packed))
        size = self.chunk_bytes
        num_chunks = len(packed) // size
        # The new tail follows hashes that do not exist yet, so it is set last: a
        # caller that stops between slices leaves a shorter chain, not a wrong one.
        self.tail = b""
        parent = self.hashes[-1] if self.hashes else self.seed
        extras = self._extras_by_chunk() if self.extras else None
        hashes = self.hashes
        for first in range(0, num_chunks, slice_chunks):
            for i in range(first, min(first + slice_chunks, num_chunks)):
                state = sha256(parent)
                state.update(packed[i * size : (i + 1) * size])
                if extras:
                    for material in extras.get(len(hashes), ()):
                        state.update(len(material).to_bytes(4, "little"))
                        state.update(material)
                parent = ChunkHash(state.digest())
                hashes.append(parent)
            if first + slice_chunks < num_chunks:
                yield
        self.tail = bytes(packed[num_chunks * size :])

    def _extras_by_chunk(self) -> dict[int, list[bytes]]:
        chunk_size = self.chunk_bytes // TOKEN_BYTES
        by_chunk: dict[int, list[bytes]] = {}
        for extra in self.extras:
            placed = b"%d:" % (extra.start % chunk_size) + extra.material
            by_chunk.setdefault(extra.start // chunk_size, []).append(placed)
        return by_chunk
