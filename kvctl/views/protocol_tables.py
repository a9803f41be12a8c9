"""The protocol as tables and Markdown, derived from the declared requests."""

from __future__ import annotations

import inspect as pyinspect
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import NODEFAULT, inspect

from kvcore import protocol, wire
from kvcore.errors import ERRORS
from kvcore.wire import REQUESTS, RequestType
from kvctl.console import Table

FIELD_COLUMNS = ("field", "type", "default", "meaning")
REQUEST_COLUMNS = ("request", "lane", "fingerprint", "what it does")
ERROR_COLUMNS = ("code", "class", "meaning")

_PLAIN_TYPES = {
    inspect.BoolType: "bool",
    inspect.BytesType: "bytes",
    inspect.FloatType: "float",
    inspect.MemoryViewType: "bytes",
    inspect.NoneType: "none",
}


def build_tables() -> list[Table]:
    """Return tables of the requests, the fields of each, and the errors."""
    found = [Table("requests", REQUEST_COLUMNS, _request_rows())]
    for kind in REQUESTS.values():
        found.append(Table(kind.name, FIELD_COLUMNS, _field_rows(kind.request)))
        title = f"reply of {kind.name}: {kind.reply.__name__}"
        found.append(Table(title, FIELD_COLUMNS, _field_rows(kind.reply)))
    found.append(Table("error codes", ERROR_COLUMNS, _error_rows()))
    return [table for table in found if table.rows]


def render_markdown() -> str:
    """Return the page `docs/protocol.md`."""
    sections = [
        "# Protocol",
        "<!-- Written by `make docs` from kvcore/protocol.py; do not edit. -->",
        _doc(protocol),
        _doc(wire),
        f"This is protocol version {protocol.PROTOCOL_VERSION}.",
        "## Requests",
        _table(REQUEST_COLUMNS, _request_rows()),
        *(text for kind in REQUESTS.values() for text in _request_section(kind)),
        "## Values",
        "Structs that requests and replies hold. A struct marked as an array is "
        "encoded as an array of its fields in this order, any other as a map.",
        *(text for struct in _shared_structs() for text in _struct_section(struct)),
        "## Errors",
        "The envelope of the reply holds the code; the body holds `message` and, for "
        "some, `details`.",
        _table(ERROR_COLUMNS, _error_rows()),
    ]
    return "\n\n".join(sections) + "\n"


def _request_section(kind: RequestType) -> Iterator[str]:
    yield f"### {kind.name}"
    yield _doc(kind.request)
    rows = _field_rows(kind.request)
    yield _table(FIELD_COLUMNS, rows) if rows else "It has no fields."
    yield f"Reply `{kind.reply.__name__}`: {_doc(kind.reply)}"
    rows = _field_rows(kind.reply)
    if rows:
        yield _table(FIELD_COLUMNS, rows)


def _struct_section(struct: type[msgspec.Struct]) -> Iterator[str]:
    config = struct.__struct_config__
    yield f"### {struct.__name__}"
    if config.array_like:
        yield "An array."
    if config.tag is not None:
        yield f"Tagged: field `{config.tag_field}` is `{config.tag}`."
    yield _doc(struct)
    yield _table(FIELD_COLUMNS, _field_rows(struct))


def _shared_structs() -> list[type[msgspec.Struct]]:
    """Return the structs nested in requests and replies, in order of first use."""
    found: dict[type[msgspec.Struct], None] = {}
    for kind in REQUESTS.values():
        for outer in (kind.request, kind.reply):
            _collect(inspect.type_info(outer), found)
    outer_types = {t for kind in REQUESTS.values() for t in (kind.request, kind.reply)}
    return [struct for struct in found if struct not in outer_types]


def _collect(kind: inspect.Type, found: dict[type[msgspec.Struct], None]) -> None:
    if isinstance(kind, inspect.StructType) and kind.cls not in found:
        found[kind.cls] = None
        for field in kind.fields:
            _collect(field.type, found)
    for inner in _inner_types(kind):
        _collect(inner, found)


def _inner_types(kind: inspect.Type) -> Sequence[inspect.Type]:
    if isinstance(kind, inspect.Metadata):
        return (kind.type,)
    if isinstance(kind, inspect.UnionType):
        return kind.types
    if isinstance(kind, inspect.VarTupleType | inspect.ListType):
        return (kind.item_type,)
    if isinstance(kind, inspect.DictType):
        return (kind.key_type, kind.value_type)
    return ()


def _request_rows() -> tuple[tuple[str, ...], ...]:
    return tuple(
        (kind.name, kind.lane.value, kind.fingerprint, _summary(kind.request))
        for kind in REQUESTS.values()
    )


def _error_rows() -> tuple[tuple[str, ...], ...]:
    return tuple((code, cls.__name__, _summary(cls)) for code, cls in ERRORS.items())


def _field_rows(struct: type[Any]) -> tuple[tuple[str, ...], ...]:
    kind = inspect.type_info(struct)
    fields = kind.fields if isinstance(kind, inspect.StructType) else ()
    return tuple(
        (field.encode_name, _type_text(field.type), _default(field), _meaning(field))
        for field in fields
    )


def _meaning(field: inspect.Field) -> str:
    if not isinstance(field.type, inspect.Metadata):
        return ""
    return str((field.type.extra_json_schema or {}).get("description", ""))


def _default(field: inspect.Field) -> str:
    if field.required:
        return ""
    if field.default is NODEFAULT:
        return _literal(field.default_factory())
    return _literal(field.default)


def _literal(value: object) -> str:
    if isinstance(value, memoryview):
        return "empty"
    return msgspec.json.encode(value).decode()


def _type_text(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return _type_text(kind.type)
    if isinstance(kind, inspect.StructType):
        return kind.cls.__name__
    if isinstance(kind, inspect.UnionType):
        return " or ".join(map(_type_text, kind.types))
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(map(_literal, kind.values))
    if isinstance(kind, inspect.VarTupleType | inspect.ListType):
        return f"list of {_type_text(kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return f"map of {_type_text(kind.key_type)} to {_type_text(kind.value_type)}"
    if isinstance(kind, inspect.IntType):
        return f"int{_bounds(kind.ge, kind.le)}"
    if isinstance(kind, inspect.StrType):
        return "str" if kind.max_length is None else f"str up to {kind.max_length}"
    return _PLAIN_TYPES.get(type(kind), type(kind).__name__)


def _bounds(low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f" {low} to {high}"
    if low is not None:
        return f" from {low}"
    return "" if high is None else f" up to {high}"


def _doc(thing: object) -> str:
    return pyinspect.getdoc(thing) or ""


def _summary(thing: object) -> str:
    return _doc(thing).partition("\n")[0]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return Table("", tuple(columns), tuple(map(tuple, rows))).markdown()
