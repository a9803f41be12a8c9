"""Blend requests: documents stored once and reused at any position of a prompt.

A blend buffer is an instance of the engine whose blocks are single tokens. The engine
registers it, copies its tokens, runs its lookups and stores its prompts; this module
maps the blend requests to these operations, in a hash space of documents.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from kvcore.blend.document_index import (
    DocumentChunk,
    DocumentIndex,
    DocumentJournal,
    open_document_journal,
)
from kvcore.blend.document_lookups import DocumentLookups, FoundDocuments
from kvcore.blend.key_rotation import BlockRotation, check_rope, rotate_cached_keys
from kvcore.blend.matchers import (
    MATCH_STEP,
    DocumentSpace,
    Matcher,
    RollingHashMatcher,
    SeparatorMatcher,
    read_tokens,
)
from kvcore.blend.paragraphs import make_markers
from kvcore.blend.rolling_hash import RollingHash
from kvcore.config import BlendConfig, ServerConfig
from kvcore.copy.block_arrays import BlockArray, TokenRange
from kvcore.engine.extension_interface import ExtensionInterface
from kvcore.engine.registrations import Instance
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.transfers import AfterScatter
from kvcore.errors import (
    BadRequest,
    HandleError,
    UnknownInstance,
    UnknownRequest,
)
from kvcore.extensions import RequestService, ServiceHandler
from kvcore.keys import ChunkHash, HashChain, SessionKey
from kvcore.layout import token_buffer
from kvcore.protocol import (
    CBLookupPreComputed,
    CBLookupReply,
    CBMatch,
    CBRegisterKVCache,
    CBRetrievePreComputed,
    CBStoreFinal,
    CBStorePreComputed,
    CBUnregisterKVCache,
    Private,
    RegisterKVCache,
    RegisterReply,
    Request,
    RetrieveReply,
    Store,
    StoreReply,
    UnregisterKVCache,
)
from kvcore.rope import Rope
from kvcore.storage.chunk import Removal
from kvcore.wire import wire_name

BLEND_REQUESTS: tuple[type[Request[Any]], ...] = (
    CBRegisterKVCache,
    CBUnregisterKVCache,
    CBStorePreComputed,
    CBStoreFinal,
    CBLookupPreComputed,
    CBRetrievePreComputed,
)


@dataclass(slots=True)
class BlendCounters:
    """Counters of blend requests; each only grows."""

    document_lookups: int = 0
    document_lookup_tokens: int = 0
    document_tokens_hit: int = 0
    document_stores: int = 0
    document_retrieves: int = 0


class BlendDisabled(RequestService):
    """Service without `--engine blend`: refuses every blend request."""

    def handlers(self) -> Mapping[type[Request[Any]], ServiceHandler]:
        """Return the handler of each blend request."""
        return dict.fromkeys(BLEND_REQUESTS, _refuse)


def _refuse(request: Request[Any], context: RequestContext) -> NoReturn:
    del context
    raise UnknownRequest(
        f"{wire_name(type(request))}: this server serves prefixes only; start it "
        "with --engine blend"
    )


class BlendEngine(RequestService):
    """Handlers of the blend requests. Loop thread only."""

    def __init__(self, config: ServerConfig, engine: ExtensionInterface) -> None:
        self._engine = engine
        self.chunk_size = config.chunk_size
        self._slice_chunks = config.wire.slice_chunks
        self._counters = BlendCounters()
        self._journal = journal = open_document_journal(config)
        self.index = DocumentIndex(
            int(config.l1.size) // int(config.l1.page),
            config.blend.max_tier_chunks if engine.has_tiers else 0,
            journal,
            self._is_in_l1,
        )
        rolling = RollingHash(self.chunk_size, journal.base if journal else None)
        self._matcher = self._make_matcher(config.blend, rolling)
        self._buffers: WeakKeyDictionary[Instance, Rope | None] = WeakKeyDictionary()
        self.lookups = DocumentLookups(
            engine, self._matcher, self.index, self.chunk_size
        )
        engine.on_chunk_removed(self._removed)
        if journal is not None:
            self._restore(journal)

    def _make_matcher(self, config: BlendConfig, rolling: RollingHash) -> Matcher:
        markers = make_markers(config)
        separator = SeparatorMatcher(markers, self.chunk_size, self._slice_chunks)
        if config.matcher == "separated":
            return separator
        asks_tiers = self._engine.has_tiers and (markers.start or markers.end)
        return RollingHashMatcher(
            self.index, rolling, separator if asks_tiers else None
        )

    def _restore(self, journal: DocumentJournal) -> None:
        """Add the entries of an earlier run; with tiers, all chunks may be in one."""
        in_tier = self._engine.has_tiers
        for entry in journal.read():
            self.index.add(entry)
            if in_tier or not self._is_in_l1(entry.hash):
                self.index.note_evicted(entry.hash, in_tier=in_tier)

    def handlers(self) -> Mapping[type[Request[Any]], ServiceHandler]:
        """Return the handler of each blend request."""
        return {
            CBRegisterKVCache: self.cb_register_kv_cache,
            CBUnregisterKVCache: self.cb_unregister_kv_cache,
            CBStorePreComputed: self.cb_store_pre_computed,
            CBStoreFinal: self.cb_store_final,
            CBLookupPreComputed: self.cb_lookup_pre_computed,
            CBRetrievePreComputed: self.cb_retrieve_pre_computed,
        }

    def counters(self) -> dict[str, int]:
        """Return counters by name; `document_chunks` is the index's present size."""
        return {**asdict(self._counters), "document_chunks": len(self.index)}

    def close(self) -> None:
        """Close the journal; the next server may open it."""
        if self._journal is not None:
            self._journal.close()

    def _is_in_l1(self, key: ChunkHash) -> bool:
        return self._engine.peek([key]) != [None]

    def _removed(self, removal: Removal) -> None:
        chunk = removal.chunk
        self.index.note_evicted(chunk.hash, in_tier=not chunk.ready & ~chunk.saved)

    # -- registration -------------------------------------------------------------

    def cb_register_kv_cache(
        self, request: CBRegisterKVCache, context: RequestContext
    ) -> DeferredReply | RegisterReply:
        """Register a buffer as a paged cache whose blocks are single tokens.

        Raises:
            HandleError: the server cannot open the buffer's memory.
            LayoutError: the shape or the rotation is invalid.
        """
        if isinstance(request.handle, Private):
            raise HandleError(
                "handle: the server must be able to open a blend buffer's memory"
            )
        group = token_buffer(request.shape, request.dtype)
        if request.rope is not None:
            check_rope(request.rope, request.dtype, group.tensors[0].strides[2])
        paged = RegisterKVCache(
            instance_id=request.instance_id,
            engine_id=request.engine_id,
            model=request.model,
            world_size=request.world_size,
            rank=request.rank,
            handles=(request.handle,),
            groups=(group,),
        )
        reply = self._engine.register_kv_cache(paged, context)
        instance = self._engine.instance(request.instance_id, context)
        self._buffers[instance] = request.rope
        return reply

    def cb_unregister_kv_cache(
        self, request: CBUnregisterKVCache, context: RequestContext
    ) -> DeferredReply:
        """Unregister a buffer; the reply comes when its memory is unmapped."""
        self._buffer(request.instance_id, context)
        return self._engine.unregister_kv_cache(
            UnregisterKVCache(request.instance_id), context
        )

    def _buffer(self, instance_id: str, context: RequestContext) -> Instance:
        instance = self._engine.instance(instance_id, context)
        if instance not in self._buffers:
            raise UnknownInstance(
                f"instance {instance_id!r} is a paged cache, not a blend buffer"
            )
        return instance

    # -- stores -------------------------------------------------------------------

    def cb_store_pre_computed(
        self, request: CBStorePreComputed, context: RequestContext
    ) -> Generator[None, None, DeferredReply | StoreReply]:
        """Store a document's whole chunks in the document space."""
        instance = self._buffer(request.instance_id, context)
        tokens = read_tokens(request.tokens, request.extras)
        tokens = tokens[: len(tokens) - len(tokens) % self.chunk_size]
        _check_slots(instance, request.offset, len(tokens))
        if not len(tokens):
            return StoreReply(0, 0, 0)
        model, world_size = instance.space.model, instance.space.world_size
        space = DocumentSpace(model, world_size, self.chunk_size, request.extras)
        chain = HashChain(space.seed, self.chunk_size)
        yield from chain.extend(tokens.data.cast("B"), self._slice_chunks)
        entries = yield from self._matcher.learn(tokens, chain.hashes, space)
        slots = slot_rows([request.offset], len(tokens))
        try:
            # Before L1 has the chunks: an eviction must find its entry.
            for number, entry in enumerate(entries, 1):
                self.index.add(entry)
                if number % MATCH_STEP == 0:
                    yield
            stored = self._engine.store_chunks(
                instance,
                chain.hashes,
                (slots.reshape(-1, self.chunk_size),),
                context,
                space.owner(SessionKey(instance.engine_id, "document")),
                event=request.event,
            )
        except BaseException:
            self._settle(entries)
            raise

        def finish() -> msgspec.Struct:
            self._counters.document_stores += 1
            self._settle(entries)
            return stored.make_reply()

        return DeferredReply(stored.future, finish)

    def _settle(self, entries: Sequence[DocumentChunk]) -> None:
        """Keep the entries whose chunks L1 or a tier has after a store."""
        chunks = self._engine.peek([entry.hash for entry in entries])
        for entry, chunk in zip(entries, chunks, strict=True):
            if chunk is None:
                self.index.note_evicted(entry.hash, in_tier=False)
            else:
                self.index.add(entry)

    def cb_store_final(
        self, request: CBStoreFinal, context: RequestContext
    ) -> Generator[None, None, DeferredReply | StoreReply]:
        """Store a prompt's whole chunks for normal lookups."""
        instance = self._buffer(request.instance_id, context)
        first = request.offset + request.start
        num_tokens = max(request.end - request.start, 0)
        _check_slots(instance, first, num_tokens)
        slots = slot_rows([first], num_tokens)
        store = Store(
            session=request.session,
            instance_id=request.instance_id,
            start=request.start,
            end=request.end,
            blocks=(memoryview(slots.astype("<i4").tobytes()),),
            tokens=request.tokens,
            token_offset=request.token_offset,
            extras=request.extras,
            event=request.event,
        )
        return self._engine.store(store, context)

    # -- lookups ------------------------------------------------------------------

    def cb_lookup_pre_computed(
        self, request: CBLookupPreComputed, context: RequestContext
    ) -> Generator[None, None, msgspec.Struct | DeferredReply]:
        """Find and lease the documents of a prompt that all ranks have."""
        num_tokens = len(read_tokens(request.tokens, request.extras))

        def make_reply(found: FoundDocuments) -> CBLookupReply:
            hit = len(found.matches) * self.chunk_size
            self._counters.document_lookups += 1
            self._counters.document_lookup_tokens += num_tokens
            self._counters.document_tokens_hit += hit
            return CBLookupReply(found.ranges, found.matches, hit)

        return (yield from self.lookups.find(request, context, make_reply))

    # -- retrieves ----------------------------------------------------------------

    def cb_retrieve_pre_computed(
        self, request: CBRetrievePreComputed, context: RequestContext
    ) -> Generator[None, None, DeferredReply | RetrieveReply]:
        """Copy chunks that the session's lookup found to a buffer, all or none."""
        instance = self._buffer(request.instance_id, context)
        if request.ranges and request.matches:
            raise BadRequest("give ranges or matches, not both")
        rope = self._rope(instance) if request.rotate_keys else None
        if request.matches:
            self._check_targets(instance, request.offset, request.matches)
        if not (request.ranges or request.matches):
            return RetrieveReply(0)
        self._engine.open_session(request.session, instance.space, context)
        found = yield from self.lookups.find_again(request, instance.space, context)
        numbers = found.select(request.ranges, request.matches, self.chunk_size)
        matches = [found.matches[number] for number in numbers]
        if not matches:  # Ranges without tokens.
            return RetrieveReply(0)
        self._check_targets(instance, request.offset, matches)
        rotation = self._rotation(rope, request.offset, matches) if rope else None
        num_tokens = len(matches) * self.chunk_size
        starts = [request.offset + match.start for match in matches]
        retrieved = self._engine.retrieve_chunks(
            instance,
            [ChunkHash(match.hash) for match in matches],
            (slot_rows(starts, self.chunk_size),),
            TokenRange(0, num_tokens, 0, self.chunk_size),
            context,
            rotation,
            request.event,
        )

        def finish() -> msgspec.Struct:
            self._counters.document_retrieves += 1
            reply = retrieved.make_reply()
            self.lookups.note_read(request.session, found, numbers, instance.rank)
            return reply

        return DeferredReply(retrieved.future, finish)

    def _check_targets(
        self, instance: Instance, offset: int, matches: Sequence[CBMatch]
    ) -> None:
        # Checked before the int64 array is made: positions may have 64 bits.
        last = max(match.start for match in matches)
        _check_slots(instance, offset + last, self.chunk_size)
        starts = np.sort(np.array([match.start for match in matches], np.int64))
        if (np.diff(starts) < self.chunk_size).any():
            raise BadRequest("two of the chunks would be written to the same slots")

    def _rope(self, instance: Instance) -> Rope:
        rope = self._buffers[instance]
        if rope is None:
            raise BadRequest(
                f"instance {instance.instance_id!r} was registered without rope: "
                "its keys cannot be rotated"
            )
        return rope

    def _rotation(
        self, rope: Rope, offset: int, matches: Sequence[CBMatch]
    ) -> AfterScatter:
        rotations = []
        for match in matches:
            first = offset + match.start
            distance = match.start - match.old_start
            rotations.append(BlockRotation(first, first + self.chunk_size, distance))
        return partial(rotate_cached_keys, rope, rotations)


def _check_slots(instance: Instance, first: int, num_tokens: int) -> None:
    num_slots = instance.groups[0].layout.num_blocks
    if first + num_tokens > num_slots:
        raise BadRequest(
            f"slots {first} to {first + num_tokens}: the buffer has {num_slots}"
        )


def slot_rows(starts: Sequence[int], num_tokens: int) -> BlockArray:
    """Return the `num_tokens` slots from each start on, `[starts, num_tokens]`."""
    slots: BlockArray = np.arange(num_tokens, dtype=np.int32)
    return slots + np.array(starts, np.int32)[:, np.newaxis]
