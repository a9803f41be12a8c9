"""Option Structs: one declaration is the file key, the flag and the help.

`load` reads any Struct from a TOML file and `key.sub=value` overrides; `describe`
lists its options for help texts and documents.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

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
        """Read a size; units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB in any case.

        Raises:
            ValueError: no such number, no such unit, or not whole bytes.
        """
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a size such as 256MiB")
        units = {name.lower(): factor for name, factor in UNITS.items()}
        factor = units.get(match[2].lower() or "b")
        if factor is None:
            raise ValueError(f"{text!r}: the units of a size are {', '.join(UNITS)}")
        whole, _, decimals = match[1].partition(".")
        scaled = int(whole + decimals) * factor
        if scaled % 10 ** len(decimals):
            raise ValueError(f"{text!r} is not a whole number of bytes")
        return cls(scaled // 10 ** len(decimals))

    def __str__(self) -> str:
        """Render exactly, as `parse` reads it."""
        for name, factor in UNITS.items():
            if self and self % factor == 0 and "i" in name:
                return f"{int(self) // factor}{name}"
        return f"{int(self)}B"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of option Structs. Values of every subclass are checked by `check`."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `SetupError` for a value that its type allows but nothing can use."""


def require(condition: bool, key: str, value: object, need: str) -> None:
    """Raise `SetupError` naming the key, its value and what it needs to be."""
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

    An override reads `key.sub=value`; its value is read as TOML, and as a string where
    it is not TOML. Flags are values by dotted key; one that is None was not given. One
    whose flag is not named after its key has its name in `flag_names`.

    Raises:
        SetupError: naming the file and line or the override, the key, and for an
            unknown key the nearest known one.
    """
    text = _read(path) if path else ""
    source = _Source(str(path or ""), text)
    data = source.parse()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise SetupError(f"--set {override}: must read key=value or key.sub=value")
        source.put(data, key.strip(), _toml_value(value.strip()), f"--set {override}")
    for key, given in (flags or {}).items():
        if given is not None:
            name = (flag_names or {}).get(key, flag_name(key))
            source.put(data, key, given, f"{name} {given}")
    _name_kinds(cls, data)
    unknown = _unknown_key(inspect.type_info(cls), data, "")
    if unknown is not None:
        raise SetupError(f"{source.place(unknown.key)}{unknown.message}")
    try:
        return msgspec.convert(data, cls, dec_hook=decode_hook)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
        key = where.removeprefix("$").removeprefix(".").removesuffix("`")
        shown = f"{key}: " if key else ""
        choices = _choices([inspect.type_info(cls)], re.sub(r"\[[^\]]*\]", "", key))
        known = f"; known are {', '.join(choices)}" if choices else ""
        raise SetupError(f"{source.place(key)}{shown}{message}{known}") from None
    except SetupError as error:
        key = str(error.details.get("key", ""))
        raise SetupError(f"{source.place(key)}{error.message}") from None


def flag_name(key: str) -> str:
    """Return the flag of an option: `l1.size` is `--l1-size`."""
    return "--" + key.replace(".", "-").replace("_", "-")


def _name_kinds(cls: type[msgspec.Struct], data: dict[str, Any]) -> None:
    """Give a table that names no kind the kind of its default."""
    for field in msgspec.structs.fields(cls):
        table = data.get(field.encode_name)
        config = getattr(field.default, "__struct_config__", None)
        if isinstance(table, dict) and config is not None and config.tag is not None:
            table.setdefault(config.tag_field, config.tag)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise SetupError(f"{path}: {reason}") from None


def decode_hook(kind: type, value: object) -> object:
    """Read what msgspec does not know; pass it as `dec_hook`."""
    if kind is ByteSize:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return ByteSize(value)
        if isinstance(value, str):
            return ByteSize.parse(value)
        raise ValueError(f"{value!r} is not a size such as 256MiB")
    raise NotImplementedError(f"no way to read {kind.__name__}")


def encode_hook(value: object) -> object:
    """Write what msgspec does not know; pass it as `enc_hook`."""
    if isinstance(value, ByteSize):
        return int(value)
    raise NotImplementedError(f"no way to write {type(value).__name__}")


class _Source:
    """Where values came from, so that an error can say it."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.given: dict[str, str] = {}
        """Keys set beside the file, and how."""

    def parse(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            message, _, where = str(error).partition(" (at ")
            found = re.match(r"line (\d+)", where)
            line = found[1] if found else len(self.text.splitlines())
            raise SetupError(f"{self.name}:{line}: {message}") from None

    def put(self, data: dict[str, Any], key: str, value: object, shown: str) -> None:
        names = key.split(".")
        if not all(names):
            raise SetupError(f"{shown}: must read key=value or key.sub=value")
        table = data
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
    """`a.b[0].c` -> `a.b.c`, `a.b`, `a`: where the key or a table of it may stand."""
    names = re.sub(r"\[[^\]]*\]", "", key).split(".")
    return [".".join(names[:size]) for size in range(len(names), 0, -1)]


def _line_of(text: str, key: str) -> int | None:
    """Find the line that sets a dotted key; the first, when an array repeats it."""
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


class _Unknown(msgspec.Struct, frozen=True):
    key: str
    message: str


def _unknown_key(kind: inspect.Type, data: object, where: str) -> _Unknown | None:
    """Find the first key of `data` that no Struct declares, depth first."""
    if isinstance(kind, inspect.Metadata):
        return _unknown_key(kind.type, data, where)
    if isinstance(kind, inspect.UnionType):
        return _unknown_in_union(kind, data, where)
    if isinstance(kind, inspect.StructType) and isinstance(data, Mapping):
        return _unknown_in_struct(kind, data, where)
    if isinstance(kind, inspect.ListType | inspect.VarTupleType):
        items = data if isinstance(data, list) else []
        return _first(
            _unknown_key(kind.item_type, item, f"{where}[{index}]")
            for index, item in enumerate(items)
        )
    if isinstance(kind, inspect.DictType) and isinstance(data, Mapping):
        return _first(
            _unknown_key(kind.value_type, item, _join(where, str(name)))
            for name, item in data.items()
        )
    return None


def _unknown_in_union(
    kind: inspect.UnionType, data: object, where: str
) -> _Unknown | None:
    """Look only into the member that a tag names, or the one Struct there is."""
    structs = [t for t in kind.types if isinstance(t, inspect.StructType)]
    if isinstance(data, Mapping):
        for struct in structs:
            if len(structs) == 1 or data.get(struct.tag_field) == struct.tag:
                return _unknown_in_struct(struct, data, where)
        return None
    return _first(
        _unknown_key(member, data, where)
        for member in kind.types
        if not isinstance(member, inspect.StructType)
    )


def _unknown_in_struct(
    kind: inspect.StructType, data: Mapping[str, Any], where: str
) -> _Unknown | None:
    fields = {field.encode_name: field for field in kind.fields}
    for name, value in data.items():
        if name == kind.tag_field:
            continue
        if name not in fields:
            key = _join(where, name)
            return _Unknown(
                key, f"unknown key {key}{_nearest(where, name, list(fields))}"
            )
        found = _unknown_key(fields[name].type, value, _join(where, name))
        if found is not None:
            return found
    return None


def _choices(kinds: Sequence[inspect.Type], key: str) -> list[str]:
    """Return the words that a key without indices takes; none where it takes more."""
    name, _, rest = key.partition(".")
    inner: list[inspect.Type] = []
    words: list[str] = []
    for kind in _members(kinds):
        if isinstance(kind, inspect.LiteralType) and not key:
            words += map(str, kind.values)
        if isinstance(kind, inspect.StructType) and key:
            if name == kind.tag_field:
                words.append(str(kind.tag))
            inner += [f.type for f in kind.fields if f.encode_name == name]
    return words + (_choices(inner, rest) if inner else [])


def _members(kinds: Sequence[inspect.Type]) -> Iterator[inspect.Type]:
    """Yield what values of these types are, and the items of lists of them."""
    for kind in kinds:
        if isinstance(kind, inspect.Metadata):
            yield from _members([kind.type])
        elif isinstance(kind, inspect.UnionType):
            yield from _members(kind.types)
        elif isinstance(kind, inspect.ListType | inspect.VarTupleType):
            yield from _members([kind.item_type])
        else:
            yield kind


def _nearest(where: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {_join(where, near[0])}?"
    return f"; known are {', '.join(known)}"


def _first(found: Any) -> _Unknown | None:
    return next((item for item in found if item is not None), None)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


# -- listing ----------------------------------------------------------------------


class Option(msgspec.Struct, frozen=True):
    """One option, as help texts and documents show it."""

    key: str
    type: str
    default: str
    description: str


def describe(cls: type[msgspec.Struct]) -> list[Option]:
    """List the options of a Struct and of the Structs in it, in their order."""
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
    """Name a type as the user of a TOML file knows it."""
    if isinstance(kind, inspect.Metadata):
        return type_name(kind.type)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(type_name(member) for member in kind.types)
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(map(str, kind.values))
    if isinstance(kind, inspect.CustomType) and kind.cls is ByteSize:
        return "size"
    return _NAMES.get(type(kind), type(kind).__name__)
