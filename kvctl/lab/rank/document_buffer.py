"""The blend buffer of a simulated rank: documents are retrieved, checked and stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import ParamSpec, TypeVar

import numpy as np

from kvcore.blend.blend_client import BlendClient
from kvcore.client import KVClient
from kvcore.errors import KVError, Unavailable
from kvcore.layout import DTYPE_BYTES, token_buffer
from kvcore.protocol import CBRegisterKVCache, StoreReply
from kvctl.lab.config.model_geometry import Indices, RankCache
from kvctl.lab.process_messages import EnginePlan, RequestDone, RunDocuments, Tally
from kvctl.lab.rank.byte_patterns import HostPattern, chunk_seeds
from kvctl.lab.rank.rank_cache import SEGMENT_PREFIX, HostCache
from kvctl.lab.systems.system_interface import Client, call_duration_s

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class RankRequest:
    """Counts, durations and errors of one request on a rank."""

    client: Client
    tally: Tally = field(default_factory=Tally)
    durations: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def timed(
        self, name: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R | None:
        """Call and record the slowest duration; None if the server refuses.

        Raises:
            Unavailable: the server cannot be reached.
        """
        begun = perf_counter()
        try:
            reply = call(*args, **kwargs)
        except Unavailable:
            raise
        except KVError as error:
            self.errors.append(f"{name}: {error.code}: {error.message}")
            return None
        duration_s = call_duration_s(self.client, perf_counter() - begun)
        self.durations[name] = max(duration_s, self.durations.get(name, 0.0))
        return reply

    def count_store(self, reply: StoreReply | None) -> None:
        """Add the parts of a store; None is one that the server refused."""
        if reply is None:
            return
        self.tally.parts_stored += reply.num_stored
        self.tally.parts_present += reply.num_present
        self.tally.parts_dropped += reply.num_dropped

    def done(self) -> RequestDone:
        """Return the message for the scheduler."""
        return RequestDone(self.tally, self.durations, tuple(self.errors))

    def failed(self, error: Unavailable) -> RequestDone:
        """Return the message for the scheduler if the server cannot be reached."""
        return RequestDone(self.tally, self.durations, unavailable=error.message)


class DocumentBuffer:
    """A registered buffer `[K, L, T, D]` with room for one prompt per slot.

    Chunks have the same bytes as in the rank's paged cache.
    """

    def __init__(self, plan: EnginePlan, rank: int, client: KVClient) -> None:
        scenario, geometry = plan.scenario, plan.geometry
        self.client = BlendClient(client)
        self.chunk_size = client.chunk_size
        self.slot_tokens = scenario.cache_blocks * geometry.block_size
        self.instance_id = f"{plan.engine_id}/{rank}/documents"
        num_tokens = self.slot_tokens * scenario.load.concurrency
        num_kv, item = 1 if geometry.latent else 2, DTYPE_BYTES[geometry.dtype]
        row = geometry.token_bytes(scenario.ranks) // (num_kv * geometry.num_layers)
        shape = (num_kv, geometry.num_layers, num_tokens, row // item)
        group = token_buffer(shape, geometry.dtype)
        name = f"{SEGMENT_PREFIX}{plan.engine_id}-{rank}-documents"
        self.cache = HostCache(name, RankCache((group,), (math.prod(shape) * item,)))
        self.pattern = HostPattern(
            self.cache.views[0], 0, None if geometry.latent else rank, self.chunk_size
        )
        self.chunk_bytes = client.register_kv_cache(
            CBRegisterKVCache(
                instance_id=self.instance_id,
                engine_id=plan.engine_id,
                model=plan.model,
                world_size=scenario.ranks,
                rank=rank,
                handle=self.cache.handles[0],
                shape=shape,
                dtype=geometry.dtype,
            )
        ).chunk_bytes

    def execute(self, task: RunDocuments) -> RequestDone:
        """Retrieve and check matches, then store documents and the prompt."""
        request = RankRequest(self.client.client)
        try:
            if task.matches:
                self._retrieve(task, request)
            self._store_documents(task, request)
            if task.hashes:
                self._store_final(task, request)
        except Unavailable as error:
            return request.failed(error)
        return request.done()

    def _offset(self, task: RunDocuments) -> int:
        return task.slot * self.slot_tokens

    def _retrieve(self, task: RunDocuments, request: RankRequest) -> None:
        offset, tally = self._offset(task), request.tally
        starts = [offset + match.start for match in task.matches]
        blocks = np.concatenate([self._token_blocks(start, 1) for start in starts])
        self.cache.poison(0, blocks)
        retrieved = request.timed(
            "document_retrieve",
            self.client.retrieve_pre_computed,
            *(task.session, self.instance_id, offset),
            matches=task.matches,
        )
        if retrieved is None:
            return
        seeds = chunk_seeds(b"".join(match.hash for match in task.matches))
        tally.retrieve_s = request.durations["document_retrieve"]
        tally.retrieve_bytes = len(task.matches) * self.chunk_bytes
        tally.bytes_wrong = self.pattern.count_wrong_bytes(seeds, blocks)

    def _store_documents(self, task: RunDocuments, request: RankRequest) -> None:
        tokens = np.frombuffer(task.tokens, np.uint32)
        for document in task.documents:
            start = self._offset(task) + document.start
            self._write(document.hashes, start)
            part = tokens[document.start : document.end]
            store = self.client.store_pre_computed
            request.count_store(
                request.timed("document_store", store, self.instance_id, start, part)
            )

    def _store_final(self, task: RunDocuments, request: RankRequest) -> None:
        """Write the whole prompt, as a model would, and store it."""
        offset = self._offset(task)
        num_chunks = self._write(task.hashes, offset)
        reply = request.timed(
            "final_store",
            self.client.store_final,
            *(task.session, self.instance_id, offset, 0, num_chunks * self.chunk_size),
        )
        request.count_store(reply)

    def _write(self, hashes: bytes, start: int) -> int:
        """Write chunks from a token of the buffer on; return their number."""
        seeds = chunk_seeds(hashes)
        self.pattern.write(seeds, self._token_blocks(start, len(seeds)))
        return len(seeds)

    def _token_blocks(self, start: int, num_chunks: int) -> Indices:
        """Return the block ids of chunks; a block of the buffer is one token."""
        return np.arange(start, start + num_chunks * self.chunk_size, dtype=np.int32)

    def close(self) -> None:
        """Unregister and release the buffer."""
        with suppress(KVError):
            _ = self.client.client.server  # Raises if the server has ended.
            self.client.unregister(self.instance_id)
        self.cache.close()
