"""The directory: bound, order of use, restarts, foreign files, file systems."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcore.shm import SHM_DIR, Segment
from kvcore.tiers import direct_io as direct
from kvcore.tiers import file_backend as file
from kvcore.tiers.direct_io import supports_direct_io
from kvcore.tiers.file_backend import FileIndex
from kvcore.tiers.tier import LoadOutcome, StoreResult, Tier
from tests.tiers.file_tier_parts import (
    LOAD_OFFSET,
    RECORD,
    contains,
    files_in,
    load,
    store,
)
from tests.tiers.part_factory import PAGE, key_of, load_checked, store_item, view
from tests.tiers.store_servers import wait_until


def test_the_least_recently_used_parts_make_room(
    open_at: Callable[..., Tier], arena: Segment, folder: Path
) -> None:
    """The bound holds on the disk, and a load counts as a use."""
    tier = open_at(3)
    store(tier, arena, 1, 2, 3)
    assert load(tier, arena, 1) is LoadOutcome.DONE
    assert store(tier, arena, 4) == [StoreResult.DONE]
    assert contains(tier, 1, 2, 3, 4) == [True, False, True, True]
    assert files_in(folder) == 3 * RECORD
    assert tier.health().counters.evicted == 1


def test_a_part_larger_than_the_bound_evicts_nothing(
    open_at: Callable[..., Tier], arena: Segment
) -> None:
    """The store returns FULL and the existing parts stay."""
    tier = open_at(2)
    store(tier, arena, 1, 2)
    assert tier.store([store_item(9, view(arena, 0, 3 * PAGE))]).result() == [
        StoreResult.FULL
    ]
    assert contains(tier, 1, 2) == [True, True]


def test_a_restart_finds_what_was_stored(
    open_at: Callable[..., Tier], arena: Segment
) -> None:
    """The next tier on the directory serves its parts, oldest written evicted first."""
    first = open_at(3)
    blob = store_item(2, view(arena, 2 * PAGE, PAGE))
    for number in (1, 2, 3):
        store(first, arena, number)
    first.close()
    second = open_at(3)
    assert contains(second, 1, 2, 3, 4) == [True, True, True, False]
    assert load_checked(second, blob, view(arena, LOAD_OFFSET, PAGE))
    assert store(second, arena, 3, 4) == [StoreResult.PRESENT, StoreResult.DONE]
    assert contains(second, 1, 3, 4) == [False, True, True]


def test_a_restart_with_less_room_removes_the_rest(
    open_at: Callable[..., Tier], arena: Segment, folder: Path
) -> None:
    """A smaller bound is held as soon as the directory is read."""
    first = open_at(4)
    store(first, arena, 1, 2, 3, 4)
    first.close()
    second = open_at(2)
    store(second, arena, 5)
    assert files_in(folder) == 2 * RECORD


def test_loads_do_not_wait_for_the_index(
    open_at: Callable[..., Tier], arena: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the directory is indexed, lookups read the disk and stores wait."""
    first = open_at(3)
    store(first, arena, 1)
    first.close()
    go_on = threading.Event()
    listing = file._parts_under

    def slow(directory: Path) -> Iterator[tuple[float, str, int]]:
        go_on.wait()
        return listing(directory)

    monkeypatch.setattr(file, "_parts_under", slow)
    second = open_at(3)
    assert contains(second, 1, 2) == [True, False]
    assert load(second, arena, 1) is LoadOutcome.DONE
    stored = second.store([store_item(2, view(arena, 0, PAGE))])
    assert not stored.done()
    go_on.set()
    assert stored.result() == [StoreResult.DONE]


def test_foreign_files_are_left_alone_and_leftovers_removed(
    open_at: Callable[..., Tier], arena: Segment, folder: Path
) -> None:
    """Incomplete writes are removed; foreign files stay and are not parts."""
    (folder / "incoming").mkdir(parents=True)
    (folder / "incoming" / "1").write_bytes(b"half")
    (folder / "00").mkdir()
    (folder / "00" / "notes").write_text("mine")
    tier = open_at(2)
    store(tier, arena, 1, 2)
    assert not (folder / "incoming" / "1").exists()
    assert (folder / "00" / "notes").exists()
    assert contains(tier, 1, 2) == [True, True]


