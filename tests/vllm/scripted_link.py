"""Scripted server: each request stays pending until the test completes it."""

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
    """A request and its future."""

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
        """The blocks that a copy reads or writes."""
        return {b for ids in self.blocks for b in ids} - {NULL_BLOCK}


class ScriptedClient:
    """A `KVClient` whose requests stay pending."""

    def __init__(self) -> None:
        self.calls: list[LinkCall] = []
        self.note: Callable[[LinkCall], object] = lambda _: None

    @property
    def pending(self) -> list[LinkCall]:
        """Requests that have not been completed."""
        self.calls = [one for one in self.calls if not one.future.done()]
        return self.calls

    def _submit(self, call: LinkCall) -> Future[Any]:
        self.calls.append(call)
        self.note(call)
        return call.future

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
        """Record a lookup."""
        del model, world_size, rest
        name = session.request_id
        return self._submit(LinkCall("lookup", name, tuple(tokens), extras=extras))

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
        """Record a store."""
        del instance_id, rest
        name, ids = session.request_id, _ids(blocks)
        return self._submit(
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
        """Record a retrieve."""
        del instance_id, rest
        name, skip, ids = session.request_id, skip_first_n_tokens, _ids(blocks)
        return self._submit(
            LinkCall("retrieve", name, _plain(tokens), start, end, skip, ids, extras)
        )

    def submit_free_lookup_locks(
        self, session: SessionKey, start: int, end: int
    ) -> Future[Any]:
        """Record the end of a lease."""
        return self._submit(LinkCall("free", session.request_id, (), start, end))

    def submit_end_session(self, session: SessionKey) -> Future[Any]:
        """Record the end of a session."""
        return self._submit(LinkCall("end", session.request_id))


class ScriptedLink:
    """A `ServerLink` whose availability the test sets."""

    def __init__(self, chunk_size: int) -> None:
        self.client = ScriptedClient()
        self.chunk_size = chunk_size
        self.is_available = True
        self.errors: list[BaseException] = []

    @property
    def server(self) -> ServerEndpoint | None:
        """The server, or None while it is unavailable."""
        if not self.is_available:
            return None
        return ServerEndpoint(self.client, self.chunk_size)  # type: ignore[arg-type]

    @property
    def last_client(self) -> ScriptedClient:
        """The client, even while the server is unavailable."""
        return self.client

    def record_success(self) -> None:
        """Do nothing."""

    def record_failure(self, error: KVError) -> None:
        """Record an error; each must be reported once."""
        assert all(error is not one for one in self.errors), "reported twice"
        self.errors.append(error)
        self.is_available = self.is_available and not isinstance(error, SERVER_ERRORS)

    def close(self) -> None:
        """Do nothing."""


def _ids(blocks: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(_plain(ids) for ids in blocks)


def _plain(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.asarray(numbers).tolist())
