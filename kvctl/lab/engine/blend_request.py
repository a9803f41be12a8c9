"""The lifecycle of a request of documents, in an engine that blends."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np

from kvcore.blend.blend_client import BlendClient
from kvcore.client import KVClient
from kvcore.errors import SetupError
from kvcore.keys import chain_seed
from kvcore.protocol import CBLookupReply
from kvctl.lab.engine.engine_state import EngineState
from kvctl.lab.engine.engine_statistics import HEAD_BYTES, Outcome
from kvctl.lab.engine.request_lifecycle import RequestLifecycle, RequestProgress
from kvctl.lab.process_messages import RunDocuments, StoredDocument, Tally


class BlendRequest(RequestLifecycle):
    """Executes requests of documents in one slot of the ranks' buffers.

    Reuse by prefix is counted as in other workloads, and reuse of documents beside it.
    """

    def __init__(
        self, engine: EngineState, ranks: Sequence[Connection], slot: int
    ) -> None:
        super().__init__(engine, ranks)
        self._slot = slot
        if not isinstance(engine.client, KVClient):
            raise SetupError("workload documents: only kvctl's server supports it")
        self._blend = BlendClient(engine.client)
        scenario = engine.plan.scenario
        self._world_size = scenario.ranks
        self._document_seed = chain_seed(
            "document", engine.plan.model, scenario.ranks, engine.chunk_size
        )

    def _execute_without_model(self, request: RequestProgress) -> Outcome:
        prefix = self._lookup(request)
        found = self._look_up_documents(request)
        if prefix is None or found is None:
            return Outcome.FAILED
        if prefix.num_tokens:
            self._retrieve_prefix(request, prefix.num_tokens)
        self._send(self._documents_task(request, found))
        self._receive(request)
        return self._end(request, Outcome.DONE)

    def _retrieve_prefix(self, request: RequestProgress, hit_tokens: int) -> None:
        """Retrieve and check what an earlier request stored as a whole prompt."""
        blocks = self._engine.allocate(len(request.hashes))
        try:
            self._send(self._task(request, hit_tokens, blocks, store=False))
            self._receive(request)
        finally:
            self._engine.pool.free(blocks)

    def _look_up_documents(self, request: RequestProgress) -> CBLookupReply | None:
        model, key = self._engine.plan.model, request.session
        arguments = (key, model, self._world_size, request.tokens)
        lookup = self._blend.lookup_pre_computed
        return self._timed_call(request, "document_lookup", lookup, *arguments)

    def _documents_task(
        self, request: RequestProgress, found: CBLookupReply
    ) -> RunDocuments:
        """Count the matches, and return the task that stores the missing documents."""
        chunk_size, tokens = self._engine.chunk_size, request.tokens
        is_found = np.zeros(len(tokens), np.bool_)
        for each in found.ranges:
            is_found[each.start : each.end] = True
        missing, heads, num_hit = [], [], 0
        for document in request.paced.access.documents:
            part = tokens[document.start : document.end]
            hashes = self._hash(self._document_seed, part)
            end = document.start + len(hashes) * chunk_size
            chunks_found = is_found[document.start : end]
            num_hit += int(np.count_nonzero(chunks_found)) // chunk_size
            heads += [chunk_hash[:HEAD_BYTES] for chunk_hash in hashes]
            if not chunks_found.all():
                packed = b"".join(hashes)
                missing.append(StoredDocument(document.start, document.end, packed))
        tally = Tally(
            document_tokens_hit=found.num_tokens,
            document_chunks=len(heads),
            document_chunks_hit=num_hit,
        )
        if not request.paced.warm_up:
            self._engine.statistics.add_documents(tally, heads)
        return RunDocuments(
            session=request.session,
            slot=self._slot,
            tokens=tokens.tobytes(),
            matches=found.matches,
            documents=tuple(missing),
            hashes=b"".join(request.hashes),
        )
