"""The blend requests of a client: documents reused at any position."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from msgspec.structs import replace

from kvcore.client.client import KVClient, resend
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


class BlendClient:
    """What a `KVClient` can ask of a server that was started with `--engine blend`.

    `submit_*` never waits for the network and returns a future, the plain name waits.
    An `offset` is the slot of the buffer that holds the first token; `event` the IPC
    handle of the worker's CUDA event that its bytes come after. Any thread may
    use it; the client stays its owner's.
    """

    def __init__(self, client: KVClient) -> None:
        self.client = client

    # -- a worker's -----------------------------------------------------------------

    def register(self, request: CBRegisterKVCache) -> RegisterReply:
        """Register a buffer, now and with every later run of the server."""
        return self.client.register_kv_cache(request)

    def unregister(self, instance_id: str) -> Done:
        """Forget a buffer; when this returns the server has unmapped it."""
        return self.client.unregister(CBUnregisterKVCache(instance_id))

    def submit_store_pre_computed(
        self,
        instance_id: str,
        offset: int,
        tokens: Tokens,
        *,
        extras: tuple[ExtraKey, ...] = (),
        event: bytes = b"",
        timeout_s: float | None = None,
    ) -> Future[StoreReply]:
        """Store a document's whole chunks; its slots are read until it ends."""
        packed = memoryview(pack_tokens(tokens))
        request = CBStorePreComputed(instance_id, offset, packed, extras, event)
        return self.client.submit(request, timeout_s)

    def store_pre_computed(
        self,
        instance_id: str,
        offset: int,
        tokens: Tokens,
        *,
        extras: tuple[ExtraKey, ...] = (),
        event: bytes = b"",
        timeout_s: float | None = None,
    ) -> StoreReply:
        """Store a document and wait: lookups find it from now on."""
        packed = view_tokens(tokens)
        request = CBStorePreComputed(instance_id, offset, packed, extras, event)
        return self.client.call(request, timeout_s)

    def submit_retrieve_pre_computed(
        self,
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
    ) -> Future[RetrieveReply]:
        """Retrieve ranges or matches into slots, the server's until it ends.

        With `tokens`, a server that has forgotten the session's lookup finds the
        ranges again. The deadline makes the server refuse to begin late; it never
        ends the future.
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
        retry = _send_prompt(request, tokens, extras)
        return self.client.submit(request, timeout_s, retry)

    def retrieve_pre_computed(
        self,
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
    ) -> RetrieveReply:
        """Retrieve and wait, as long as the server lives and has not answered."""
        request = CBRetrievePreComputed(
            session,
            instance_id,
            offset,
            tuple(ranges),
            tuple(matches),
            rotate_keys,
            event=event,
        )
        retry = _send_prompt(request, tokens, extras)
        return self.client.call(request, timeout_s, retry)

    def submit_store_final(
        self,
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
    ) -> Future[StoreReply]:
        """Store the whole chunks of [start, end) of a prompt for normal lookups."""
        request = CBStoreFinal(
            session, instance_id, offset, start, end, extras=extras, event=event
        )
        return self.client.submit(request, timeout_s, resend(request, tokens))

    def store_final(
        self,
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
    ) -> StoreReply:
        """Store a prompt and wait: normal lookups find it from now on."""
        request = CBStoreFinal(
            session, instance_id, offset, start, end, extras=extras, event=event
        )
        return self.client.call(request, timeout_s, resend(request, tokens))

    # -- a scheduler's --------------------------------------------------------------

    def submit_lookup_pre_computed(
        self,
        session: SessionKey,
        model: str,
        world_size: int,
        tokens: Tokens,
        *,
        extras: tuple[ExtraKey, ...] = (),
        timeout_s: float | None = None,
    ) -> Future[CBLookupReply]:
        """Find documents in a prompt, and lease them to the session's readers."""
        packed = memoryview(pack_tokens(tokens))
        request = CBLookupPreComputed(session, model, world_size, packed, extras)
        return self.client.submit(request, timeout_s)

    def lookup_pre_computed(
        self,
        session: SessionKey,
        model: str,
        world_size: int,
        tokens: Tokens,
        *,
        extras: tuple[ExtraKey, ...] = (),
        timeout_s: float | None = None,
    ) -> CBLookupReply:
        """Find documents and wait."""
        packed = view_tokens(tokens)
        request = CBLookupPreComputed(session, model, world_size, packed, extras)
        return self.client.call(request, timeout_s)


def _send_prompt(
    request: CBRetrievePreComputed,
    tokens: Tokens | None,
    extras: tuple[ExtraKey, ...],
) -> Retry | None:
    """Answer `TokensNeeded` with the whole prompt."""
    if tokens is None:
        return None

    def retry(error: KVError) -> Request[Any] | None:
        if not isinstance(error, TokensNeeded) or request.tokens:
            return None
        packed = memoryview(pack_tokens(tokens))
        return replace(request, tokens=packed, extras=extras)

    return retry
