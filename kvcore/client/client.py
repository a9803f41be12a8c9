"""The typed client: what an engine's scheduler and workers ask of the server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec
import numpy as np

from kvcore.client.connection import Connection
from kvcore.client.pending_requests import Retry
from kvcore.client.reconnect import Registration
from kvcore.errors import KVError, TokensNeeded, Unavailable
from kvcore.keys import ExtraKey, SessionKey, Tokens, pack_tokens, view_tokens
from kvcore.protocol import (
    CBUnregisterKVCache,
    Clear,
    Cleared,
    Done,
    EndSession,
    FreeLookupLocks,
    GetChunkSize,
    HelloReply,
    Lookup,
    LookupReply,
    Ping,
    Pong,
    RegisterReply,
    Request,
    Retrieve,
    RetrieveReply,
    Status,
    StatusReply,
    Store,
    StoreReply,
    UnregisterKVCache,
)

R = TypeVar("R")
TokenRequest = Store | Retrieve | Lookup
"""Requests that carry tokens."""

BlockLists = Sequence[Sequence[int] | np.ndarray[Any, np.dtype[np.integer]]]
"""Block ids, one list a cache group, from the request's first token on."""


class KVClient:
    """One client of one server; any thread may use it.

    `submit_*` never waits for the network and returns a future, the plain name waits.
    Every request has a deadline of `timeout_s` unless given its own. Tokens are those
    of the whole session from its first one. A lookup sends them from `known` on; a
    store or retrieve sends none at first, since the scheduler's lookup did, and what
    the server then says it lacks. A request id is used again only after END_SESSION.

    Raises:
        Unavailable: no server answers within `timeout_s`.
    """

    def __init__(
        self, address: str, *, label: str = "", timeout_s: float = 30.0
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._connection = Connection(address, label)
        try:
            self.ping()
        except BaseException:
            self._connection.close()
            raise

    @property
    def server(self) -> HelloReply:
        """What the server said of itself when last met.

        Raises:
            Unavailable: it is gone and no other has answered yet.
        """
        peer = self._connection.runs.peer
        if peer is None:
            raise Unavailable(f"no server at {self.address} just now")
        return peer.hello

    @property
    def chunk_size(self) -> int:
        """Tokens a chunk."""
        return self.server.chunk_size

    def close(self) -> None:
        """Say goodbye: the server forgets this client's instances and leases."""
        self._connection.close()

    def __enter__(self) -> KVClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def call(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> R:
        """Send any declared request and wait for its reply."""
        return self._connection.call(request, timeout_s or self.timeout_s, retry)

    def submit(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Future[R]:
        """Send any declared request."""
        return self._connection.submit(request, timeout_s or self.timeout_s, retry)

    def call_all(
        self, requests: Sequence[Request[Any]], timeout_s: float | None = None
    ) -> list[Any]:
        """Send requests at once, in order, and wait for all of their replies."""
        return self._connection.call_all(requests, timeout_s or self.timeout_s)

    # -- a worker's -----------------------------------------------------------------

    def register_kv_cache(self, request: Registration) -> RegisterReply:
        """Register a cache or a buffer, now and with every later run of the server."""
        return self._connection.register(request, self.timeout_s)

    def unregister_kv_cache(self, instance_id: str) -> Done:
        """Forget a cache; when this returns the server has unmapped it."""
        return self.unregister(UnregisterKVCache(instance_id))

    def unregister(self, request: UnregisterKVCache | CBUnregisterKVCache) -> Done:
        """Forget a cache or a buffer, and that it was to be registered again."""
        self._connection.runs.forget(request.instance_id)
        return self.call(request)

    def submit_store(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
        *,
        extras: tuple[ExtraKey, ...] = (),
        event: bytes = b"",
        timeout_s: float | None = None,
    ) -> Future[StoreReply]:
        """Store the whole chunks of [start, end); the blocks are read until it ends.

        After the worker's CUDA event whose IPC handle is `event`.
        """
        request = _store(session, instance_id, start, end, blocks, extras, event)
        return self._submit_tokens(request, tokens, timeout_s)

    def store(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
        *,
        extras: tuple[ExtraKey, ...] = (),
        event: bytes = b"",
        timeout_s: float | None = None,
    ) -> StoreReply:
        """Store and wait: what this returned can be read by anyone."""
        request = _store(session, instance_id, start, end, blocks, extras, event)
        return self._call_tokens(request, tokens, timeout_s)

    def submit_retrieve(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
        *,
        skip_first_n_tokens: int = 0,
        extras: tuple[ExtraKey, ...] = (),
        event: bytes = b"",
        timeout_s: float | None = None,
    ) -> Future[RetrieveReply]:
        """Retrieve [start, end) into blocks, which are the server's until it ends.

        After the worker's CUDA event whose IPC handle is `event`. The deadline makes
        the server refuse to begin late; it never ends the future.
        """
        request = Retrieve(
            session,
            instance_id,
            start,
            end,
            _pack(blocks),
            skip_first_n_tokens,
            extras=extras,
            event=event,
        )
        return self._submit_tokens(request, tokens, timeout_s)

    def retrieve(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
        *,
        skip_first_n_tokens: int = 0,
        extras: tuple[ExtraKey, ...] = (),
        event: bytes = b"",
        timeout_s: float | None = None,
    ) -> RetrieveReply:
        """Retrieve and wait, as long as the server lives and has not answered."""
        request = Retrieve(
            session,
            instance_id,
            start,
            end,
            _pack(blocks),
            skip_first_n_tokens,
            extras=extras,
            event=event,
        )
        return self._call_tokens(request, tokens, timeout_s)

    # -- a scheduler's --------------------------------------------------------------

    def submit_lookup(
        self,
        session: SessionKey,
        model: str,
        world_size: int,
        tokens: Tokens,
        *,
        known: int = 0,
        extras: tuple[ExtraKey, ...] = (),
        wait: bool = True,
        timeout_s: float | None = None,
    ) -> Future[LookupReply]:
        """Count and lease the leading chunks of `tokens` that are there.

        Without `wait` those that are in L1 now; what tiers have of the rest is loaded
        behind the answer, for a later lookup, until the session ends.
        """
        # Sent later, when the caller may have changed its array.
        kept = tokens.copy() if isinstance(tokens, np.ndarray) else tokens
        request = _lookup(session, model, world_size, kept, known, extras, wait=wait)
        return self._submit_tokens(request, tokens, timeout_s)

    def lookup(
        self,
        session: SessionKey,
        model: str,
        world_size: int,
        tokens: Tokens,
        *,
        known: int = 0,
        extras: tuple[ExtraKey, ...] = (),
        wait: bool = True,
        timeout_s: float | None = None,
    ) -> LookupReply:
        """Look up, and return the answer; `wait` as for `submit_lookup`."""
        request = _lookup(session, model, world_size, tokens, known, extras, wait=wait)
        return self._call_tokens(request, tokens, timeout_s)

    def free_lookup_locks(self, session: SessionKey, start: int, end: int) -> Done:
        """End the lease on [start, end), for all ranks."""
        return self.call(FreeLookupLocks(session, start, end))

    def submit_free_lookup_locks(
        self, session: SessionKey, start: int, end: int
    ) -> Future[Done]:
        """End the lease on [start, end) without waiting."""
        return self.submit(FreeLookupLocks(session, start, end))

    def end_session(self, session: SessionKey) -> Done:
        """End the session's leases and forget its tokens."""
        return self.call(EndSession(session))

    def submit_end_session(self, session: SessionKey) -> Future[Done]:
        """End a session without waiting."""
        return self.submit(EndSession(session))

    # -- control --------------------------------------------------------------------

    def ping(self) -> Pong:
        """One round trip."""
        return self.call(Ping())

    def get_chunk_size(self) -> int:
        """Ask for the tokens a chunk."""
        return self.call(GetChunkSize()).chunk_size

    def clear(self) -> Cleared:
        """Drop every chunk that nobody reads or writes."""
        return self.call(Clear())

    def status(self, max_leases: int = 100) -> StatusReply:
        """Look inside the server."""
        return self.call(Status(max_leases))

    # -- tokens ---------------------------------------------------------------------

    def _submit_tokens(
        self, request: Request[R], tokens: Tokens | None, timeout_s: float | None
    ) -> Future[R]:
        return self.submit(request, timeout_s, resend(request, tokens))

    def _call_tokens(
        self, request: Request[R], tokens: Tokens | None, timeout_s: float | None
    ) -> R:
        return self.call(request, timeout_s, resend(request, tokens))


def _store(
    session: SessionKey,
    instance_id: str,
    start: int,
    end: int,
    blocks: BlockLists,
    extras: tuple[ExtraKey, ...],
    event: bytes,
) -> Store:
    packed = _pack(blocks)
    return Store(session, instance_id, start, end, packed, extras=extras, event=event)


def _lookup(
    session: SessionKey,
    model: str,
    world_size: int,
    tokens: Tokens,
    known: int,
    extras: tuple[ExtraKey, ...],
    *,
    wait: bool,
) -> Lookup:
    packed = view_tokens(tokens[known:] if known else tokens)
    end = len(tokens)
    return Lookup(session, model, world_size, end, packed, known, extras, wait)


def resend(request: Request[R], tokens: Tokens | None) -> Retry | None:
    """Answer `TokensNeeded` with the tokens from where the server says it ends."""
    if tokens is None:
        return None

    def retry(error: KVError) -> Request[R] | None:
        have = int(error.details.get("have", 0))
        if not isinstance(error, TokensNeeded) or have >= len(tokens):
            return None
        packed = memoryview(pack_tokens(tokens[have:]))
        again: Request[R] = msgspec.structs.replace(
            request, tokens=packed, token_offset=have
        )
        return again

    return retry


def _pack(blocks: BlockLists) -> tuple[memoryview, ...]:
    return tuple(memoryview(np.asarray(ids, dtype="<i4").tobytes()) for ids in blocks)
