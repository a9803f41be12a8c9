"""Client of the blend requests: documents reused at any position of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from kvcore.client.client import KVClient, PreparedRequest, calling, resend, submitting
from kvcore.client.pending_requests import Retry
from kvcore.errors import KVError, TokensNeeded
from kvcore.keys import ExtraKey, SessionKey, Tokens, pack_tokens, view_tokens
from kvcore.protocol import (
    CBLookupPreComputed,
    CBLookupReply,
    CBMatch,
    CBRange,
    CBRegisterKVCache,
    CBRetrievePreComputed,
    CBStoreFinal,
    CBStorePreComputed,
    CBUnregisterKVCache,
    Done,
    RegisterReply,
    Request,
    RetrieveReply,
    StoreReply,
)


def prepare_store_pre_computed(
    instance_id: str,
    offset: int,
    tokens: Tokens,
    *,
    extras: tuple[ExtraKey, ...] = (),
    event: bytes = b"",
    timeout_s: float | None = None,
) -> PreparedRequest[StoreReply]:
    """Store a document's whole chunks; lookups find them after the reply.

    Args:
        instance_id: a registered buffer of this client.
        offset: the slot of the buffer that holds the document's first token. The
            server reads the slots until the request ends.
        tokens: the document's token ids.
        extras: hash material beside the tokens.
        event: IPC handle of a CUDA event that the copy waits for; empty for none.
        timeout_s: seconds until the deadline; None takes the client's.
    """
    packed = view_tokens(tokens)
    request = CBStorePreComputed(instance_id, offset, packed, extras, event)
    return PreparedRequest(request, timeout_s)


def prepare_retrieve_pre_computed(
    session: SessionKey,
    instance_id: str,
    offset: int,
    *,
    ranges: Sequence[CBRange] = (),
    matches: Sequence[CBMatch] = (),
    tokens: Tokens | None = None,
    rotate_keys: bool = False,
    extras: tuple[ExtraKey, ...] = (),
    event: bytes = b"",
    timeout_s: float | None = None,
) -> PreparedRequest[RetrieveReply]:
    """Copy ranges or matches of a lookup to their places in a buffer: all or none.

    Args:
        session: the session whose lookup returned the ranges or matches.
        instance_id: a registered buffer of this client.
        offset: the slot of the prompt's first token. The target slots belong to the
            server until the request ends: the deadline stops the server from starting
            late, and never ends the request early.
        ranges: ranges of the lookup's reply; exclusive with `matches`.
        matches: chunks of the lookup's reply.
        tokens: the whole prompt, for a server that no longer knows the lookup.
        rotate_keys: whether to rotate the keys to their positions in the prompt.
        extras: hash material beside the tokens.
        event: IPC handle of a CUDA event that the copy waits for; empty for none.
        timeout_s: seconds until the deadline; None takes the client's.

    Raises:
        ChunksMissing: a chunk is not there, or not of the lookup; nothing was written.
        TokensNeeded: the server knows no lookup of the session, and `tokens` is None.
    """
    request = CBRetrievePreComputed(
        session,
        instance_id,
        offset,
        tuple(ranges),
        tuple(matches),
        rotate_keys,
        event=event,
    )
    return PreparedRequest(request, timeout_s, _resend_prompt(request, tokens, extras))


def prepare_store_final(
    session: SessionKey,
    instance_id: str,
    offset: int,
    start: int,
    end: int,
    tokens: Tokens | None = None,
    *,
    extras: tuple[ExtraKey, ...] = (),
    event: bytes = b"",
    timeout_s: float | None = None,
) -> PreparedRequest[StoreReply]:
    """Store the whole chunks of tokens [start, end) of a prompt for normal lookups.

    `offset` is the slot of the prompt's first token; other arguments as for a store of
    `KVClient`.
    """
    request = CBStoreFinal(
        session, instance_id, offset, start, end, extras=extras, event=event
    )
    return PreparedRequest(request, timeout_s, resend(request, tokens))


def prepare_lookup_pre_computed(
    session: SessionKey,
    model: str,
    world_size: int,
    tokens: Tokens,
    *,
    extras: tuple[ExtraKey, ...] = (),
    timeout_s: float | None = None,
) -> PreparedRequest[CBLookupReply]:
    """Find stored documents in a prompt, and lease them to the session's ranks.

    Raises:
        UnknownModel: not every rank of the model is registered.
    """
    packed = view_tokens(tokens)
    request = CBLookupPreComputed(session, model, world_size, packed, extras)
    return PreparedRequest(request, timeout_s)


class BlendClient:
    """Blend requests of a `KVClient`; the server must run with `--engine blend`.

    The plain methods wait for the reply. Their `submit_` forms take the same arguments,
    never wait for the network and return a future. Thread-safe. Closing the `KVClient`
    remains the caller's task.
    """

    def __init__(self, client: KVClient) -> None:
        self.client = client
        self.call = client.call
        self.submit = client.submit

    def register(self, request: CBRegisterKVCache) -> RegisterReply:
        """Register a buffer, now and after every restart of the server."""
        return self.client.register_kv_cache(request)

    def unregister(self, instance_id: str) -> Done:
        """Unregister a buffer; on return the server has unmapped it."""
        return self.client.unregister(CBUnregisterKVCache(instance_id))

    store_pre_computed = calling(prepare_store_pre_computed)
    submit_store_pre_computed = submitting(prepare_store_pre_computed)
    retrieve_pre_computed = calling(prepare_retrieve_pre_computed)
    submit_retrieve_pre_computed = submitting(prepare_retrieve_pre_computed)
    store_final = calling(prepare_store_final)
    submit_store_final = submitting(prepare_store_final)
    lookup_pre_computed = calling(prepare_lookup_pre_computed)
    submit_lookup_pre_computed = submitting(prepare_lookup_pre_computed)


def _resend_prompt(
    request: CBRetrievePreComputed,
    tokens: Tokens | None,
    extras: tuple[ExtraKey, ...],
) -> Retry | None:
    """Answer `TokensNeeded` with the whole prompt."""
    if tokens is None:
        return None

    def retry(error: KVError) -> Request[Any] | None:
        if not isinstance(error, TokensNeeded):
            return None
        packed = memoryview(pack_tokens(tokens))
        return replace(request, tokens=packed, extras=extras)

    return retry
