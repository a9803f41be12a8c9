"""File tier on disks that are full, faulty, removed or shared."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcore.shm import Segment
from kvcore.tiers import file_backend as file
from kvcore.tiers.tier import LoadItem, LoadOutcome, StoreResult, Tier
from kvcore.tiers.tier_url import open_tier
from tests.tiers.file_tier_parts import (
    LOAD_OFFSET,
    RECORD,
    contains,
    files_in,
    load,
    store,
)
from tests.tiers.part_factory import PAGE, key_of, store_item, view
from tests.tiers.store_servers import wait_until


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_full_and_gives_back(
    open_at: Callable[..., Tier],
    arena: Segment,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """No room on the disk is FULL, leaves nothing behind and frees an old part."""
    tier = open_at(9)
    store(tier, arena, 1, 2)

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", full)
    assert store(tier, arena, 3) == [StoreResult.FULL]
    assert list((folder / "incoming").iterdir()) == []
    assert contains(tier, 1, 2, 3) == [False, True, False]
    assert tier.health().up


def test_a_disk_that_fails_is_down(
    open_at: Callable[..., Tier], arena: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error fails the part, and the tier is asked again after its back-off."""
    tier = open_at(9)
    store(tier, arena, 1)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        assert load(tier, arena, 1) is LoadOutcome.FAILED
    assert "Input/output error" in tier.health().last_error
    wait_until(lambda: load(tier, arena, 1) is LoadOutcome.DONE, "back-off")


ODD = 1 << 24
"""A part in a folder of its own."""


def _put_file(part: Path) -> None:
    part.parent.write_text("mine")


def _put_folder(part: Path) -> None:
    part.mkdir(parents=True)
    (part / "notes").write_text("mine")


def _put_link_to_nowhere(part: Path) -> None:
    part.parent.symlink_to("nowhere")


def _put_link_to_itself(part: Path) -> None:
    part.parent.symlink_to(part.parent)


ODD_THINGS = [_put_file, _put_folder, _put_link_to_nowhere, _put_link_to_itself]


@pytest.mark.parametrize("put", ODD_THINGS)
@pytest.mark.parametrize("when", ["before", "listing", "serving", "known"])
def test_what_stands_in_a_parts_place_costs_that_part_alone(
    open_at: Callable[..., Tier],
    arena: Segment,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    put: Callable[[Path], None],
    when: str,
) -> None:
    """That part misses and cannot be stored; others work; it is logged once."""
    blob = store_item(ODD, view(arena, 0, PAGE))
    part = folder / str(blob.key)[:2] / str(blob.key)
    go_on = threading.Event()
    if when == "before":
        folder.mkdir()
        put(part)
    elif when == "listing":

        def slow(_: Path) -> Iterator[tuple[float, str, int]]:
            go_on.wait()
            return iter(())

        monkeypatch.setattr(file, "_parts_under", slow)
    tier = open_at(9)
    contains(tier, 1)
    if when == "known":
        assert tier.store([blob]).result() == [StoreResult.DONE]
        part.unlink()
        part.parent.rmdir()
    if when != "before":
        put(part)
    for _ in range(2):
        slot = LoadItem(blob.key, (view(arena, LOAD_OFFSET, PAGE),))
        [loaded] = tier.load([slot]).result()
        assert loaded.outcome in (LoadOutcome.MISSING, LoadOutcome.REJECTED)
        go_on.set()
        assert tier.store([blob]).result() == [StoreResult.FAILED]
        tier.delete([blob.key]).result()
        assert contains(tier, ODD) == [False]
    assert store(tier, arena, 1) == [StoreResult.DONE]
    assert load(tier, arena, 1) is LoadOutcome.DONE
    health = tier.health()
    assert (health.up, health.counters.failures) == (True, 0)
    assert caplog.text.count("parts are skipped") == 1
    assert health.used_bytes in (None, RECORD)


def test_a_folder_that_goes_is_a_tier_that_comes_back(
    open_at: Callable[..., Tier], arena: Segment, folder: Path
) -> None:
    """Old parts miss; the directory is created again and serves new parts."""
    tier = open_at(9)
    store(tier, arena, 1, 2)
    shutil.rmtree(folder)
    assert load(tier, arena, 1) is LoadOutcome.MISSING
    assert store(tier, arena, 3) == [StoreResult.FAILED]
    wait_until(lambda: store(tier, arena, 3) == [StoreResult.DONE], "the folder")
    assert contains(tier, 1, 2, 3) == [False, False, True]
    assert files_in(folder) == RECORD


def test_another_folder_in_its_place_is_noticed(
    open_at: Callable[..., Tier], arena: Segment, folder: Path
) -> None:
    """A probe detects the new directory and the next one opens it."""
    tier = open_at(9)
    store(tier, arena, 1)
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    (folder / ".lock").touch()

    def has_failed() -> bool:
        tier.probe()
        return tier.health().counters.failures > 0

    wait_until(has_failed, "the probe")
    assert "another directory" in tier.health().last_error
    wait_until(lambda: store(tier, arena, 2) == [StoreResult.DONE], "the folder")
    assert contains(tier, 1, 2) == [False, True]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_disk_that_takes_no_files_is_down_and_says_why(
    open_at: Callable[..., Tier],
    arena: Segment,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """Stores fail with the disk's error, and succeed after the back-off."""
    tier = open_at(9)
    store(tier, arena, 1)

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        assert store(tier, arena, 2) == [StoreResult.FAILED]
        assert os.strerror(number) in tier.health().last_error
    wait_until(lambda: store(tier, arena, 2) == [StoreResult.DONE], "back-off")
    assert contains(tier, 1, 2) == [True, True]


def test_a_folder_that_cannot_be_listed_hides_no_other(
    open_at: Callable[..., Tier],
    arena: Segment,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a restart its parts are not served, those of others are."""
    first = open_at(9)
    store(first, arena, 1, 2)
    first.store([store_item(ODD, view(arena, 0, PAGE))]).result()
    first.close()
    (folder / "incoming" / "odd").mkdir()
    listing = os.scandir

    def refuse(path: Path) -> os.ScandirIterator[str]:
        if path == folder / str(key_of(ODD))[:2]:
            raise PermissionError(errno.EACCES, "Permission denied")
        return listing(path)

    monkeypatch.setattr(file.os, "scandir", refuse)
    second = open_at(9)
    assert store(second, arena, 3) == [StoreResult.DONE]
    assert contains(second, 1, 2, 3, ODD) == [True, True, True, False]


def test_slow_directory_scan_does_not_delay_calls(
    folder: Path, arena: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a scan after a failure, loads fail at their deadline."""
    go_on = threading.Event()

    def slow(_: Path) -> Iterator[tuple[float, str, int]]:
        go_on.wait()
        return iter(())

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file, "_parts_under", slow)
    tier = open_tier(f"file://{folder}?retry=0.02&timeout=0.2")
    try:
        contains(tier, 1)
        place = folder / str(key_of(1))[:2] / str(key_of(1))
        place.parent.mkdir()
        place.write_bytes(bytes(RECORD))
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            assert load(tier, arena, 1) is LoadOutcome.FAILED

        def is_told() -> bool:
            slot = LoadItem(key_of(1), (view(arena, LOAD_OFFSET, PAGE),))
            assert tier.load([slot]).result(10)[0].outcome is LoadOutcome.FAILED
            return "still being read" in tier.health().last_error

        wait_until(is_told, "the deadline")
    finally:
        go_on.set()
        tier.close()
