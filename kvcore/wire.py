"""Request types, derived from their declarations, and their encoding in frames.

One ZeroMQ message carries one request or one reply, msgpack in a single frame:

    request  [id, name, fingerprint, boot, deadline_ns, body]
    reply    [id, code, body]      code "" for a result, else an error's code
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from kvcore.errors import BadRequest, KVError, RequestMismatch, UnknownRequest
from kvcore.protocol import BootToken, Lane, Request


@dataclass(frozen=True)
class RequestType:
    """One declared request and the values derived from its declaration.

    Fingerprint and decoders take a millisecond to derive, so they are derived on first
    use: a client imports all requests and uses a few.
    """

    name: str
    request: type[Request[Any]]
    reply: type[Any]
    lane: Lane

    @cached_property
    def fingerprint(self) -> str:
        """Eight digits that change when a field of the request or reply does."""
        parts = [self.name, _describe(self.request), _describe(self.reply)]
        return sha256(msgspec.json.encode(parts)).hexdigest()[:8]

    @cached_property
    def decoder(self) -> msgspec.msgpack.Decoder[Any]:
        """Decoder of the request's body."""
        return msgspec.msgpack.Decoder(self.request)

    @cached_property
    def reply_decoder(self) -> msgspec.msgpack.Decoder[Any]:
        """Decoder of the reply's body."""
        return msgspec.msgpack.Decoder(self.reply)


def wire_name(cls: type[Request[Any]]) -> str:
    """Return a request's name: REGISTER_KV_CACHE for `RegisterKVCache`."""
    return re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__
    ).upper()


def _describe(kind: Any) -> Any:
    """Return a description of a type; equal ones mean the same bytes on the wire."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        config = kind.__struct_config__
        fields = [
            (field.encode_name, _describe(field.type), field.required)
            for field in msgspec.structs.fields(kind)
        ]
        return [kind.__name__, config.tag, config.array_like, fields]
    arguments = [a for a in get_args(kind) if not isinstance(a, Meta)]
    if get_origin(kind) is Annotated:
        return _describe(arguments[0])
    if arguments:
        # `int | None` is a UnionType or a Union, depending on Python's version.
        is_union = get_origin(kind) in (Union, UnionType)
        name = "union" if is_union else get_origin(kind).__name__
        return [name, [_describe(argument) for argument in arguments]]
    return getattr(kind, "__name__", repr(kind))


def derive(cls: type[Request[Any]]) -> RequestType:
    """Return the type of a request; it depends on the declaration alone."""
    reply = get_args(cls.__orig_bases__[0])[0]  # type: ignore[attr-defined]
    return RequestType(wire_name(cls), cls, reply, cls.lane)


REQUESTS: dict[str, RequestType] = {
    kind.name: kind for kind in map(derive, Request.__subclasses__())
}
BY_CLASS: dict[type[Request[Any]], RequestType] = {
    kind.request: kind for kind in REQUESTS.values()
}


class RequestEnvelope(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Envelope of a request's body."""

    id: int
    name: str
    fingerprint: str
    boot: BootToken
    deadline_ns: int
    body: msgspec.Raw


class ReplyEnvelope(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Envelope of a reply's body. `id` 0 answers an unreadable request."""

    id: int
    code: str
    body: msgspec.Raw


class ErrorBody(msgspec.Struct, frozen=True):
    """An error on the wire; its code is the envelope's."""

    message: str
    details: dict[str, int | str] = {}


_encoder = msgspec.msgpack.Encoder()
_request_envelopes = msgspec.msgpack.Decoder(RequestEnvelope)
_reply_envelopes = msgspec.msgpack.Decoder(ReplyEnvelope)
_error_bodies = msgspec.msgpack.Decoder(ErrorBody)
_pieces = msgspec.msgpack.Decoder(list[msgspec.Raw])
_ids = msgspec.msgpack.Decoder(int)

UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""Exceptions of decoders for invalid bytes; ValueError for text that is not UTF-8."""

MAX_ERROR_TEXT = 400
"""Characters."""


def _text_of(error: Exception) -> str:
    """Return a decoder's message on one line of bounded length.

    The message may quote a client's text. It ends with the field's path, so characters
    are removed from the middle.
    """
    text = str(error)
    if not text.isprintable():
        text = ascii(text)[1:-1]
    if len(text) <= MAX_ERROR_TEXT:
        return text
    half = MAX_ERROR_TEXT // 2
    return f"{text[:half]}...{text[-half:]}"


def encode_request(
    request: Request[Any], request_id: int, boot: BootToken, deadline_ns: int
) -> bytes:
    """Return a request's frame; `deadline_ns` is on the host's monotonic clock."""
    kind = BY_CLASS[type(request)]
    # The body is encoded in place: one copy of the tokens instead of two.
    return _encoder.encode(
        (request_id, kind.name, kind.fingerprint, boot, deadline_ns, request)
    )


def decode_envelope(frame: bytes | memoryview) -> RequestEnvelope:
    """Decode the envelope of a request.

    Raises:
        BadRequest: not a request; `details["id"]` is its id, or 0 if unreadable.
    """
    try:
        return _request_envelopes.decode(frame)
    except UNREADABLE as error:
        raise BadRequest(
            f"not a request: {_text_of(error)}", id=_salvage_id(frame)
        ) from None


def _salvage_id(frame: bytes | memoryview) -> int:
    try:
        pieces = _pieces.decode(frame)
        return _ids.decode(pieces[0]) if pieces else 0
    except UNREADABLE:
        return 0


def decode_request(envelope: RequestEnvelope) -> tuple[RequestType, Request[Any]]:
    """Decode a request's body; packed fields are views of the frame.

    Raises:
        UnknownRequest: no request has this name.
        RequestMismatch: the client declares it differently.
        BadRequest: a field is invalid; the message names it.
    """
    kind = REQUESTS.get(envelope.name)
    if kind is None:
        raise UnknownRequest(f"no request is called {envelope.name[:64]!r}")
    if envelope.fingerprint != kind.fingerprint:
        raise RequestMismatch(
            f"{kind.name}: the client's declaration ({envelope.fingerprint[:16]}) "
            f"differs from the server's ({kind.fingerprint}); use the same version"
        )
    try:
        return kind, kind.decoder.decode(envelope.body)
    except UNREADABLE as error:
        raise BadRequest(f"{kind.name}: {_text_of(error)}") from None


def encode_reply(request_id: int, reply: Any) -> bytes:
    """Return the frame of a result."""
    return _encoder.encode((request_id, "", reply))


def encode_error(request_id: int, error: KVError) -> bytes:
    """Return the frame of an error; the client raises the class of its code."""
    details = {name: _within_64_bits(value) for name, value in error.details.items()}
    body = ErrorBody(error.message, details)
    return _encoder.encode((request_id, error.code, body))


def _within_64_bits(value: int | str) -> int | str:
    """Return a detail that msgpack can encode: integers beyond 64 bits as text."""
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return str(value)
    return value


def decode_reply(frame: bytes | memoryview) -> ReplyEnvelope:
    """Decode the envelope of a reply.

    Raises:
        BadRequest: not a reply.
    """
    try:
        return _reply_envelopes.decode(frame)
    except UNREADABLE as error:
        raise BadRequest(f"not a reply: {_text_of(error)}") from None


def decode_error(body: msgspec.Raw) -> ErrorBody:
    """Decode an error's body."""
    return _error_bodies.decode(body)
