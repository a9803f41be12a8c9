"""Options: sizes, files, overrides, and error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from kvcore.config import BlendConfig, L1Config, ServerConfig
from kvcore.errors import SetupError
from kvcore.option_structs import (
    ByteSize,
    Options,
    decode_hook,
    describe,
    encode_hook,
    flag_name,
    load,
)


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes a file of options."""

    def write(text: str) -> Path:
        path = tmp_path / "server.toml"
        path.write_text(text)
        return path

    return write


class Left(Options, frozen=True, tag="left", tag_field="kind"):
    """One member of a union."""

    depth: int = 1


class Right(Options, frozen=True, tag="right", tag_field="kind"):
    """The other member."""

    height: int = 1


class Nested(Options, frozen=True):
    """Options with all kinds of fields that a scenario has."""

    name: str
    side: Left | Right = Left()
    sides: tuple[Left, ...] = ()
    by_name: dict[str, Left] = {}
    maybe: Annotated[Left | None, Meta(description="or not")] = None


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("1kB", 1000),
        ("3 MB", 3_000_000),
        ("2GB", 2_000_000_000),
        ("64KiB", 65_536),
        ("256mib", 256 << 20),
        ("1.5GiB", 3 << 29),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes_are_read_with_their_units(text: str, num_bytes: int) -> None:
    """A size is a number and a unit; without a unit, bytes."""
    assert ByteSize.parse(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1XiB", "1.5", "1e3", "0.3B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """A missing number, an unknown unit and half a byte are refused."""
    with pytest.raises(ValueError, match=r"size|whole number|units"):
        ByteSize.parse(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_size_reads_what_it_writes(num_bytes: int) -> None:
    """A rendered size parses to the same number."""
    assert ByteSize.parse(str(ByteSize(num_bytes))) == num_bytes


def test_defaults_need_no_file() -> None:
    """Without a file and overrides, all options have their defaults."""
    config = load(ServerConfig, None)
    assert config == ServerConfig()
    assert config.address == "tcp://127.0.0.1:5555"
    assert config.l1.size == 1 << 30


def test_flags_win_over_overrides_and_overrides_over_the_file(write) -> None:
    """Flags override `--set`, which overrides the file."""
    path = write('chunk_size = 1\nlog_level = "debug"\n[l1]\nsize = "1MiB"\n')
    overrides = ("chunk_size=2", "l1.size=2MiB")
    config = load(ServerConfig, path, overrides, {"chunk_size": 3, "l1.page": None})
    assert (config.chunk_size, config.l1.size) == (3, 2 << 20)
    assert config.log_level == "debug"


@pytest.mark.parametrize(
    ("override", "known"),
    [
        ("device=gpu", "auto, cpu, cuda"),
        ("prefetch.deadline_s=soon", None),
    ],
)
def test_a_wrong_word_is_told_beside_the_right_ones(
    override: str, known: str | None
) -> None:
    """The error lists the choices of an option that has some."""
    with pytest.raises(SetupError, match=f"^--set {override}: ") as told:
        load(ServerConfig, None, [override])
    assert told.value.message.partition("known are ")[2] == (known or "")


@pytest.mark.parametrize("key", ["side", "maybe", "sides"])
def test_a_kind_that_is_none_is_told_beside_those_that_are(key: str) -> None:
    """The error lists the tags of a union at any depth."""
    table = "{kind='up'}" if key != "sides" else "[{kind='up'}]"
    with pytest.raises(
        SetupError, match=f"known are left{', right' * (key == 'side')}$"
    ):
        load(Nested, None, ["name=a", f"{key}={table}"])


def test_an_override_is_read_as_toml_and_else_as_text() -> None:
    """Numbers, quoted strings and bare words are accepted."""
    overrides = ("metrics_port=9000", "ready_file='a b'", "address=ipc:///run/kv")
    config = load(ServerConfig, None, overrides)
    assert config.metrics_port == 9000
    assert config.ready_file == "a b"
    assert config.address == "ipc:///run/kv"


def test_the_same_value_comes_back_from_json() -> None:
    """A configuration encoded in a result decodes to the same value."""
    encoded = msgspec.json.encode(ServerConfig(), enc_hook=encode_hook)
    decoded = msgspec.json.decode(encoded, type=ServerConfig, dec_hook=decode_hook)
    assert decoded == ServerConfig()
    assert isinstance(decoded.l1.size, ByteSize)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunk_size =", ":1: Invalid value"),
        ("\nchunk_size = 'x'", ":2: chunk_size: Expected `int`, got `str`"),
        ("[l1]\nsiz = 1", ":2: unknown key l1.siz; did you mean l1.size?"),
        ("[wires]\na = 1", ":1: unknown key wires; did you mean wire?"),
        ("[l1]\n\nsize = '1XiB'", ":3: l1.size: '1XiB': the units of a size are"),
        ("[l1]\npage = 1000", ":2: l1.page = 1000B: must be a power of two"),
        ("l1.size = true", ":1: l1.size: True is not a size"),
        ("zzz = 1", ":1: unknown key zzz; known are address, chunk_size"),
    ],
)
def test_an_error_names_the_file_the_line_and_the_key(
    write, text: str, message: str
) -> None:
    """The message begins with the file, the line and the key."""
    path = write(text)
    with pytest.raises(SetupError) as failed:
        load(ServerConfig, path)
    assert failed.value.message.startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chunk_size", "must read key=value"),
        ("=1", "must read key=value"),
        ("l1..size=1", "must read key=value"),
        ("l1.sise=1", "unknown key l1.sise; did you mean l1.size?"),
        ("l1=1", "l1: Expected `object`, got `int`"),
        ("chunk_size.a=1", "chunk_size: Expected `int`, got `object`"),
        ("chunk_size=0", "chunk_size: Expected `int` >= 1"),
        ("copy_threads=0", "copy_threads: Expected `int` >= 1"),
        ("address=localhost", "address = 'localhost': must be tcp://HOST:PORT"),
        ("address=tcp://a:70000", "must be tcp://HOST:PORT"),
        ("log_level=loud", "log_level: Invalid enum value 'loud'; known are debug, "),
        ("wire.heartbeat_s=0", "wire.heartbeat_s: Expected `float` >= 0.001"),
        ("wire.max_message=1kB", "wire.max_message = 1000B: at least 4KiB"),
        ("sessions.idle_s=1", "sessions.idle_s = 1.0: less than sessions.lease_s"),
        ("metrics_port=-1", "metrics_port: Expected `int` >= 0"),
        ("blend.keep=f", "blend.keep = 'f': needs l1.keep or a tier"),
        ("blend.max_tier_chunks=0", "blend.max_tier_chunks: Expected `int` >= 1"),
    ],
)
def test_an_error_names_the_override(override: str, message: str) -> None:
    """The message begins with the override and says what is invalid."""
    with pytest.raises(SetupError) as failed:
        load(ServerConfig, None, [override])
    assert failed.value.message.startswith(f"--set {override}: ")
    assert message in failed.value.message


