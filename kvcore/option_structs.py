"""Option Structs: one declaration is the file key, the flag and the help.

`load` reads any Struct from a TOML file and `key.sub=value` overrides; `describe`
lists its options for help texts and documents.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import msgspec
from msgspec import NODEFAULT, inspect

from kvcore.errors import SetupError

UNITS = {
    "TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10,
    "TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class ByteSize(int):
    """A number of bytes, written `256MiB`; a bare number counts bytes."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a size; units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB in any case.

        Raises:
            ValueError: not a number and a known unit, or not a whole number of bytes.
        """
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a size such as 256MiB")
        units = {name.lower(): factor for name, factor in UNITS.items()}
        factor = units.get(match[2].lower() or "b")
        if factor is None:
            raise ValueError(f"{text!r}: the units of a size are {', '.join(UNITS)}")
        size = Fraction(match[1]) * factor
        if size.denominator > 1:
            raise ValueError(f"{text!r} is not a whole number of bytes")
        return cls(size)

    def __str__(self) -> str:
        """Return the exact size in a form that `parse` accepts."""
        for name, factor in UNITS.items():
            if self and self % factor == 0 and "i" in name:
                return f"{int(self) // factor}{name}"
        return f"{int(self)}B"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of option Structs.

    Construction validates every value: first its type and bounds, then `check`.

    Raises:
        SetupError: naming the field, its value and what it must be.
    """

    def __post_init__(self) -> None:
        kinds = _field_types(type(self))
        for name, value in msgspec.structs.asdict(self).items():
            try:
                msgspec.convert(value, kinds[name], dec_hook=decode_hook)
            except msgspec.ValidationError as error:
                require(False, f"{type(self).__name__}.{name}", value, str(error))
        self.check()

    def check(self) -> None:
        """Raise `SetupError` for values that their types allow but nothing can use."""


@cache
def _field_types(cls: type[Options]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(cls)}


def require(condition: bool, key: str, value: object, need: str) -> None:
    """Raise `SetupError` with the key, its value and what it must be, unless met."""
    if not condition:
        shown = repr(value) if isinstance(value, str) else value
        raise SetupError(f"{key} = {shown}: {need}", key=key)


# -- reading ----------------------------------------------------------------------

ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)


