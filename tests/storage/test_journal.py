"""The journal of a kept arena: recovery from complete and torn files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvcore.errors import Internal, SetupError
from kvcore.extents import Checksum, Extent, buffers_of, checksum_of
from kvcore.keys import ChunkHash
from kvcore.layout import Fingerprint
from kvcore.storage import journal as journals
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import PartId, PartName
from kvcore.storage.eviction import LRU
from kvcore.storage.journal import JournalOpened, PartCommitted, PartFreed, read
from kvcore.storage.l1 import L1, Reservation
from kvcore.storage.recovery import recover, replay

PAGE = 4096
PARTS = (PartId(0), PartId(1))
NAMES = {
    part: PartName("model", 2, part, 0, Fingerprint("0123456789abcdef"))
    for part in PARTS
}


def key(number: int) -> ChunkHash:
    """Hash of a chunk."""
    return ChunkHash(number.to_bytes(32, "little"))


@contextmanager
def kept(path: Path, num_pages: int = 8) -> Iterator[Arena]:
    """Open the journal's arena, as one run of a server does."""
    name = f"kvtest-{os.getpid()}-{path.parent.name}"
    arena = Arena(num_pages * PAGE, PAGE, name, kept=True)
    arena.keep()
    try:
        yield arena
    finally:
        arena.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """The path of a journal; its arena is removed after the test."""
    yield tmp_path / "journal"
    Path(f"/dev/shm/kvtest-{os.getpid()}-{tmp_path.name}").unlink(missing_ok=True)


def start(path: Path, arena: Arena) -> L1:
    """Recover an L1 from an earlier run's journal."""
    recovered = recover(path, arena)
    l1 = L1(arena, LRU(), recovered.journal)
    l1.restore(recovered.parts)
    l1.check()
    return l1


def write(arena: Arena, reservations: list[Reservation], seed: int = 0) -> None:
    """Fill parts with distinct bytes; return their checksums."""
    for reservation in reservations:
        for extent in reservation.extents:
            where = slice(extent.offset, extent.offset + extent.length)
            arena.array[where] = reservation.chunk.hash[0] + reservation.part + seed
        buffers = buffers_of(arena.array.data, reservation.extents)
        reservation.checksum = checksum_of(buffers)


