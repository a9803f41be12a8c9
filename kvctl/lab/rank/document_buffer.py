"""A played rank's blend buffer: documents are loaded into it, checked and stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np

from kvcore.blend.blend_client import BlendClient
from kvcore.client import KVClient
from kvcore.errors import KVError, Unavailable
from kvcore.layout import DTYPE_BYTES, token_buffer
from kvcore.protocol import CBRegisterKVCache, StoreReply
from kvctl.lab.model_geometry import RankCache
from kvctl.lab.process_messages import EnginePlan, RequestDone, RunDocuments, Tally
from kvctl.lab.rank.byte_patterns import HostPattern, chunk_seeds
from kvctl.lab.rank.host_paged_cache import PagedCache
from kvctl.lab.rank.rank_cache import Indices

R = TypeVar("R")


@dataclass(slots=True)
class _BufferStep:
    task: RunDocuments
    offset: int
    tally: Tally = field(default_factory=Tally)
    durations: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class DocumentBuffer:
    """A registered buffer `[K, L, T, D]` with room for a prompt of each slot.

    Chunks have the bytes that they would have in the rank's paged cache.
    """

    def __init__(
        self, name: str, plan: EnginePlan, rank: int, client: KVClient
    ) -> None:
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
        self.cache = PagedCache(name, RankCache((group,), (math.prod(shape) * item,)))
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

    def play(self, task: RunDocuments) -> RequestDone:
        """Retrieve what was found and check it, then store documents and prompt."""
        turn = _BufferStep(task, task.slot * self.slot_tokens)
        try:
            if task.matches:
                self._retrieve(turn)
            self._store_documents(turn)
            if task.hashes:
                self._store_final(turn)
        except Unavailable as error:
            return RequestDone(
                turn.tally, turn.durations, (), unavailable=error.message
            )
        return RequestDone(turn.tally, turn.durations, tuple(turn.errors))

    def _retrieve(self, turn: _BufferStep) -> None:
        task, tally = turn.task, turn.tally
        starts = [turn.offset + match.start for match in task.matches]
        blocks = np.concatenate([self._blocks(start, 1) for start in starts])
        self.cache.poison(0, blocks)
        call = partial(
            self.client.retrieve_pre_computed,
            task.session,
            self.instance_id,
            turn.offset,
            matches=task.matches,
        )
        if self._timed(turn, "document_retrieve", call) is None:
            return
        seeds = chunk_seeds(b"".join(match.hash for match in task.matches))
        tally.retrieve_s = turn.durations["document_retrieve"]
        tally.retrieve_bytes = len(task.matches) * self.chunk_bytes
        tally.bytes_wrong = self.pattern.count_wrong_bytes(seeds, blocks)

    def _store_documents(self, turn: _BufferStep) -> None:
        tokens = np.frombuffer(turn.task.tokens, np.uint32)
        for document in turn.task.documents:
            seeds = chunk_seeds(document.hashes)
            start = turn.offset + document.start
            self.pattern.write(seeds, self._blocks(start, len(seeds)))
            call = partial(
                self.client.store_pre_computed,
                self.instance_id,
                start,
                tokens[document.start : document.end],
            )
            self._count(turn, self._timed(turn, "document_store", call))

    def _store_final(self, turn: _BufferStep) -> None:
        """Write the prompt as the model would, and store it."""
        seeds = chunk_seeds(turn.task.hashes)
        self.pattern.write(seeds, self._blocks(turn.offset, len(seeds)))
        call = partial(
            self.client.store_final,
            turn.task.session,
            self.instance_id,
            turn.offset,
            0,
            len(seeds) * self.chunk_size,
        )
        self._count(turn, self._timed(turn, "final_store", call))

    def _blocks(self, start: int, num_chunks: int) -> Indices:
        """Name the slots of chunks, each a block."""
        return np.arange(start, start + num_chunks * self.chunk_size, dtype=np.int32)

    def _timed(self, turn: _BufferStep, name: str, call: Callable[[], R]) -> R | None:
        """Time a call, the slowest of its name; what the server refuses is told."""
        begun = perf_counter()
        try:
            reply = call()
        except Unavailable:
            raise
        except KVError as error:
            turn.errors.append(f"{name}: {error.code}: {error.message}")
            return None
        taken_s = perf_counter() - begun
        turn.durations[name] = max(taken_s, turn.durations.get(name, 0.0))
        return reply

    def _count(self, turn: _BufferStep, reply: StoreReply | None) -> None:
        if reply is not None:
            turn.tally.parts_stored += reply.num_stored
            turn.tally.parts_present += reply.num_present
            turn.tally.parts_dropped += reply.num_dropped

    def close(self) -> None:
        """Unregister and let go of the buffer."""
        with suppress(KVError):
            _ = self.client.client.server
            self.client.unregister(self.instance_id)
        self.cache.close()
