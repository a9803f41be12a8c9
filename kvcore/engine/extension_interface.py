"""Interface of the engine to an optional part that stores and finds its own chunks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from kvcore.copy.block_arrays import BlockArray, TokenRange
from kvcore.engine.keyspace import Keyspace
from kvcore.engine.lookups import Lookups
from kvcore.engine.registrations import Instance
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.sessions import Session
from kvcore.engine.transfers import AfterScatter
from kvcore.keys import ChunkHash, SessionKey
from kvcore.protocol import (
    RegisterKVCache,
    RegisterReply,
    Store,
    StoreReply,
    UnregisterKVCache,
)
from kvcore.storage.chunk import Chunk, RemovalCallback
from kvcore.storage.required_parts import RequiredParts


class ExtensionInterface(Protocol):
    """All that such a part uses of the engine. Loop thread only."""

    @property
    def lookups(self) -> Lookups:
        """Runs the part's lookups beside the engine's own."""

    @property
    def has_tiers(self) -> bool:
        """Whether chunks that L1 lacks may be in a tier."""

    def on_chunk_removed(self, callback: RemovalCallback) -> None:
        """Call a function for each chunk that is removed from L1, on any thread."""

    def on_session_end(self, callback: Callable[[SessionKey], None]) -> None:
        """Call a function with the key of each session that ends."""

    def register_kv_cache(
        self, request: RegisterKVCache, context: RequestContext
    ) -> DeferredReply | RegisterReply:
        """Register a worker's memory, replacing its earlier registration."""

    def unregister_kv_cache(
        self, request: UnregisterKVCache, context: RequestContext
    ) -> DeferredReply:
        """Unregister an instance; the reply comes when its memory is unmapped."""

    def instance(self, instance_id: str, context: RequestContext) -> Instance:
        """Return a client's instance whose cache the server copies."""

    def open_session(
        self, key: SessionKey, space: Keyspace, context: RequestContext
    ) -> Session:
        """Return a session of a keyspace, a new one if the key is unknown."""

    def open_lookup(
        self, key: SessionKey, model: str, world_size: int, context: RequestContext
    ) -> tuple[Session, RequiredParts]:
        """Return a session, and the parts that a lookup of its engine requires."""

    def peek(self, hashes: Sequence[ChunkHash]) -> list[Chunk | None]:
        """Return the chunks of L1, not held: they may be evicted at any time."""

    def store(
        self, request: Store, context: RequestContext
    ) -> Generator[None, None, DeferredReply | StoreReply]:
        """Store whole chunks of a session's prompt."""

    def store_chunks(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[BlockArray],
        context: RequestContext,
        owner: SessionKey,
        *,
        event: bytes = b"",
    ) -> DeferredReply:
        """Copy whole chunks to L1 on the store lane; see `Transfers.store`.

        Raises:
            UnknownInstance: the instance was unregistered meanwhile.
        """

    def retrieve_chunks(
        self,
        instance: Instance,
        hashes: Sequence[ChunkHash],
        blocks: Sequence[BlockArray],
        tokens: TokenRange,
        context: RequestContext,
        after_scatter: AfterScatter | None = None,
        event: bytes = b"",
    ) -> DeferredReply:
        """Copy chunks to blocks on the retrieve lane; see `Transfers.retrieve`.

        Raises:
            UnknownInstance: the instance was unregistered meanwhile.
        """