def test_a_directory_serves_one_server(
    open_at: Callable[..., Tier], arena: Segment
) -> None:
    """A second tier is down, with the reason, until the first has closed."""
    first, second = open_at(2), open_at(2)
    store(first, arena, 1)
    assert store(second, arena, 2) == [StoreResult.FAILED]
    assert "another server" in second.health().last_error
    first.close()
    wait_until(lambda: store(second, arena, 2) == [StoreResult.DONE], "the lock")
    assert contains(second, 1) == [True]


def test_without_direct_io_it_works_as_well(
    open_at: Callable[..., Tier], arena: Segment, tmp_path: Path
) -> None:
    """A file system that knows no O_DIRECT (or a part that suits none) is buffered."""
    place = SHM_DIR / f"kvtest-dir-{os.getpid()}"
    place.mkdir()
    try:
        assert supports_direct_io(place) in (True, False)  # Newer tmpfs has it.
        tier = open_at(9, place)
        blob = store_item(1, view(arena, 0, PAGE))
        assert tier.store([blob]).result() == [StoreResult.DONE]
        assert load_checked(tier, blob, view(arena, LOAD_OFFSET, PAGE))
    finally:
        tier.close()
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        place.rmdir()


def test_large_parts_move_in_several_calls(
    open_at: Callable[..., Tier], arena: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More bytes or extents than one call takes come back whole."""
    monkeypatch.setattr(direct, "_MAX_TRANSFER_BYTES", 3 * 4096)
    monkeypatch.setattr(direct, "_MAX_VECTORS", 2)
    tier = open_at(99)
    pieces = [view(arena, n * PAGE, 8192 + 4096 * (n % 2)) for n in range(7)]
    blob = store_item(1, *pieces, view(arena, 8 * PAGE, 5001))
    assert tier.store([blob]).result() == [StoreResult.DONE]
    assert load_checked(
        tier, blob, view(arena, LOAD_OFFSET, sum(map(len, blob.buffers)))
    )


def test_claims_count_against_the_bound() -> None:
    """Files being written leave no room for others, and are not evicted."""
    index = FileIndex(10)
    assert index.reserve(6) == ()
    assert index.reserve(6) is None
    index.add("a", 6)
    assert index.reserve(6) == ("a",)
    index.release(6)
    assert index.used_bytes == 0


@pytest.mark.parametrize("kind", ["link", "file", "elsewhere"])
def test_a_restart_knows_its_parts_whatever_lies_beside(
    open_at: Callable[..., Tier], arena: Segment, folder: Path, kind: str
) -> None:
    """A foreign entry hides no part and is not counted; the size limit holds."""
    first = open_at(3)
    store(first, arena, 1, 2, 3)
    first.close()
    stranger = str(key_of(9))
    folder_of = {"link": stranger[:2], "file": "", "elsewhere": "ff"}[kind]
    place = folder / folder_of / ("fe" if kind == "file" else stranger)
    place.parent.mkdir(exist_ok=True)
    if kind == "link":
        place.symlink_to("nowhere")
    else:
        place.write_bytes(b"mine")
    second = open_at(3)
    assert store(second, arena, 4) == [StoreResult.DONE]
    assert sum(contains(second, 1, 2, 3)) == 2
    assert contains(second, 4, 9) == [True, False]
    assert second.health().counters.evicted == 1


def test_what_was_removed_while_files_were_listed_stays_removed() -> None:
    """A part that turned out wrong meanwhile can be stored again."""
    index = FileIndex(10)
    index.clear()
    index.remove("a")
    index.add_old([("a", 3), ("b", 3)])
    assert ("a" in index, "b" in index, index.used_bytes) == (False, True, 3)
    index.clear()
    index.add_old([("a", 3)])
    assert "a" in index
