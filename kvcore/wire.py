"""Request types derived from their declarations, and their encoding in frames.

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

    What takes a millisecond to derive is derived when first asked for: a client uses
    a few requests, and imports them all.
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
        """Reads the request's body."""
        return msgspec.msgpack.Decoder(self.request)

    @cached_property
    def reply_decoder(self) -> msgspec.msgpack.Decoder[Any]:
        """Reads the reply's body."""
        return msgspec.msgpack.Decoder(self.reply)


def wire_name(cls: type[Request[Any]]) -> str:
    """`RegisterKVCache` is REGISTER_KV_CACHE on the wire."""
    return re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__
    ).upper()


def _describe(kind: Any) -> Any:
    """Render a type so that equal renderings mean equal bytes on the wire."""
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
    """Derive what follows from a request's declaration, and from nothing else."""
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
"""What decoding raises for foreign bytes; ValueError where text is not UTF-8."""


MAX_SAID = 400


def _said(error: Exception) -> str:
    """Put what a decoder says on a short line: it may quote foreign text as it is.

    Where it stands is said at the end, so the middle goes.
    """
    text = str(error)
    if not text.isprintable():
        text = ascii(text)[1:-1]
    if len(text) <= MAX_SAID:
        return text
    half = MAX_SAID // 2
    return f"{text[:half]}...{text[-half:]}"


def encode_request(
    request: Request[Any], request_id: int, boot: BootToken, deadline_ns: int
) -> bytes:
    """Encode one request; `deadline_ns` is on the host's monotonic clock."""
    kind = BY_CLASS[type(request)]
    # The body is encoded in place: one copy of the tokens instead of two.
    return _encoder.encode(
        (request_id, kind.name, kind.fingerprint, boot, deadline_ns, request)
    )


def decode_envelope(frame: bytes | memoryview) -> RequestEnvelope:
    """Read the outer part of a request.

    Raises:
        BadRequest: not a request; `details["id"]` names it when that much was read.
    """
    try:
        return _request_envelopes.decode(frame)
    except UNREADABLE as error:
        raise BadRequest(
            f"not a request: {_said(error)}", id=_salvage_id(frame)
        ) from None


def _salvage_id(frame: bytes | memoryview) -> int:
    try:
        pieces = _pieces.decode(frame)
        return _ids.decode(pieces[0]) if pieces else 0
    except UNREADABLE:
        return 0


def decode_request(envelope: RequestEnvelope) -> tuple[RequestType, Request[Any]]:
    """Read a request's body. Packed fields are views into the frame.

    Raises:
        UnknownRequest, RequestMismatch, BadRequest: naming the request and field.
    """
    kind = REQUESTS.get(envelope.name)
    if kind is None:
        raise UnknownRequest(f"no request is called {envelope.name[:64]!r}")
    if envelope.fingerprint != kind.fingerprint:
        raise RequestMismatch(
            f"{kind.name}: declared otherwise by the client "
            f"({envelope.fingerprint[:16]}) than here ({kind.fingerprint}); "
            "their versions differ"
        )
    try:
        return kind, kind.decoder.decode(envelope.body)
    except UNREADABLE as error:
        raise BadRequest(f"{kind.name}: {_said(error)}") from None


def encode_reply(request_id: int, reply: Any) -> bytes:
    """Encode a result."""
    return _encoder.encode((request_id, "", reply))


def encode_error(request_id: int, error: KVError) -> bytes:
    """Encode an error; the client raises the class that its code names."""
    details = {name: _within_64_bits(value) for name, value in error.details.items()}
    body = ErrorBody(error.message, details)
    return _encoder.encode((request_id, error.code, body))


def _within_64_bits(value: int | str) -> int | str:
    """Return a detail as msgpack can carry it: an integer beyond 64 bits as text."""
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return str(value)
    return value


def decode_reply(frame: bytes | memoryview) -> ReplyEnvelope:
    """Read the outer part of a reply; raises `BadRequest` for anything else."""
    try:
        return _reply_envelopes.decode(frame)
    except UNREADABLE as error:
        raise BadRequest(f"not a reply: {_said(error)}") from None


def decode_error(body: msgspec.Raw) -> ErrorBody:
    """Read an error's body."""
    return _error_bodies.decode(body)
