"""Typed client of one server: the requests of an engine's scheduler and workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import wraps
from typing import (
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
)

import numpy as np
from msgspec.structs import replace

from kvcore.client.connection import Connection
from kvcore.client.pending_requests import Retry
from kvcore.client.reconnect import Registration
from kvcore.errors import KVError, TokensNeeded, Unavailable
from kvcore.keys import ExtraKey, SessionKey, Tokens, pack_tokens, view_tokens
from kvcore.protocol import (
    CBLookupPreComputed,
    CBStorePreComputed,
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

P = ParamSpec("P")
R = TypeVar("R")

BlockLists = Sequence[Sequence[int] | np.ndarray[Any, np.dtype[np.integer]]]
"""Block ids, one list per cache group, from token `start` on."""


class PreparedRequest(NamedTuple, Generic[R]):
    """Arguments of `KVClient.call` and `KVClient.submit`: `client.call(*prepared)`."""

    request: Request[R]
    timeout_s: float | None = None
    retry: Retry | None = None


def prepare_store(
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
) -> PreparedRequest[StoreReply]:
    """Store the whole chunks of tokens [start, end) of a session.

    Args:
        session: the request whose tokens these are.
        instance_id: a registered cache of this client.
        start: first token; a multiple of the chunk size.
        end: token after the last one.
        blocks: one list of block ids per cache group, from token `start` on. The
            server reads the blocks until the request ends.
        tokens: the session's token ids from its first one, to send what the server
            lacks. None: the server knows them from a lookup.
        extras: hash material beside the tokens.
        event: IPC handle of a CUDA event that the copy waits for; empty for none.
        timeout_s: seconds until the deadline; None takes the client's.

    Raises:
        TokensNeeded, UnknownInstance, DeadlineExceeded, Unavailable and others of
        `kvcore.errors`. A chunk for which there is no room is counted, not an error.
    """
    request = Store(
        session,
        instance_id,
        start,
        end,
        _pack_blocks(blocks),
        extras=extras,
        event=event,
    )
    return PreparedRequest(request, timeout_s, resend(request, tokens))


def prepare_retrieve(
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
) -> PreparedRequest[RetrieveReply]:
    """Copy the chunks of tokens [start, end) into blocks: all of them or none.

    Arguments as for a store, and `skip_first_n_tokens`: tokens after `start` whose
    slots stay unwritten. The blocks belong to the server until the request ends: the
    deadline stops the server from starting late, and never ends the request early.

    Raises:
        ChunksMissing: a chunk is not there; nothing was written.
    """
    request = Retrieve(
        session,
        instance_id,
        start,
        end,
        _pack_blocks(blocks),
        skip_first_n_tokens,
        extras=extras,
        event=event,
    )
    return PreparedRequest(request, timeout_s, resend(request, tokens))


def prepare_lookup(
    session: SessionKey,
    model: str,
    world_size: int,
    tokens: Tokens,
    *,
    known: int = 0,
    extras: tuple[ExtraKey, ...] = (),
    timeout_s: float | None = None,
) -> PreparedRequest[LookupReply]:
    """Count the leading chunks of `tokens` that all ranks have, and lease them.

    Args:
        session: the request that asks; its earlier lease ends.
        model: model name as registered, with its revision.
        world_size: number of ranks of the model.
        tokens: the session's token ids from its first one.
        known: number of leading tokens that the server has from an earlier lookup.
        extras: hash material beside the tokens.
        timeout_s: seconds until the deadline; None takes the client's.

    Raises:
        UnknownModel: not every rank of the model is registered.
    """
    request = Lookup(
        session,
        model,
        world_size,
        len(tokens),
        view_tokens(tokens[known:] if known else tokens),
        known,
        extras,
    )
    return PreparedRequest(request, timeout_s, resend(request, tokens))


class Sender(Protocol):
    """What `calling` and `submitting` need of the class that gets the methods."""

    def call(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> R:
        """Send a request and wait for its reply."""

    def submit(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Future[R]:
        """Send a request without waiting."""


def calling(
    prepare: Callable[P, PreparedRequest[R]],
) -> Callable[Concatenate[Sender, P], R]:
    """Return a client method that sends what `prepare` returns and waits."""

    @wraps(prepare)
    def call(client: Sender, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return client.call(*prepare(*args, **kwargs))

    return call


def submitting(
    prepare: Callable[P, PreparedRequest[R]],
) -> Callable[Concatenate[Sender, P], Future[R]]:
    """Return a client method that submits what `prepare` returns."""

    @wraps(prepare)
    def submit(client: Sender, /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        request, timeout_s, retry = prepare(*args, **kwargs)
        return client.submit(_own_tokens(request), timeout_s, retry)

    return submit


class KVClient:
    """Client of one server. Thread-safe.

    `store`, `retrieve`, `lookup`, `end_session` and `free_lookup_locks` wait for the
    reply. Their `submit_` forms take the same arguments, never wait for the network
    and return a future. `call` and `submit` send any request of `kvcore.protocol`.

    Every request has a deadline of `timeout_s` seconds unless given its own. `tokens`
    are those of the whole session from its first one. A store or retrieve sends none
    at first, since the scheduler's lookup did, and then what the server says it lacks.
    A request id is used again only after its session ended.

    `engine_key` is a secret of at most 64 bytes. Clients with the same key share their
    sessions; no other client can read, change or end them. An engine of several
    processes must give all of its clients the same key. By default, the clients of one
    process share a random one.

    Raises:
        Unavailable: no server answers within `timeout_s`.
    """

    def __init__(
        self,
        address: str,
        *,
        label: str = "",
        timeout_s: float = 30.0,
        engine_key: bytes | None = None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._connection = Connection(address, label, engine_key)
        try:
            self.ping()
        except BaseException:
            self._connection.close()
            raise

    @property
    def server(self) -> HelloReply:
        """The last reply to the handshake: the server's identity and limits.

        Raises:
            Unavailable: the server is gone and no other has answered yet.
        """
        server = self._connection.reconnect.server
        if server is None:
            raise Unavailable(f"no server answers at {self.address}")
        return server.hello

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk."""
        return self.server.chunk_size

    def close(self) -> None:
        """Close the connection: its registrations and leases end. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def call(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> R:
        """Send a request and wait for its reply; `retry` may answer an error."""
        return self._connection.call(request, timeout_s or self.timeout_s, retry)

    def submit(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Future[R]:
        """Send a request without waiting; the future ends with reply or error."""
        return self._connection.submit(request, timeout_s or self.timeout_s, retry)

    def call_all(
        self, requests: Sequence[Request[Any]], timeout_s: float | None = None
    ) -> list[Any]:
        """Send requests at once, in order, and return their replies in that order."""
        return self._connection.call_all(requests, timeout_s or self.timeout_s)

    # -- requests of a worker ---------------------------------------------------------

    def register_kv_cache(self, request: Registration) -> RegisterReply:
        """Register a cache or a buffer, now and after every restart of the server."""
        return self._connection.register(request, self.timeout_s)

    def unregister_kv_cache(self, instance_id: str) -> Done:
        """Unregister a cache; on return the server has unmapped it."""
        return self.unregister(UnregisterKVCache(instance_id))

    def unregister(self, request: UnregisterKVCache | CBUnregisterKVCache) -> Done:
        """Unregister a cache or a buffer, and do not restore it after a restart."""
        self._connection.reconnect.remove_registration(request.instance_id)
        return self.call(request)

    store = calling(prepare_store)
    submit_store = submitting(prepare_store)
    retrieve = calling(prepare_retrieve)
    submit_retrieve = submitting(prepare_retrieve)

    # -- requests of a scheduler ------------------------------------------------------

    lookup = calling(prepare_lookup)
    submit_lookup = submitting(prepare_lookup)

    def free_lookup_locks(self, session: SessionKey, start: int, end: int) -> Done:
        """End the session's lease on tokens [start, end), for all ranks."""
        return self.call(FreeLookupLocks(session, start, end))

    def submit_free_lookup_locks(
        self, session: SessionKey, start: int, end: int
    ) -> Future[Done]:
        """End the session's lease on tokens [start, end) without waiting."""
        return self.submit(FreeLookupLocks(session, start, end))

    def end_session(self, session: SessionKey) -> Done:
        """End the session's leases and discard its tokens."""
        return self.call(EndSession(session))

    def submit_end_session(self, session: SessionKey) -> Future[Done]:
        """End a session without waiting."""
        return self.submit(EndSession(session))

    # -- control ----------------------------------------------------------------------

    def ping(self) -> Pong:
        """Return the server's clock after one round trip."""
        return self.call(Ping())

    def get_chunk_size(self) -> int:
        """Ask the server for its number of tokens per chunk."""
        return self.call(GetChunkSize()).chunk_size

    def clear(self) -> Cleared:
        """Remove every chunk that is neither leased nor being read or written."""
        return self.call(Clear())

    def status(self, max_leases: int = 100) -> StatusReply:
        """Return the server's state, with at most `max_leases` entries per list."""
        return self.call(Status(max_leases))


def resend(request: Request[R], tokens: Tokens | None) -> Retry | None:
    """Answer `TokensNeeded` with the tokens from where the server's end."""
    if tokens is None:
        return None

    def retry(error: KVError) -> Request[R] | None:
        have = int(error.details.get("have", 0))
        if not isinstance(error, TokensNeeded) or have >= len(tokens):
            return None
        packed = memoryview(pack_tokens(tokens[have:]))
        again: Request[R] = replace(request, tokens=packed, token_offset=have)
        return again

    return retry


def _own_tokens(request: Request[R]) -> Request[R]:
    """Copy the caller's tokens, which it may change before the request is sent."""
    if not isinstance(request, Lookup | CBLookupPreComputed | CBStorePreComputed):
        return request
    viewing: Any = request
    owned: Request[R] = replace(viewing, tokens=memoryview(bytes(viewing.tokens)))
    return owned


def _pack_blocks(blocks: BlockLists) -> tuple[memoryview, ...]:
    return tuple(memoryview(np.asarray(ids, dtype="<i4").tobytes()) for ids in blocks)
