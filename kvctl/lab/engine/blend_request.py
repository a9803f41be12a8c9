"""One request's life in an engine that blends: its documents are looked up, too."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from kvcore.blend.blend_client import BlendClient
from kvcore.client import KVClient
from kvcore.errors import Closed, KVError, SetupError, Unavailable
from kvcore.keys import ChunkHash, HashChain, chain_seed
from kvcore.protocol import CBLookupReply
from kvctl.lab.engine.engine_statistics import HEAD_BYTES
from kvctl.lab.engine.request_lifecycle import (
    HASH_SLICE,
    RequestLifecycle,
    RequestProgress,
)
from kvctl.lab.engine.request_log import Outcome
from kvctl.lab.process_messages import RunDocuments, StoredDocument, Tally

if TYPE_CHECKING:
    from kvctl.lab.engine.simulated_scheduler import SimulatedScheduler


class BlendRequest(RequestLifecycle):
    """Plays requests of documents in a slot of the ranks' buffers.

    What the prompt's prefix alone would have reused is counted as everywhere else;
    what its documents are reused, beside it.
    """

    def __init__(
        self, engine: SimulatedScheduler, ranks: Sequence[Connection], slot: int
    ) -> None:
        super().__init__(engine, ranks)
        self._slot = slot
        if not isinstance(engine.client, KVClient):
            raise SetupError("documents: only our own system plays them")
        self._blend = BlendClient(engine.client)
        scenario = engine.plan.scenario
        self._world_size = scenario.ranks
        self._document_seed = chain_seed(
            "document", engine.plan.model, scenario.ranks, engine.chunk_size
        )

    def _live_without_model(self, life: RequestProgress) -> Outcome:
        prefix = self._lookup(life)
        found = self._look_up_documents(life)
        if prefix is None or found is None:
            return Outcome.FAILED
        if prefix.num_tokens:
            self._load_prefix(life, prefix.num_tokens)
        self._tell(self._documents_task(life, found))
        self._hear(life)
        return self._end(life, Outcome.DONE)

    def _load_prefix(self, life: RequestProgress, hit_tokens: int) -> None:
        """Load what an earlier final store left, into paged blocks, and check it."""
        blocks = self._engine.allocate(len(life.hashes))
        try:
            self._tell(self._task(life, hit_tokens, blocks, store=False))
            self._hear(life)
        finally:
            self._engine.pool.free(blocks)

    def _look_up_documents(self, life: RequestProgress) -> CBLookupReply | None:
        begun = self._clock.now()
        try:
            found = self._blend.lookup_pre_computed(
                life.session, self._engine.plan.model, self._world_size, life.tokens
            )
        except (Unavailable, Closed):
            raise
        except KVError as error:
            told = f"document_lookup: {error.code}: {error.message}"
            self._engine.tell_error(told, life.taken)
            return None
        life.durations["document_lookup"] = self._clock.now() - begun
        return found

    def _documents_task(
        self, life: RequestProgress, found: CBLookupReply
    ) -> RunDocuments:
        """Count what was found, and have stored what was not."""
        size, tokens = self._engine.chunk_size, life.tokens
        there = np.zeros(len(tokens), np.bool_)
        for each in found.ranges:
            there[each.start : each.end] = True
        lacking, heads, num_hit = [], [], 0
        for piece in life.taken.access.documents:
            hashes = self._hashes_of(life, piece.start, piece.end)
            whole = there[piece.start : piece.start + len(hashes) * size]
            num_hit += int(np.count_nonzero(whole)) // size
            heads += [chunk_hash[:HEAD_BYTES] for chunk_hash in hashes]
            if not whole.all():
                packed = b"".join(hashes)
                lacking.append(StoredDocument(piece.start, piece.end, packed))
        tally = Tally(
            document_tokens_hit=found.num_tokens,
            document_chunks=len(heads),
            document_chunks_hit=num_hit,
        )
        if not life.taken.warm_up:
            self._engine.score.add_documents(tally, heads)
        return RunDocuments(
            session=life.session,
            slot=self._slot,
            tokens=tokens.tobytes(),
            matches=found.matches,
            documents=tuple(lacking),
            hashes=b"".join(life.hashes),
        )

    def _hashes_of(
        self, life: RequestProgress, start: int, end: int
    ) -> list[ChunkHash]:
        chain = HashChain(self._document_seed, self._engine.chunk_size)
        for _ in chain.extend(life.tokens[start:end].tobytes(), HASH_SLICE):
            pass
        return chain.hashes
