"""URLs of tiers: what opens, what is refused and how, and that no secret is shown."""

from __future__ import annotations

import sys
from urllib.parse import SplitResult

import pytest

from kvcore.errors import BadRequest, SetupError
from kvcore.shm import Segment
from kvcore.tiers.tier import PartKey, StoreResult
from kvcore.tiers.tier_url import TierOptions, open_tier, register_tier
from tests.tiers.fake_store import FakeBackend
from tests.tiers.part_factory import PAGE, load_checked, store_item, view


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "must read KIND"),
        ("/var/kv", "must read KIND"),
        ("ftp://host/kv", "no such kind; known: file, valkey"),
        ("file://relative/kv", "must read file:///DIRECTORY"),
        ("file:///", "must read file:///DIRECTORY"),
        ("file:///kv?max=lots", "max=lots"),
        ("file:///kv?size=1GiB", "unknown option size; known: name, timeout"),
        ("file:///kv?timeout=0", "seconds, more than 0"),
        ("file:///kv?timeout=soon", "timeout=soon"),
        ("file:///kv?timeout=nan", "seconds, more than 0"),
        ("file:///kv?threads=0", "1 to 256"),
        ("file:///kv?threads=two", "threads=two"),
        ("valkey://", "must read valkey://HOST:PORT"),
        ("valkey://host:port", "[Pp]ort"),
        ("valkey://host/first", "'first' is not the number of a database"),
        ("valkey+unix://", "must read valkey\\+unix:///PATH"),
        ("valkeys://host?ca=/nowhere.pem", "TLS files"),
        ("valkeys://host?insecure=maybe", "true or false"),
    ],
)
def test_bad_urls_say_what_is_wrong(url: str, message: str) -> None:
    """The error names the URL and the option."""
    with pytest.raises(SetupError, match=message) as raised:
        open_tier(url)
    assert raised.value.message.startswith(f"tier {url}: ")


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [
        ("s3://bucket/prefix", "obstore", "kvctl[objects]"),
        ("mooncake://host:1", "mooncake", "kvctl[mooncake]"),
    ],
)
def test_a_missing_library_is_named(
    url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tier whose client is not installed says which extra brings it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError) as raised:
        open_tier(url)
    assert extra in raised.value.message


def test_names_and_options_apply_to_all() -> None:
    """A name comes from the URL's place unless given, and never with its secrets."""
    url = "valkey://me:secret@10.0.0.1:7000/2?prefix=a:&timeout=2.5&threads=1"
    tier = open_tier(url)
    try:
        assert tier.name == "valkey-10.0.0.1-7000-2"
        assert tier.timeout_s == 2.5
        shown = tier.health().url
        assert shown == "valkey://me@10.0.0.1:7000/2?prefix=a:&timeout=2.5&threads=1"
    finally:
        tier.close()
    named = open_tier("file:///nowhere/kv?name=disk")
    assert named.name == "disk"
    named.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a-b-c-d",
        f"{'0' * 64}-0-0",
        f"{'0' * 64}-00-0-{'f' * 16}",
        f"{'A' * 64}-0-0-x",
    ],
)
def test_only_names_of_parts_are_keys(text: str) -> None:
    """A part's name is read back exactly, and nothing else is."""
    with pytest.raises(BadRequest):
        PartKey.parse(text)
    name = f"{'0a' * 32}-3-1-{'f' * 16}"
    assert str(PartKey.parse(name)) == name


class DictOptions(TierOptions, frozen=True):
    """Options of a custom tier."""

    parts: int = 8
    """Parts that it has room for."""


def open_dict(url: SplitResult, options: DictOptions) -> FakeBackend:
    """Open `dict://PLACE`."""
    backend = FakeBackend(options.parts * PAGE)
    backend.alive.set()
    return backend


def test_a_custom_tier_is_opened_by_its_scheme(arena: Segment) -> None:
    """Its options are decoded and checked; common options, counters and URL apply."""
    register_tier("dict", open_dict, DictOptions)
    tier = open_tier("dict://here?parts=1&name=custom")
    first, second = (store_item(n, view(arena, n * PAGE, PAGE)) for n in range(2))
    assert tier.store([first]).result() == [StoreResult.DONE]
    assert tier.store([second]).result() == [StoreResult.FULL]
    assert load_checked(tier, first, view(arena, 32 << 20, PAGE))
    assert (tier.name, tier.health().counters.full) == ("custom", 1)
    tier.close()
    with pytest.raises(SetupError, match="unknown option size; known: name, timeout"):
        open_tier("dict://here?size=1")
    with pytest.raises(SetupError, match=r"parts=many: .*integer"):
        open_tier("dict://here?parts=many")
