"""The wire: what goes out comes in, and what is wrong is refused by its right name."""

from __future__ import annotations

from types import new_class
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Meta, inspect

from kvcore import errors
from kvcore.errors import BadRequest, KVError, RequestMismatch, UnknownRequest
from kvcore.keys import SessionKey
from kvcore.protocol import NO_BOOT, BootToken, Done, Ping, Request
from kvcore.wire import (
    REQUESTS,
    RequestType,
    decode_envelope,
    decode_error,
    decode_reply,
    decode_request,
    derive,
    encode_error,
    encode_reply,
    encode_request,
)

KINDS = tuple(REQUESTS.values())
BOOT = BootToken((1 << 63) - 1)
every_request = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Build values of a type from its declaration."""
    if isinstance(kind, inspect.Metadata):
        return values(kind.type)
    if isinstance(kind, inspect.StructType):
        fields = {field.name: values(field.type) for field in kind.fields}
        return st.builds(kind.cls, **fields)
    if isinstance(kind, inspect.UnionType):
        return st.one_of(*map(values, kind.types))
    if isinstance(kind, inspect.LiteralType):
        return st.sampled_from(kind.values)
    if isinstance(kind, inspect.VarTupleType):
        items = values(kind.item_type)
        return st.lists(items, min_size=kind.min_length or 0, max_size=3).map(tuple)
    if isinstance(kind, inspect.DictType):
        keys, items = values(kind.key_type), values(kind.value_type)
        return st.dictionaries(keys, items, max_size=3)
    return scalars(kind)


def scalars(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Build values of a type that holds no other."""
    if isinstance(kind, inspect.IntType):
        low = -(1 << 63) if kind.ge is None else kind.ge
        high = (1 << 63) - 1 if kind.le is None else kind.le
        return st.integers(min_value=low, max_value=high)
    if isinstance(kind, inspect.StrType):
        size = min(kind.max_length or 8, 8)
        return st.text(min_size=kind.min_length or 0, max_size=size)
    if isinstance(kind, inspect.BytesType):
        low = kind.min_length or 0
        return st.binary(min_size=low, max_size=kind.max_length or low + 16)
    if isinstance(kind, inspect.MemoryViewType):
        return st.binary(max_size=16).map(memoryview)
    if isinstance(kind, inspect.FloatType):
        return st.floats(kind.ge, kind.le, allow_nan=False)
    return {
        inspect.BoolType: st.booleans(),
        inspect.NoneType: st.none(),
    }[type(kind)]


@every_request
@given(data=st.data())
def test_a_request_round_trips(kind: RequestType, data: st.DataObject) -> None:
    """Every request arrives as it was sent, with its envelope."""
    request = data.draw(values(inspect.type_info(kind.request)))
    envelope = decode_envelope(encode_request(request, 7, BOOT, 123))
    assert (envelope.id, envelope.name) == (7, kind.name)
    assert (envelope.boot, envelope.deadline_ns) == (BOOT, 123)
    arrived_kind, arrived = decode_request(envelope)
    assert arrived_kind is kind
    assert arrived == request


@every_request
@given(data=st.data())
def test_a_reply_round_trips(kind: RequestType, data: st.DataObject) -> None:
    """Every reply arrives as it was sent, under the id that was asked."""
    reply = data.draw(values(inspect.type_info(kind.reply)))
    envelope = decode_reply(encode_reply(9, reply))
    assert (envelope.id, envelope.code) == (9, "")
    assert kind.reply_decoder.decode(envelope.body) == reply


@every_request
def test_a_request_says_what_it_is_for(kind: RequestType) -> None:
    """Requests and replies are documented where they are declared."""
    assert kind.request.__doc__
    assert kind.reply.__doc__


def test_names_are_unique_and_upper_case() -> None:
    """One name, one request."""
    declared = [
        cls for cls in Request.__subclasses__() if cls.__module__ == Request.__module__
    ]
    assert [kind.request for kind in REQUESTS.values()] == declared
    assert all(name == name.upper() == kind.name for name, kind in REQUESTS.items())


def test_packed_fields_are_views_into_the_frame() -> None:
    """A long prompt is not copied to be read."""
    kind = REQUESTS["LOOKUP"]
    request = kind.request(
        session=SessionKey("e", "r"),
        model="m",
        world_size=1,
        end=4,
        tokens=memoryview(b"abcd"),
    )
    frame = encode_request(request, 1, BOOT, 0)
    _, arrived = decode_request(decode_envelope(frame))
    held = np.frombuffer(arrived.tokens, np.uint8)
    assert held.tobytes() == b"abcd"
    assert np.shares_memory(held, np.frombuffer(frame, np.uint8))


def declare(annotations: dict[str, Any], **values: Any) -> str:
    """Declare a request called Example and return its fingerprint."""
    body = {"__annotations__": annotations, "__module__": __name__} | values
    options = {"frozen": True}
    struct = new_class("Example", (Request[Done],), options, lambda ns: ns.update(body))
    return derive(struct).fingerprint


def test_a_fingerprint_follows_what_goes_over_the_wire() -> None:
    """A field more, another name, another type or order: another fingerprint."""
    prints = [
        declare({}),
        declare({"a": int}),
        declare({"b": int}),
        declare({"a": str}),
        declare({"a": int | None}),
        declare({"a": int | str}),
        declare({"a": int, "b": int}),
        declare({"b": int, "a": int}),
        declare({"a": tuple[int, ...]}),
        declare({"a": tuple[str, ...]}),
        declare({"a": int}, a=3),
    ]
    assert len(set(prints)) == len(prints)


def test_a_fingerprint_does_not_follow_descriptions() -> None:
    """Better words are no other protocol."""
    plain = declare({"a": int})
    assert declare({"a": Annotated[int, Meta(description="of them")]}) == plain


