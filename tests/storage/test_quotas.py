"""Quotas and the watermark: whose chunks are evicted, and when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcore.config import L1Config
from kvcore.errors import SetupError
from kvcore.keys import ChunkHash, ExtraKey, SessionKey, cache_salt
from kvcore.layout import Fingerprint
from kvcore.option_structs import ByteSize
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import PartName
from kvcore.storage.eviction import POLICIES
from kvcore.storage.l1 import L1, PartId
from kvcore.storage.quotas import Quotas, make_order

PAGE = 64
PART = PartId(0)
LIMITS = {"salt:a": 3 * PAGE, "model:m": 4 * PAGE}


def salt_of(owner: SessionKey) -> str | None:
    """Return a session whose engine id is its salt."""
    return owner.engine_id or None


def prompt(name: str, length: int) -> list[ChunkHash]:
    """Return the hashes of a prompt's chunks."""
    return [ChunkHash(f"{name}{i}".encode()) for i in range(length)]


class Shelf:
    """An L1 with room for ten chunks of a page each."""

    def __init__(self, policy: str, limits: dict[str, int], watermark: float) -> None:
        self.arena = Arena(10 * PAGE, PAGE)
        self.order = make_order(policy, limits, salt_of)
        self.l1 = L1(self.arena, self.order, watermark=watermark)

    def store(
        self,
        name: str,
        length: int,
        *,
        salt: str = "",
        model: str = "other",
        by: int = 1,
    ) -> int:
        """Store a prompt, `by` chunks at a time; return the number of stored chunks."""
        part = PartName(model, 1, 0, 0, Fingerprint("f"))
        hashes, owner, stored = prompt(name, length), SessionKey(salt, name), 0
        for first in range(0, length, by):
            got = self.l1.reserve(
                hashes[first : first + by],
                PART,
                PAGE,
                name=part,
                owner=owner,
                prefix=hashes[:first],
            )
            stored += self.l1.commit(got.reservations)
            self.l1.check()
        self.l1.touch(hashes)
        return stored

    def has(self, name: str) -> int:
        """Return the number of a prompt's chunks in L1."""
        return sum(found is not None for found in self.l1.peek(prompt(name, 10)))

    def used(self) -> dict[str, int]:
        """Return the use of each account, in chunks."""
        assert isinstance(self.order, Quotas)
        return {q.space: q.used_bytes // PAGE for q in self.order.status()}


@pytest.fixture(params=sorted(POLICIES))
def shelf(request: pytest.FixtureRequest) -> Iterator[Shelf]:
    """One of each policy, with quotas."""
    shelf = Shelf(request.param, LIMITS, 1.0)
    yield shelf
    shelf.arena.close()


def test_room_that_nobody_needs_is_anyones(shelf: Shelf) -> None:
    """An account may exceed its quota while there is room."""
    assert shelf.store("x", 6, salt="a") == 6
    assert shelf.used() == {"salt:a": 6, "model:m": 0}


@pytest.mark.parametrize("by", [1, 8])
def test_what_is_over_goes_first(shelf: Shelf, by: int) -> None:
    """Stores evict from an account over its quota first, down to the quota."""
    shelf.store("old", 3)
    shelf.store("x", 6, salt="a")
    assert shelf.store("new", 4, by=by) == 4
    assert (shelf.has("old"), shelf.has("x"), shelf.has("new")) == (3, 3, 4)


@pytest.mark.parametrize("by", [1, 3])
def test_a_space_at_its_quota_pays_itself(shelf: Shelf, by: int) -> None:
    """A store beyond the quota evicts the account's own chunks."""
    shelf.store("old", 7)
    shelf.store("x", 3, salt="a")
    assert shelf.store("y", 3, salt="a", by=by) == 3
    assert (shelf.has("old"), shelf.has("x"), shelf.has("y")) == (7, 0, 3)


def test_a_space_over_its_quota_pays_before_one_further_over(shelf: Shelf) -> None:
    """Its stores evict its own chunks, even if another account has more."""
    shelf.store("x", 6, model="m")
    shelf.store("y", 4, salt="a")
    assert shelf.store("z", 1, salt="a") == 1
    assert shelf.used() == {"salt:a": 4, "model:m": 6}


def test_below_its_quota_a_space_is_like_any_other(shelf: Shelf) -> None:
    """Its stores evict by the policy alone, from all chunks."""
    shelf.store("old", 10)
    assert shelf.store("x", 3, salt="a") == 3
    assert (shelf.has("old"), shelf.used()["salt:a"]) == (7, 3)


def test_a_salts_chunks_are_not_on_the_models_account(shelf: Shelf) -> None:
    """A chunk counts once: for its salt if that has a quota, else for its model."""
    shelf.store("x", 2, salt="a", model="m")
    shelf.store("y", 2, salt="b", model="m")
    assert shelf.used() == {"salt:a": 2, "model:m": 2}
    shelf.l1.drop(shelf.l1.hashes())
    assert shelf.used() == {"salt:a": 0, "model:m": 0}


def test_held_chunks_of_a_space_over_its_quota_stay(shelf: Shelf) -> None:
    """If its own chunks are held, others are evicted; skipped ones can go later."""
    shelf.store("old", 4)
    shelf.store("x", 6, salt="a")
    held = shelf.l1.acquire_leading(prompt("x", 6), 1)
    assert shelf.store("new", 2) == 2
    assert (shelf.has("x"), shelf.has("old")) == (6, 2)
    shelf.l1.release(held)
    assert shelf.store("newer", 3) == 3
    assert (shelf.has("x"), shelf.has("old")) == (3, 2)
    assert shelf.store("whole", 10) == 10
    shelf.l1.check()


def test_what_is_aborted_is_not_counted(shelf: Shelf) -> None:
    """A part counts from its reservation until it is aborted or removed."""
    part = PartName("m", 1, 0, 0, Fingerprint("f"))
    got = shelf.l1.reserve(prompt("x", 3), PART, PAGE, name=part)
    assert shelf.used()["model:m"] == 3
    shelf.l1.abort(got.reservations)
    assert shelf.used()["model:m"] == 0


def test_what_is_coming_begins_with_who_is_over(shelf: Shelf) -> None:
    """`coming` returns the chunks of accounts over quota first."""
    shelf.store("old", 4)
    shelf.store("x", 5, salt="a")
    coming = shelf.l1.coming(3)
    assert {chunk.hash for chunk in coming} <= set(prompt("x", 5))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_store_beyond_the_watermark_evicts_down_to_it(policy: str) -> None:
    """Other chunks are evicted down to the watermark; the request's own stay."""
    shelf = Shelf(policy, {}, 0.8)
    shelf.store("old", 8)
    assert shelf.has("old") == 8
    assert shelf.store("x", 2) == 2
    assert (shelf.has("old"), shelf.has("x")) == (6, 2)
    assert shelf.store("long", 10, by=5) == 10
    assert shelf.has("long") == 10
    shelf.store("next", 1)
    assert shelf.l1.stats().num_chunks == 8
    shelf.l1.check()
    shelf.arena.close()


def test_a_salt_is_read_from_the_extra_material() -> None:
    """The salt is the material of that form at the first token."""
    salted = ExtraKey(0, b'["salt", "tenant-7"]')
    lora = ExtraKey(0, b'["lora", "x", "y"]')
    assert cache_salt((lora, salted)) == "tenant-7"
    for other in (ExtraKey(4, salted.material), ExtraKey(0, b'["salt",')):
        assert cache_salt((lora, other)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quotas", {"tenant": ByteSize(1)}),
        ("quotas", {"salt:": ByteSize(1)}),
        ("watermark", 0.0),
        ("watermark", 1.5),
    ],
)
def test_wrong_settings_are_refused(key: str, value: object) -> None:
    """The error names the key."""
    with pytest.raises(SetupError, match=rf"(l1|L1Config)\.{key} = "):
        L1Config(**{key: value})  # type: ignore[arg-type]
