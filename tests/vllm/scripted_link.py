"""A server that is played: each request waits for the test to end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcore.errors import KVError
from kvcore.keys import ExtraKey, SessionKey
from kvcore.protocol import NULL_BLOCK
from kvcore.vllm.server_link import SERVER_ERRORS, ServerEndpoint


@dataclass(eq=False)
class LinkCall:
    """One request, as it was sent."""

    kind: str
    name: str
    tokens: tuple[int, ...] = ()
    start: int = 0
    end: int = 0
    skip: int = 0
    blocks: tuple[tuple[int, ...], ...] = ()
    extras: tuple[ExtraKey, ...] = ()
    future: Future[Any] = field(default_factory=Future)

    @property
    def real_blocks(self) -> set[int]:
        """The blocks that a copy may touch."""
        return {b for ids in self.blocks for b in ids} - {NULL_BLOCK}


class PlayedClient:
    """Takes requests as `KVClient` does and keeps them."""

    def __init__(self) -> None:
        self.asked: list[LinkCall] = []
        self.note: Callable[[LinkCall], object] = lambda _: None

    @property
    def pending(self) -> list[LinkCall]:
        """Requests that have not ended."""
        self.asked = [one for one in self.asked if not one.future.done()]
        return self.asked

    def _ask(self, asked: LinkCall) -> Future[Any]:
        self.asked.append(asked)
        self.note(asked)
        return asked.future

    def submit_lookup(
        self,
        session: SessionKey,
        model: str,
        world_size: int,
        tokens: Sequence[int],
        *,
        extras: tuple[ExtraKey, ...] = (),
        **rest: object,
    ) -> Future[Any]:
        """Take a lookup."""
        del model, world_size, rest
        name = session.request_id
        return self._ask(LinkCall("lookup", name, tuple(tokens), extras=extras))

    def submit_store(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: Sequence[Sequence[int]],
        tokens: Sequence[int],
        *,
        extras: tuple[ExtraKey, ...] = (),
        **rest: object,
    ) -> Future[Any]:
        """Take a store."""
        del instance_id, rest
        name, ids = session.request_id, _ids(blocks)
        return self._ask(
            LinkCall("store", name, _plain(tokens), start, end, 0, ids, extras)
        )

    def submit_retrieve(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: Sequence[Sequence[int]],
        tokens: Sequence[int],
        *,
        skip_first_n_tokens: int = 0,
        extras: tuple[ExtraKey, ...] = (),
        **rest: object,
    ) -> Future[Any]:
        """Take a retrieve."""
        del instance_id, rest
        name, skip, ids = session.request_id, skip_first_n_tokens, _ids(blocks)
        return self._ask(
            LinkCall("retrieve", name, _plain(tokens), start, end, skip, ids, extras)
        )

    def submit_free_lookup_locks(
        self, session: SessionKey, start: int, end: int
    ) -> Future[Any]:
        """Take the end of a lease."""
        return self._ask(LinkCall("free", session.request_id, (), start, end))

    def submit_end_session(self, session: SessionKey) -> Future[Any]:
        """Take the end of a session."""
        return self._ask(LinkCall("end", session.request_id))


class ScriptedLink:
    """A link whose server is well again when the test says so."""

    def __init__(self, chunk_size: int) -> None:
        self.client = PlayedClient()
        self.chunk_size = chunk_size
        self.is_available = True
        self.errors: list[BaseException] = []

    @property
    def server(self) -> ServerEndpoint | None:
        """The server, while it is well."""
        if not self.is_available:
            return None
        return ServerEndpoint(self.client, self.chunk_size)  # type: ignore[arg-type]

    @property
    def last_client(self) -> PlayedClient:
        """The client, well or not."""
        return self.client

    def record_success(self) -> None:
        """Take note of nothing."""

    def record_failure(self, error: KVError) -> None:
        """Judge an error, which is told of once."""
        assert all(error is not one for one in self.errors), "told of twice"
        self.errors.append(error)
        self.is_available = self.is_available and not isinstance(error, SERVER_ERRORS)

    def close(self) -> None:
        """Do nothing."""


def _ids(blocks: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(_plain(ids) for ids in blocks)


def _plain(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.asarray(numbers).tolist())
