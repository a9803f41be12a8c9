"""From a request to what is to be copied: range, blocks, and the chunks' hashes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass

from kvcore.copy.block_arrays import BlockArray, TokenRange, check_targets, read_blocks
from kvcore.engine.instance import Instance
from kvcore.engine.registry import Registry
from kvcore.engine.sessions import Session, SessionTable
from kvcore.keys import ChunkHash
from kvcore.protocol import Retrieve, Store


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What a request copies, and the use of its session until that has ended."""

    instance: Instance
    session: Session
    tokens: TokenRange
    blocks: tuple[BlockArray, ...]
    session_use: ExitStack
    """Closed once, when the copy has ended."""

    @property
    def hashes(self) -> list[ChunkHash]:
        """Of the chunks that are copied."""
        chain = self.session.chain.hashes
        return chain[self.tokens.first_chunk : self.tokens.end_chunk]

    @property
    def prefix(self) -> list[ChunkHash]:
        """Of the chunks before."""
        return self.session.chain.hashes[: self.tokens.first_chunk]


Planning = Generator[None, None, TransferPlan | None]
"""Steps to a plan; None where there is nothing to copy."""


class TransferPlanner:
    """Plans of stores and retrieves, made in steps. Loop thread only."""

    def __init__(
        self, registry: Registry, sessions: SessionTable, chunk_size: int
    ) -> None:
        self._registry = registry
        self._sessions = sessions
        self._chunk_size = chunk_size

    def store(self, request: Store, instance: Instance) -> Planning:
        """Plan to take whole chunks from blocks."""
        tokens = TokenRange.to_store(request.start, request.end, self._chunk_size)
        blocks = read_blocks(instance.layouts, request.blocks, tokens)
        if tokens.is_empty:
            return None
        return (yield from self._plan(request, instance, tokens, blocks, tokens.end))

    def retrieve(self, request: Retrieve, instance: Instance) -> Planning:
        """Plan to write a range into blocks."""
        skip = request.skip_first_n_tokens
        tokens = TokenRange.to_retrieve(
            request.start, request.end, skip, self._chunk_size
        )
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
        tokens: TokenRange,
        blocks: tuple[BlockArray, ...],
        end: int,
    ) -> Generator[None, None, TransferPlan]:
        session = self._sessions.open(request.session, instance.space)
        with ExitStack() as use:
            use.enter_context(self._sessions.use(session))
            yield from self._sessions.extend(
                session, request.tokens, request.token_offset, request.extras, end
            )
            self._registry.check_registered(instance)
            return TransferPlan(instance, session, tokens, blocks, use.pop_all())
