"""The blend requests: documents stored once and reused wherever a prompt has them.

Composed of the engine: a buffer is an instance whose blocks are single tokens, so its
registration, its lanes, its copies and its final stores are the engine's own. What is
here is another way to make the plan of a copy, and a hash space for documents.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import numpy.typing as npt

from kvcore.blend.blend_buffer import as_paged, check_slots, slots_of
from kvcore.blend.document_chunk import DocumentChunk
from kvcore.blend.document_index import DocumentIndex
from kvcore.blend.document_journal import DocumentJournal, open_document_journal
from kvcore.blend.document_lookups import DocumentLookups, FoundDocuments
from kvcore.blend.key_rotation import BlockRotation, check_rope, rotate_cached_keys
from kvcore.blend.matchers import (
    MATCH_STEP,
    CombinedMatcher,
    DocumentSpace,
    Matcher,
    RollingHashMatcher,
    SeparatorMatcher,
)
from kvcore.blend.paragraphs import make_markers
from kvcore.blend.rolling_hash import RollingHash, Tokens
from kvcore.config import BlendConfig, ServerConfig
from kvcore.copy.block_arrays import TokenRange
from kvcore.engine.engine import Engine
from kvcore.engine.instance import Instance
from kvcore.engine.leases import LeaseNumber
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.sessions import Session
from kvcore.engine.transfers import AfterScatter
from kvcore.errors import BadRequest, ChunksMissing, TokensNeeded, UnknownInstance
from kvcore.extensions import ServiceHandler
from kvcore.keys import ChunkHash, ExtraKey, HashChain, SessionKey
from kvcore.protocol import (
    CBLookupPreComputed,
    CBLookupReply,
    CBMatch,
    CBRegisterKVCache,
    CBRetrievePreComputed,
    CBStoreFinal,
    CBStorePreComputed,
    CBUnregisterKVCache,
    RegisterReply,
    Request,
    RetrieveReply,
    Store,
    StoreReply,
    UnregisterKVCache,
)
from kvcore.rope import Rope
from kvcore.status import TicketStatus
from kvcore.storage.chunk import Removal

HASH_BYTES = 32


@dataclass(slots=True)
class BlendCounters:
    """Each only grows; `document_chunks` is what the index holds now."""

    document_lookups: int = 0
    document_lookup_tokens: int = 0
    document_tokens_hit: int = 0
    document_stores: int = 0
    document_retrieves: int = 0


class BlendEngine:
    """Documents over an engine. The loop thread calls it, as it calls the engine."""

    def __init__(self, config: ServerConfig, engine: Engine) -> None:
        self.engine = engine
        self.chunk_size = config.chunk_size
        self._slice_chunks = config.wire.slice_chunks
        self._counters = BlendCounters()
        self._kept = kept = open_document_journal(config)
        self.index = DocumentIndex(
            int(config.l1.size) // int(config.l1.page),
            config.blend.max_tier_chunks if engine.tiering.has_tiers else 0,
            kept,
            self._is_in_l1,
        )
        rolling = RollingHash(self.chunk_size, kept.base if kept else None)
        self._matcher = self._make_matcher(config.blend, rolling)
        self._buffers: WeakKeyDictionary[Instance, Rope | None] = WeakKeyDictionary()
        self.lookups = DocumentLookups(engine, self._matcher, self.index)
        engine.l1.on_removed(self._removed)
        if kept is not None:
            self._restore(kept)

    def _make_matcher(self, config: BlendConfig, rolling: RollingHash) -> Matcher:
        markers = make_markers(config)
        separated = SeparatorMatcher(markers, self.chunk_size, self._slice_chunks)
        if config.matcher == "separated":
            return separated
        anywhere = RollingHashMatcher(self.index, rolling)
        if not self.engine.tiering.has_tiers or not (markers.start or markers.end):
            return anywhere
        return CombinedMatcher(anywhere, separated)

    def _restore(self, kept: DocumentJournal) -> None:
        """Enter what an earlier run knew; a tier may have all of it."""
        has_tiers = self.engine.tiering.has_tiers
        for entry in kept.read():
            self.index.add(entry)
            if has_tiers or self.engine.l1.peek([entry.hash]) == [None]:
                self.index.leave(entry.hash, in_tier=has_tiers)

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

    def tickets(self, limit: int) -> tuple[TicketStatus, ...]:
        """Return none: blend buffers are copied by the server."""
        del limit
        return ()

    def num_tickets(self) -> int:
        """Return 0."""
        return 0

    def counters(self) -> dict[str, int]:
        """Return counters by name; `document_chunks` is what the index holds now."""
        return {**asdict(self._counters), "document_chunks": len(self.index)}

    def close(self) -> None:
        """Leave what is kept to the next server."""
        if self._kept is not None:
            self._kept.close()

    def _is_in_l1(self, key: ChunkHash) -> bool:
        return self.engine.l1.peek([key]) != [None]

    def _removed(self, removal: Removal) -> None:
        chunk = removal.chunk
        self.index.leave(chunk.hash, in_tier=not chunk.ready & ~chunk.saved)

    def _documents(
        self, model: str, world_size: int, extras: Sequence[ExtraKey]
    ) -> DocumentSpace:
        return DocumentSpace(model, world_size, self.chunk_size, extras)

    # -- registration -------------------------------------------------------------

    def cb_register_kv_cache(
        self, request: CBRegisterKVCache, caller: RequestContext
    ) -> DeferredReply | RegisterReply:
        """Register a buffer as a cache whose blocks are single tokens."""
        paged = as_paged(request)
        if request.rope is not None:
            check_rope(
                request.rope, request.dtype, paged.groups[0].tensors[0].strides[2]
            )
        reply = self.engine.register_kv_cache(paged, caller)
        instance = self.engine.registry.get(caller.client, request.instance_id)
        self._buffers[instance] = request.rope
        return reply

    def cb_unregister_kv_cache(
        self, request: CBUnregisterKVCache, caller: RequestContext
    ) -> DeferredReply:
        """Forget a buffer; the reply comes when its memory is unmapped."""
        self._buffer(request.instance_id, caller)
        return self.engine.unregister_kv_cache(
            UnregisterKVCache(request.instance_id), caller
        )

    def _buffer(self, instance_id: str, caller: RequestContext) -> Instance:
        instance = self.engine.registry.get(caller.client, instance_id)
        if instance not in self._buffers:
            raise UnknownInstance(
                f"instance {instance_id!r} is a paged cache, not a blend buffer"
            )
        return instance

    # -- stores -------------------------------------------------------------------

    def cb_store_pre_computed(
        self, request: CBStorePreComputed, caller: RequestContext
    ) -> Generator[None, None, DeferredReply | StoreReply]:
        """Take a document's whole chunks into the document space."""
        instance = self._buffer(request.instance_id, caller)
        tokens = self._whole_chunks(read_tokens(request.tokens, request.extras))
        check_slots(instance, request.offset, len(tokens))
        if not len(tokens):
            return StoreReply(0, 0, 0)
        model, world_size = instance.space.model, instance.space.world_size
        space = self._documents(model, world_size, request.extras)
        chain = HashChain(space.seed, self.chunk_size)
        yield from chain.extend(tokens.data.cast("B"), self._slice_chunks)
        entries = yield from self._matcher.learn(tokens, chain.hashes, space)
        slots = slots_of([request.offset], len(tokens))
        try:
            # Before L1 has them: then nothing can leave it that is not known yet.
            yield from self._enter(entries)
            self.engine.registry.check_registered(instance)
            future = instance.store_lane.submit(
                self.engine.transfers.store,
                instance,
                chain.hashes,
                (slots.reshape(-1, self.chunk_size),),
                caller.deadline_ns,
                space.owner(SessionKey(instance.engine_id, "document")),
                event=request.event,
            )
        except BaseException:
            self._settle(entries)
            raise

        def finish() -> StoreReply:
            self._counters.document_stores += 1
            self._settle(entries)
            return self.engine.transfers.count_parts(
                self.engine.transfers.result(future)
            )

        return DeferredReply(future, finish)

    def _whole_chunks(self, tokens: Tokens) -> Tokens:
        return tokens[: len(tokens) - len(tokens) % self.chunk_size]

    def _enter(self, entries: Sequence[DocumentChunk]) -> Generator[None, None, None]:
        for number, entry in enumerate(entries, 1):
            self.index.add(entry)
            if number % MATCH_STEP == 0:
                yield

    def _settle(self, entries: Sequence[DocumentChunk]) -> None:
        """Keep the entries of what is in L1 after a store, and what tiers have."""
        chunks = self.engine.l1.peek([entry.hash for entry in entries])
        for entry, chunk in zip(entries, chunks, strict=True):
            if chunk is None:
                self.index.leave(entry.hash, in_tier=False)
            else:
                self.index.add(entry)

    def cb_store_final(
        self, request: CBStoreFinal, caller: RequestContext
    ) -> Generator[None, None, DeferredReply | StoreReply]:
        """Take a prompt's whole chunks into the normal space."""
        instance = self._buffer(request.instance_id, caller)
        num_tokens = max(request.end - request.start, 0)
        check_slots(instance, request.offset + request.start, num_tokens)
        slots = slots_of([request.offset + request.start], num_tokens)
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
        return self.engine.store(store, caller)

    # -- lookups ------------------------------------------------------------------

    def cb_lookup_pre_computed(
        self, request: CBLookupPreComputed, caller: RequestContext
    ) -> Generator[None, None, msgspec.Struct | DeferredReply]:
        """Find and lease the documents of a prompt that are there for all ranks."""
        space, _ = self.engine.registry.lookup(request.model, request.world_size)
        session = self.engine.sessions.open(request.session, space)
        tokens = read_tokens(request.tokens, request.extras)
        documents = self._documents(request.model, request.world_size, request.extras)

        def answer(found: FoundDocuments) -> CBLookupReply:
            hit = len(found.matches) * self.chunk_size
            self._counters.document_lookups += 1
            self._counters.document_lookup_tokens += len(tokens)
            self._counters.document_tokens_hit += hit
            return CBLookupReply(found.ranges, found.matches, hit)

        find = self.lookups.find(session, tokens, documents, caller, answer)
        return (yield from find)

    # -- retrieves ----------------------------------------------------------------

    def cb_retrieve_pre_computed(
        self, request: CBRetrievePreComputed, caller: RequestContext
    ) -> Generator[None, None, DeferredReply | RetrieveReply]:
        """Write matched chunks to their places in a buffer, all or none."""
        instance = self._buffer(request.instance_id, caller)
        if request.ranges and request.matches:
            raise BadRequest("give ranges or matches, not both")
        session = self.engine.sessions.open(request.session, instance.space)
        matches: Sequence[CBMatch] = request.matches
        if request.ranges:
            matches = yield from self._named(session, request, caller)
        if not matches:
            return RetrieveReply(0)
        self._check_matches(matches, instance, request.offset)
        rotation = self._rotation(instance, request, matches)
        lease = self.lookups.lease_of(session)
        self.engine.registry.check_registered(instance)
        num_tokens = len(matches) * self.chunk_size
        starts = [request.offset + match.start for match in matches]
        future = instance.retrieve_lane.submit(
            self.engine.transfers.retrieve,
            instance,
            [ChunkHash(match.hash) for match in matches],
            (slots_of(starts, self.chunk_size),),
            TokenRange(0, num_tokens, 0, self.chunk_size),
            caller.deadline_ns,
            rotation,
            request.event,
        )
        return DeferredReply(
            future, partial(self._retrieved, future, request, matches, instance, lease)
        )

    def _retrieved(
        self,
        future: Future[int],
        request: CBRetrievePreComputed,
        matches: Sequence[CBMatch],
        instance: Instance,
        lease: LeaseNumber | None,
    ) -> RetrieveReply:
        self._counters.document_retrieves += 1
        self.engine.counters.bytes_retrieved += self.engine.transfers.result(future)
        self.lookups.read(request.session, matches, instance.rank, lease)
        num_tokens = len(matches) * self.chunk_size
        return RetrieveReply(num_tokens, instance.memory.result().event)

    def _named(
        self, session: Session, request: CBRetrievePreComputed, caller: RequestContext
    ) -> Generator[None, None, list[CBMatch]]:
        """Return the chunks that a request's ranges consist of.

        Raises:
            TokensNeeded: the session's lookup is forgotten, and no prompt was sent.
            ChunksMissing: a range is not wholly of chunks that the lookup found.
        """
        found = self.lookups.found(request.session)
        if found is None:
            if not request.tokens:
                raise TokensNeeded("no lookup of this session is known", have=0)
            tokens = read_tokens(request.tokens, request.extras)
            space = session.space
            documents = self._documents(space.model, space.world_size, request.extras)
            found = yield from self.lookups.find_now(session, tokens, documents, caller)
        named = []
        for wanted in request.ranges:
            for start in range(wanted.start, wanted.end, self.chunk_size):
                number = found.numbers.get(start)
                if number is None or start + self.chunk_size > wanted.end:
                    raise ChunksMissing(
                        f"no chunk was found at token {start} of range "
                        f"{wanted.start} to {wanted.end}"
                    )
                named.append(found.matches[number])
        return named

    def _check_matches(
        self, matches: Sequence[CBMatch], instance: Instance, offset: int
    ) -> None:
        starts = np.sort(np.array([match.start for match in matches], np.int64))
        if (np.diff(starts) < self.chunk_size).any():
            raise BadRequest("two of the chunks would be written to the same slots")
        check_slots(instance, offset + int(starts[-1]), self.chunk_size)
        if any(len(match.hash) != HASH_BYTES for match in matches):
            raise BadRequest(f"a chunk's hash has {HASH_BYTES} bytes")
        # A part's bit means something else in another model, and the hash is the
        # caller's word. What a hash is of never changes: one look is enough.
        [group] = instance.groups
        for chunk in self.engine.l1.peek([ChunkHash(match.hash) for match in matches]):
            part = chunk.parts.get(group.part) if chunk else None
            if part is not None and part.name != group.name:
                raise BadRequest("a chunk of another model cannot be retrieved")

    def _rotation(
        self,
        instance: Instance,
        request: CBRetrievePreComputed,
        matches: Sequence[CBMatch],
    ) -> AfterScatter | None:
        """Return what rotates the keys of the matches, if the request wants it."""
        if not request.rotate_keys:
            return None
        rope = self._buffers[instance]
        if rope is None:
            raise BadRequest(
                f"instance {request.instance_id!r} was registered without rope: "
                "its keys cannot be turned"
            )
        rotations = []
        for match in matches:
            first = request.offset + match.start
            distance = match.start - match.old_start
            rotations.append(BlockRotation(first, first + self.chunk_size, distance))
        return partial(rotate_cached_keys, rope, rotations)


def read_tokens(packed: memoryview, extras: Sequence[ExtraKey] = ()) -> Tokens:
    """Read packed tokens in place, up to where material of their own begins.

    Material at token 0 belongs to the whole and makes another space; what a later one
    (an image) reaches is neither stored nor matched as a document.

    Raises:
        BadRequest: not whole tokens.
    """
    if len(packed) % 4:
        raise BadRequest(f"tokens: {len(packed)} bytes are not whole uint32")
    tokens: npt.NDArray[np.uint32] = np.frombuffer(packed, "<u4")
    return tokens[: min((e.start for e in extras if e.start), default=len(tokens))]