def load(
    cls: type[ConfigT],
    path: Path | None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    flag_names: Mapping[str, str] | None = None,
) -> ConfigT:
    """Read an option Struct from a TOML file, then overrides, then flags.

    An override is `key.sub=value`; its value is parsed as TOML, or is a string if that
    fails. `flags` holds values by dotted key; None means that the flag was not given.
    `flag_names` holds the names of flags that `flag_name` does not derive.

    Raises:
        SetupError: naming the file and line or the override, the key, and for an
            unknown key the nearest known one.
    """
    source = _Source.read(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise SetupError(f"--set {override}: must read key=value or key.sub=value")
        source.put(key.strip(), _toml_value(value.strip()), f"--set {override}")
    for key, given in (flags or {}).items():
        if given is not None:
            name = (flag_names or {}).get(key, flag_name(key))
            source.put(key, given, f"{name} {given}")
    _name_kinds(cls, source.data)
    keys = list(_walk([inspect.type_info(cls)], source.data, ""))
    for key, _, siblings in keys:
        if siblings:
            near = _nearest(key, siblings)
            raise SetupError(f"{source.place(key)}unknown key {key}; {near}")
    try:
        return msgspec.convert(source.data, cls, dec_hook=decode_hook)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
        key = where.removeprefix("$").removeprefix(".").removesuffix("`")
        shown = f"{key}: " if key else ""
        choices = next((found.choices for found in keys if found.name == key), [])
        known = f"; known are {', '.join(choices)}" if choices else ""
        raise SetupError(f"{source.place(key)}{shown}{message}{known}") from None
    except SetupError as error:
        key = str(error.details.get("key", ""))
        raise SetupError(f"{source.place(key)}{error.message}") from None


def flag_name(key: str) -> str:
    """Return the flag of an option: `l1.size` is `--l1-size`."""
    return "--" + key.replace(".", "-").replace("_", "-")


def _name_kinds(cls: type[msgspec.Struct], data: dict[str, Any]) -> None:
    """Set the kind of tables that name none to the kind of the field's default."""
    for field in msgspec.structs.fields(cls):
        table = data.get(field.encode_name)
        config = getattr(field.default, "__struct_config__", None)
        if isinstance(table, dict) and config is not None and config.tag is not None:
            table.setdefault(config.tag_field, config.tag)


def decode_hook(kind: type, value: object) -> object:
    """Decode a `ByteSize`; the `dec_hook` of msgspec.

    Raises:
        ValueError: not a size.
        NotImplementedError: another type.
    """
    if kind is ByteSize:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return ByteSize(value)
        if isinstance(value, str):
            return ByteSize.parse(value)
        raise ValueError(f"{value!r} is not a size such as 256MiB")
    raise NotImplementedError(f"no way to read {kind.__name__}")


def encode_hook(value: object) -> object:
    """Encode a `ByteSize` as an integer; the `enc_hook` of msgspec.

    Raises:
        NotImplementedError: another type.
    """
    if isinstance(value, ByteSize):
        return int(value)
    raise NotImplementedError(f"no way to write {type(value).__name__}")


@dataclass
class _Source:
    """Values, and the origin of each: a line of the file, an override or a flag."""

    name: str
    text: str
    data: dict[str, Any]
    given: dict[str, str]
    """Overrides and flags as the user wrote them, by key."""

    @classmethod
    def read(cls, path: Path | None) -> _Source:
        if path is None:
            return cls("", "", {}, {})
        try:
            text = path.read_text()
            return cls(str(path), text, tomllib.loads(text), {})
        except tomllib.TOMLDecodeError as error:
            message, _, where = str(error).partition(" (at ")
            found = re.match(r"line (\d+)", where)
            line = found[1] if found else len(text.splitlines())
            raise SetupError(f"{path}:{line}: {message}") from None
        except OSError as error:
            raise SetupError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SetupError(f"{path}: not UTF-8 text") from None

    def put(self, key: str, value: object, shown: str) -> None:
        """Set a value that the user wrote as `shown`."""
        names = key.split(".")
        if not all(names):
            raise SetupError(f"{shown}: must read key=value or key.sub=value")
        table = self.data
        for name in names[:-1]:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise SetupError(f"{shown}: {name} has no keys of its own")
        table[names[-1]] = value
        self.given[key] = shown

    def place(self, key: str) -> str:
        """Return the prefix of a message about this key."""
        for set_key, shown in self.given.items():
            nested = set_key.startswith(f"{key}.") or set_key.endswith(f".{key}")
            if nested or set_key in _stems(key):
                return f"{shown}: "
        if not self.name:
            return ""
        for stem in _stems(key):
            line = _line_of(self.text, stem)
            if line is not None:
                return f"{self.name}:{line}: "
        return f"{self.name}: "


def _toml_value(text: str) -> object:
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text


def _stems(key: str) -> list[str]:
    """Return a key without indices, and its parents: `a[0].b` -> `a.b`, `a`."""
    names = re.sub(r"\[[^\]]*\]", "", key).split(".")
    return [".".join(names[:size]) for size in range(len(names), 0, -1)]


def _line_of(text: str, key: str) -> int | None:
    """Return the number of the first line that sets a dotted key, else None."""
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[{1,2}\s*([^\]]+?)\s*\]", line)
        name = re.match(r"\s*([\w.\-\"' ]+?)\s*=", line)
        if header:
            table = found = header[1]
        elif name:
            found = f"{table}.{name[1]}"
        else:
            continue
        found = re.sub("[\"' ]", "", found)
        if found == key or found.endswith(f".{key}"):
            return number
    return None


class _Key(NamedTuple):
    """One key of the data."""

    name: str
    """With its parents and indices: `a.b[0].c`."""
    choices: list[str]
    """The words that it accepts; empty if it accepts others."""
    siblings: list[str]
    """If no Struct declares it, the keys that are declared in its place."""