def test_a_fingerprint_does_not_depend_on_other_requests() -> None:
    """Each is derived from its own declaration: adding one shifts nothing."""
    before = {kind.name: kind.fingerprint for kind in KINDS}
    declare({"a": int})
    after = {kind.name: derive(kind.request).fingerprint for kind in KINDS}
    assert after == before


@every_request
def test_a_request_declared_otherwise_is_refused(kind: RequestType) -> None:
    """Two versions that differ in a used request say so."""
    frame = msgspec.msgpack.encode((3, kind.name, "00000000", 0, 0, {}))
    with pytest.raises(RequestMismatch, match=f"{kind.name}: the client's declaration"):
        decode_request(decode_envelope(frame))


def test_an_unknown_name_is_refused() -> None:
    """Nobody guesses what was meant; a long name is cut."""
    frame = msgspec.msgpack.encode((3, "X" * 1000, "", 0, 0, {}))
    with pytest.raises(UnknownRequest, match="no request is called 'XX") as failed:
        decode_request(decode_envelope(frame))
    assert len(failed.value.message) < 200


@every_request
@pytest.mark.parametrize("body", [None, 3, "x", [1]])
def test_a_wrong_body_is_refused(kind: RequestType, body: object) -> None:
    """A body is a map of the request's fields."""
    frame = msgspec.msgpack.encode((3, kind.name, kind.fingerprint, 0, 0, body))
    envelope = decode_envelope(frame)
    with pytest.raises(BadRequest, match=f"{kind.name}: "):
        decode_request(envelope)


def test_a_wrong_field_is_named() -> None:
    """The refusal says which field of which request, and what it may be."""
    kind = REQUESTS["UNREGISTER_KV_CACHE"]
    body = {"instance_id": 3}
    frame = msgspec.msgpack.encode((3, kind.name, kind.fingerprint, 0, 0, body))
    with pytest.raises(BadRequest, match=r"UNREGISTER_KV_CACHE: .*\$\.instance_id"):
        decode_request(decode_envelope(frame))


def swallow(frame: bytes) -> None:
    """Read a frame to its end, as the server does."""
    try:
        decode_request(decode_envelope(frame))
    except errors.RequestError:
        return


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\x91" * 100_000)
@example(b"\xdd\xff\xff\xff\xff")
@example(encode_request(Ping(), 1, NO_BOOT, 0)[:-1])
@example(encode_request(Ping(), 1, NO_BOOT, 0) + b"\x00")
def test_garbage_is_a_bad_request_and_nothing_else(frame: bytes) -> None:
    """No frame, however wrong, raises anything that the server does not answer."""
    swallow(frame)


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text()
    | st.binary() | st.floats(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
))  # fmt: skip
def test_well_formed_nonsense_is_refused_too(value: object) -> None:
    """Msgpack that is not a request is answered like any garbage."""
    swallow(msgspec.msgpack.encode(value))


@every_request
@given(st.data())
def test_a_damaged_request_is_refused(kind: RequestType, data: st.DataObject) -> None:
    """One wrong byte anywhere gives a request or a refusal, never another error."""
    request = data.draw(values(inspect.type_info(kind.request)))
    frame = bytearray(encode_request(request, 1, BOOT, 0))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] = data.draw(st.integers(0, 255))
    swallow(bytes(frame))


@pytest.mark.parametrize(
    ("value", "salvaged"),
    [
        ([42, "PING"], 42),
        ([42], 42),
        ([42, 1, 2, 3, 4, 5], 42),
        ([True], 0),
        (["x"], 0),
        ([], 0),
        ({"id": 42}, 0),
        (42, 0),
    ],
)
def test_an_id_is_salvaged_where_it_can_be(value: object, salvaged: int) -> None:
    """A broken request is answered under its own id when that much was read."""
    with pytest.raises(BadRequest) as failed:
        decode_envelope(msgspec.msgpack.encode(value))
    assert failed.value.details["id"] == salvaged


@pytest.mark.parametrize("code", errors.ERRORS)
def test_every_error_code_becomes_its_class(code: str) -> None:
    """What the server raises, the client raises, words and details included."""
    raised = errors.ERRORS[code]("said so", have=3, rank="x")
    envelope = decode_reply(encode_error(5, raised))
    assert (envelope.id, envelope.code) == (5, code)
    body = decode_error(envelope.body)
    arrived = errors.from_wire(envelope.code, body.message, body.details)
    assert type(arrived) is errors.ERRORS[code]
    assert (arrived.message, arrived.details) == ("said so", {"have": 3, "rank": "x"})


def test_an_error_code_of_a_newer_server_is_not_lost() -> None:
    """An unknown code is an internal error that still names it."""
    arrived = errors.from_wire("quota", "over it", {"limit": 3})
    assert type(arrived) is errors.Internal
    assert arrived.message == "quota: over it"
    assert arrived.details == {"limit": 3}


def test_codes_are_unique_and_the_tree_has_no_strays() -> None:
    """Every leaf of the tree has a code of its own."""
    leaves = [cls for cls in descendants(KVError) if not cls.__subclasses__()]
    assert {cls.code for cls in leaves} == set(errors.ERRORS)
    assert len(leaves) == len(errors.ERRORS)


def descendants(cls: type[KVError]) -> list[type[KVError]]:
    """List every class beneath one, of our own modules."""
    children = [c for c in cls.__subclasses__() if c.__module__.startswith("kvcore")]
    return children + [one for child in children for one in descendants(child)]


@given(st.binary(max_size=60))
def test_a_garbled_reply_is_a_bad_request(frame: bytes) -> None:
    """The client gets one error class for whatever is no reply."""
    try:
        decode_reply(frame)
    except BadRequest:
        return
