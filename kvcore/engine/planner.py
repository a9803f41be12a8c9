"""From a request to what is to be copied: range, blocks, and the chunks' hashes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from kvcore.engine.instance import Instance
from kvcore.engine.registry import Registry
from kvcore.engine.sessions import Session, SessionTable
from kvcore.keys import ChunkHash
from kvcore.protocol import Retrieve, Store
from kvcore.transport.plan import Blocks, Range, check_targets, read_blocks


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request wants copied. Its session is entered: leave it, once."""

    instance: Instance
    session: Session
    tokens: Range
    blocks: tuple[Blocks, ...]

    @property
    def hashes(self) -> list[ChunkHash]:
        """Of the chunks that are copied."""
        chain = self.session.chain.hashes
        return chain[self.tokens.first_chunk : self.tokens.end_chunk]

    @property
    def prefix(self) -> list[ChunkHash]:
        """Of the chunks before."""
        return self.session.chain.hashes[: self.tokens.first_chunk]


Planning = Generator[None, None, Plan | None]
"""Steps to a plan; None where there is nothing to copy."""


class Planner:
    """Plans of stores and retrieves, made in steps. Loop thread only."""

    def __init__(
        self, registry: Registry, sessions: SessionTable, chunk_size: int
    ) -> None:
        self._registry = registry
        self._sessions = sessions
        self._chunk_size = chunk_size

    def store(self, request: Store, instance: Instance) -> Planning:
        """Plan to take whole chunks from blocks."""
        tokens = Range.to_store(request.start, request.end, self._chunk_size)
        blocks = read_blocks(instance.layouts, request.blocks, tokens)
        if tokens.is_empty:
            return None
        return (yield from self._plan(request, instance, tokens, blocks, tokens.end))

    def retrieve(self, request: Retrieve, instance: Instance) -> Planning:
        """Plan to write a range into blocks."""
        skip = request.skip_first_n_tokens
        tokens = Range.to_retrieve(request.start, request.end, skip, self._chunk_size)
        blocks = read_blocks(instance.layouts, request.blocks, tokens)
        if tokens.is_empty:
            return None
        check_targets(instance.layouts, blocks, tokens)
        whole = tokens.end_chunk * self._chunk_size
        return (yield from self._plan(request, instance, tokens, blocks, whole))

    def _plan(
        self,
        request: Store | Retrieve,
        instance: Instance,
        tokens: Range,
        blocks: tuple[Blocks, ...],
        end: int,
    ) -> Generator[None, None, Plan]:
        session = self._sessions.open(request.session, instance.space)
        self._sessions.enter(session)
        try:
            yield from self._sessions.extend(
                session, request.tokens, request.token_offset, request.extras, end
            )
            self._registry.check_registered(instance)
        except BaseException:
            self._sessions.leave(session)
            raise
        return Plan(instance, session, tokens, blocks)