def _walk(kinds: Sequence[inspect.Type], data: object, name: str) -> Iterator[_Key]:
    """Yield all keys of `data`, a value of one of these types, depth first."""
    kinds = [*_members(kinds)]
    literals = [kind for kind in kinds if isinstance(kind, inspect.LiteralType)]
    yield _Key(name, [str(word) for kind in literals for word in kind.values], [])
    if isinstance(data, dict):
        yield from _walk_table(kinds, data, name)
    elif isinstance(data, list):
        lists = (inspect.ListType, inspect.VarTupleType)
        items = [kind.item_type for kind in kinds if isinstance(kind, lists)]
        for index, item in enumerate(data):
            yield from _walk(items, item, f"{name}[{index}]")


def _walk_table(
    kinds: Sequence[inspect.Type], table: dict[str, Any], where: str
) -> Iterator[_Key]:
    """Yield the keys of a table; its tag chooses among the Structs of a union."""
    values = [kind.value_type for kind in kinds if isinstance(kind, inspect.DictType)]
    structs = [kind for kind in kinds if isinstance(kind, inspect.StructType)]
    chosen = [s for s in structs if table.get(s.tag_field or "", s.tag) == s.tag]
    fields = {field.encode_name: field.type for s in chosen for field in s.fields}
    for name, value in table.items():
        key = _join(where, name)
        tags = [str(struct.tag) for struct in structs if struct.tag_field == name]
        if tags:
            yield _Key(key, tags, [])
        elif name in fields or values:
            yield from _walk([fields[name]] if name in fields else values, value, key)
        else:
            yield _Key(key, [], list(fields))


def _members(kinds: Sequence[inspect.Type]) -> Iterator[inspect.Type]:
    """Yield these types, with the members of unions in place of the unions."""
    for kind in kinds:
        if isinstance(kind, inspect.Metadata):
            yield from _members([kind.type])
        elif isinstance(kind, inspect.UnionType):
            yield from _members(kind.types)
        else:
            yield kind


def _nearest(key: str, known: list[str]) -> str:
    where, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {_join(where, near[0])}?"
    return f"known are {', '.join(known)}"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


# -- listing ----------------------------------------------------------------------


class Option(msgspec.Struct, frozen=True):
    """One option, as shown in help texts and documents; all fields are text."""

    key: str
    type: str
    default: str
    description: str


def describe(cls: type[msgspec.Struct]) -> list[Option]:
    """Return the options of a Struct and of its nested Structs, in declared order."""
    return _options(inspect.type_info(cls), "")


def _options(kind: inspect.Type, where: str) -> list[Option]:
    if not isinstance(kind, inspect.StructType):
        return []
    found: list[Option] = []
    for field in kind.fields:
        key = _join(where, field.encode_name)
        inner, description = field.type, ""
        if isinstance(inner, inspect.Metadata):
            description = (inner.extra_json_schema or {}).get("description", "")
            inner = inner.type
        if isinstance(inner, inspect.StructType):
            found.extend(_options(inner, key))
        else:
            default = _default_text(field)
            found.append(Option(key, type_name(inner), default, description))
    return found


def _default_text(field: inspect.Field) -> str:
    if field.default_factory is not NODEFAULT:
        return str(field.default_factory())
    if field.default is NODEFAULT:
        return "required"
    return "none" if field.default is None else str(field.default)


_NAMES: Mapping[type[inspect.Type], str] = {
    inspect.IntType: "integer",
    inspect.FloatType: "number",
    inspect.StrType: "text",
    inspect.BoolType: "true or false",
    inspect.NoneType: "none",
    inspect.DictType: "table",
    inspect.StructType: "table",
    inspect.ListType: "list",
    inspect.VarTupleType: "list",
}


def type_name(kind: inspect.Type) -> str:
    """Return the name of a type as help texts and errors show it, such as `integer`."""
    if isinstance(kind, inspect.Metadata):
        return type_name(kind.type)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(type_name(member) for member in kind.types)
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(map(str, kind.values))
    if isinstance(kind, inspect.CustomType) and kind.cls is ByteSize:
        return "size"
    return _NAMES.get(type(kind), type(kind).__name__)