def test_an_error_names_the_flag() -> None:
    """The message begins with the flag."""
    with pytest.raises(SetupError, match=r"^--l1-size 1XiB: l1\.size: "):
        load(ServerConfig, None, (), {"l1.size": "1XiB"})


def test_a_value_inside_a_scalar_cannot_be_set() -> None:
    """Two overrides that contradict each other are refused."""
    with pytest.raises(SetupError, match="l1 has no keys of its own"):
        load(ServerConfig, None, ["l1=1", "l1.size=1"])


def test_an_override_cannot_smuggle_in_another_key() -> None:
    """A line break in a value stays in the value."""
    config = load(ServerConfig, None, ["ready_file='a'\nchunk_size = 1"])
    assert config.chunk_size == ServerConfig().chunk_size


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file and a binary file are set-up errors."""
    with pytest.raises(SetupError, match=r"nope\.toml: No such file"):
        load(ServerConfig, tmp_path / "nope.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SetupError, match=r"binary\.toml: not UTF-8"):
        load(ServerConfig, tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("side={kind='right', hight=1}", "side.hight; did you mean side.height"),
        ("sides=[{depth=1}, {dept=1}]", "sides[1].dept; did you mean sides[1].depth"),
        ("by_name.a.dept=1", "by_name.a.dept; did you mean by_name.a.depth"),
        ("maybe.dept=1", "maybe.dept; did you mean maybe.depth"),
    ],
)
def test_unknown_keys_are_found_at_any_depth(override: str, key: str) -> None:
    """Unions, lists and tables are searched."""
    with pytest.raises(SetupError) as failed:
        load(Nested, None, ["name=x", override])
    assert f"unknown key {key}?" in failed.value.message


def test_a_union_is_read_by_its_tag() -> None:
    """The tag selects the member, whose options are then checked."""
    config = load(Nested, None, ["name=x", "side.kind=right", "side.height=3"])
    assert config.side == Right(height=3)


def test_a_missing_value_is_named() -> None:
    """The error names an option without a default."""
    with pytest.raises(SetupError, match="missing required field `name`"):
        load(Nested, None)


def test_every_option_of_the_server_is_described() -> None:
    """Each option has a description for help texts and documents."""
    options = describe(ServerConfig)
    assert [option.key for option in options if not option.description] == []
    size = next(option for option in options if option.key == "l1.size")
    assert (size.type, size.default) == ("size", "1GiB")
    assert flag_name(size.key) == "--l1-size"


def test_values_are_checked_without_a_file_too() -> None:
    """Constructing a configuration raises the same errors."""
    with pytest.raises(SetupError, match=r"l1\.size = 4KiB: less than a page"):
        L1Config(size=ByteSize(4096))
    with pytest.raises(SetupError, match=r"^L1Config\.watermark = 2: Expected"):
        L1Config(watermark=2)
    with pytest.raises(SetupError, match=r"^BlendConfig\.start = .*: Expected"):
        BlendConfig(start=((1 << 40,),))