def store(l1: L1, arena: Arena, *numbers: int, part: PartId = PARTS[0]) -> None:
    """Store a part of a page and a half of each chunk."""
    hashes = [key(number) for number in numbers]
    got = l1.reserve(hashes, part, PAGE + PAGE // 2, name=NAMES[part])
    write(arena, got.reservations)
    l1.commit(got.reservations)


def there(l1: L1, *numbers: int, needs: int = 1) -> list[bool]:
    """Return the chunks that have all parts of a mask."""
    return [bool(l1.present([key(number)], needs)) for number in numbers]


def test_a_later_run_has_what_was_committed(path: Path) -> None:
    """Reserved, evicted and dropped parts are not recovered."""
    with kept(path, 12) as arena:
        l1 = start(path, arena)
        store(l1, arena, 1, 2, 3)
        store(l1, arena, 1, part=PARTS[1])
        l1.drop([key(2)])
        write(arena, l1.reserve([key(4)], PARTS[0], PAGE, name=NAMES[0]).reservations)
    with kept(path, 12) as arena:
        assert arena.was_found
        l1 = start(path, arena)
        assert there(l1, 1, 2, 3, 4) == [True, False, True, False]
        assert there(l1, 1, 3, needs=0b11) == [True, False]
        store(l1, arena, 5, 6)
        l1.check()
    with kept(path, 12) as arena:
        assert there(start(path, arena), 1, 3, 5, 6) == [True] * 4


def test_wrong_bytes_are_not_believed(path: Path) -> None:
    """A part whose checksum does not match is not recovered."""
    with kept(path) as arena:
        l1 = start(path, arena)
        store(l1, arena, 1, 2)
        [chunk] = l1.present([key(1)], 1)
        arena.array[chunk.parts[PARTS[0]].extents[0].offset + 7] ^= 1
    with kept(path) as arena:
        recovered = recover(path, arena)
        assert [part.chunk for part in recovered.parts] == [key(2)]
        assert recovered.num_lost == 1


def test_a_new_arena_has_nothing(path: Path) -> None:
    """A journal of a missing or resized arena recovers nothing."""
    with kept(path) as arena:
        store(start(path, arena), arena, 1)
    with kept(path, num_pages=9) as arena:
        assert not arena.was_found
        assert there(start(path, arena), 1) == [False]


def test_one_server_at_a_time(path: Path) -> None:
    """A second server is refused the arena of a running one."""
    with kept(path), pytest.raises(SetupError, match="who lives"), kept(path):
        pass


def test_every_torn_tail_leaves_what_came_before(path: Path) -> None:
    """A journal cut at any byte recovers all complete records."""
    with kept(path) as arena:
        store(start(path, arena), arena, 1, 2, 3)
        opened = JournalOpened(journals.VERSION, arena.total_bytes, PAGE)
    whole = path.read_bytes()
    seen = set()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        numbers = [r.chunk for r in read(path, opened) if isinstance(r, PartCommitted)]
        assert numbers == [key(3), key(2), key(1)][: len(numbers)]
        seen.add(len(numbers))
    assert seen == {0, 1, 2, 3}
    path.write_bytes(whole[:-40] + b"\xff" + whole[-39:])
    assert len(list(read(path, opened))) == 2


def test_a_later_owner_of_a_page_is_believed(path: Path) -> None:
    """If two chunks claim a page, the later one is recovered."""
    with kept(path) as arena:

        def part(number: int, *pages: int) -> PartCommitted:
            extents = tuple(Extent(page * PAGE, PAGE) for page in pages)
            size = len(pages) * PAGE
            return PartCommitted(
                key(number), PARTS[0], NAMES[0], extents, size, Checksum(b"")
            )

        records = [
            part(1, 0, 1),
            part(2, 2),
            part(3, 1),
            PartFreed(key(2), 1),
            part(4, 5),
        ]
        assert [p.chunk for p in replay(records, arena)] == [key(3), key(4)]
        assert list(replay([part(1, 7, 8)], arena)) == []


@pytest.mark.parametrize(
    ("number", "name", "extents"),
    [
        (-1, NAMES[1], (Extent(PAGE, PAGE),)),
        (1 << 40, NAMES[1], (Extent(PAGE, PAGE),)),
        (PARTS[1], NAMES[1], (Extent(PAGE, PAGE), Extent(PAGE, PAGE))),
    ],
    ids=["negative", "huge", "pages twice"],
)
def test_a_wrong_record_is_skipped(
    path: Path,
    caplog: pytest.LogCaptureFixture,
    number: int,
    name: PartName,
    extents: tuple[Extent, ...],
) -> None:
    """A valid record that no server writes is ignored at start."""
    with kept(path) as arena:
        l1 = start(path, arena)
        store(l1, arena, 1)
        record = PartCommitted(
            key(2),
            PartId(number),
            name,
            extents,
            sum(extent.length for extent in extents),
            checksum_of(buffers_of(arena.array.data, extents)),
        )
    with path.open("ab") as file:
        file.write(journals._frame(record))
    with kept(path) as arena:
        l1 = start(path, arena)
        assert there(l1, 1) == [True]
        assert l1.stats().num_chunks == 1
        store(l1, arena, 3)
    assert "skipped 1 wrong record" in caplog.text


def test_a_chunk_that_came_back_has_all_its_parts(path: Path) -> None:
    """A chunk stored again after eviction has only its new parts."""
    with kept(path) as arena:

        def part(number: PartId, page: int) -> PartCommitted:
            extents = (Extent(page * PAGE, PAGE),)
            name = NAMES[number]
            return PartCommitted(key(1), number, name, extents, PAGE, Checksum(b""))

        first, other = PARTS
        records = [part(first, 0), part(other, 1), PartFreed(key(1), 2)]
        back = [part(first, 1), part(other, 0)]
        assert list(replay([*records, *back], arena)) == back


def test_claims_that_overlap_are_refused(path: Path) -> None:
    """Overlapping extents are refused."""
    with kept(path) as arena:
        arena.claim([(Extent(PAGE, 2 * PAGE),), (Extent(5 * PAGE, 10),)])
        assert arena.used_bytes == 3 * PAGE
        with pytest.raises(Internal):
            arena.claim([(Extent(2 * PAGE, PAGE),)])


def test_compaction_keeps_what_is_live(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compaction shortens the journal and keeps all live parts."""
    whole = path.with_name("whole")
    for file, spare in ((whole, journals.SPARE_RECORDS), (path, 32)):
        monkeypatch.setattr(journals, "SPARE_RECORDS", spare)
        with kept(file) as arena:
            l1 = start(file, arena)
            for number in range(300):
                store(l1, arena, number)
            assert l1._journal is not None
            l1._journal.close()
            live = [number for number in range(300) if there(l1, number) == [True]]
    # How much shorter depends on when the compaction thread ran.
    assert path.stat().st_size < whole.stat().st_size
    with kept(path) as arena:
        again = start(path, arena)
        assert live == [number for number in range(300) if there(again, number)[0]]
        assert len(live) == 4


@pytest.mark.parametrize("spare", [journals.SPARE_RECORDS, 8])
@pytest.mark.parametrize("failing", ["open", "write", "replace"])
def test_a_disk_that_takes_no_more_ends_the_keeping(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: str,
    spare: int,
) -> None:
    """L1 continues, also during compaction, and the failure is logged.

    A later run recovers the parts that the journal still has and that are right.
    """
    monkeypatch.setattr(journals, "SPARE_RECORDS", spare)
    with kept(path) as arena, monkeypatch.context() as patch:
        l1 = start(path, arena)
        store(l1, arena, 1, 2)

        def full(*args: object) -> int:
            if failing == "write":
                os.pwrite(args[0], args[1][:9], os.lseek(args[0], 0, 1))  # type: ignore
            raise OSError(errno.ENOSPC, "No space left on device")

        place = Path if failing == "replace" else journals.os
        patch.setattr(place, failing, full)
        for number in range(3, 60):
            store(l1, arena, number)
            assert there(l1, number) == [True]
            assert l1._journal is not None
            compaction = l1._journal._compaction
            if compaction is not None:
                compaction.join()
        l1.check()
        assert not l1._journal._noted
        l1._journal.close()
    ended = failing == "write" or spare == 8
    assert caplog.text.count("keeping L1 in") == ended
    with kept(path) as arena:
        again = start(path, arena)
        store(again, arena, 60)
        assert there(again, 60) == [True]


def test_a_journal_that_is_none_is_refused_by_name(path: Path) -> None:
    """The error names a journal path that is a folder, before the start."""
    for found in (False, True):
        with kept(path) as arena:
            assert arena.was_found is found
            path.mkdir()
            with pytest.raises(SetupError, match=r"l1\.keep = .*: Is a directory"):
                start(path, arena)
            path.rmdir()
