"""Document journal: kept, erased and torn records, full disks, locked files."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from kvcore.blend.document_index import SLOT_BYTES, DocumentChunk, DocumentJournal
from kvcore.errors import SetupError
from kvcore.keys import ChunkHash

CHUNK = 16


def entry(number: int) -> DocumentChunk:
    """Make an entry."""
    return DocumentChunk(
        ChunkHash(bytes([number] * 32)), number << 50, bytes([number + 1] * 32), number
    )


def read(kept: DocumentJournal) -> set[tuple[ChunkHash, int, bytes, int]]:
    """The fields that are kept."""
    return {(e.hash, e.rolling_hash, e.digest, e.start) for e in kept.read()}


def filled(path: Path, count: int) -> list[DocumentChunk]:
    """Write entries to a journal."""
    kept = DocumentJournal(path, CHUNK)
    entries = [entry(number) for number in range(count)]
    for one in entries:
        kept.write(one)
    kept.close()
    return entries


def as_set(entries: list[DocumentChunk]) -> set[tuple[ChunkHash, int, bytes, int]]:
    """The entries that `read` yields."""
    return {(e.hash, e.rolling_hash, e.digest, e.start) for e in entries}


def test_entries_and_base_are_read_again(tmp_path: Path) -> None:
    """Entries and base are kept for a server with the same chunk size."""
    path = tmp_path / "kept"
    entries = filled(path, 3)
    first = DocumentJournal(path, CHUNK)
    assert read(first) == as_set(entries)
    base = first.base
    first.close()
    again = DocumentJournal(path, CHUNK)
    assert again.base == base
    again.close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_another_chunk_size_begins_anew(tmp_path: Path) -> None:
    """A server with another chunk size uses neither entries nor base."""
    path = tmp_path / "kept"
    filled(path, 3)
    before = DocumentJournal(path, CHUNK)
    base = before.base
    before.close()
    other = DocumentJournal(path, 2 * CHUNK)
    assert read(other) == set()
    assert other.base != base
    other.close()


@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_a_damaged_record_is_left_out(tmp_path: Path, damaged: int) -> None:
    """A flipped bit loses one entry; in the header it loses all."""
    path = tmp_path / "kept"
    entries = filled(path, 3)
    data = bytearray(path.read_bytes())
    data[damaged * SLOT_BYTES + 9] ^= 4
    path.write_bytes(data)
    kept = DocumentJournal(path, CHUNK)
    left = [e for n, e in enumerate(entries, 1) if damaged not in (0, n)]
    assert read(kept) == as_set(left)
    kept.close()


def test_a_file_cut_short_keeps_whole_records(tmp_path: Path) -> None:
    """A truncated last record is skipped."""
    path = tmp_path / "kept"
    entries = filled(path, 3)
    os.truncate(path, 4 * SLOT_BYTES - 1)
    kept = DocumentJournal(path, CHUNK)
    assert read(kept) == as_set(entries[:2])
    kept.close()


def test_slots_are_used_again(tmp_path: Path) -> None:
    """The file's length is the maximum number of entries, also across restarts."""
    path = tmp_path / "kept"
    entries = filled(path, 4)
    size = path.stat().st_size
    kept = DocumentJournal(path, CHUNK)
    found = list(kept.read())
    for one in found[:3]:
        kept.blank(one)
    for number in range(10, 12):
        kept.write(entry(number))
    kept.close()
    again = DocumentJournal(path, CHUNK)
    assert read(again) == as_set([entries[3], entry(10), entry(11)])
    again.write(entry(12))
    assert path.stat().st_size == size
    again.close()


def test_a_file_has_one_server(tmp_path: Path) -> None:
    """The second server is refused until the first has closed the file."""
    path = tmp_path / "kept"
    first = DocumentJournal(path, CHUNK)
    with pytest.raises(SetupError, match=r"blend.keep = .*kept: another server"):
        DocumentJournal(path, CHUNK)
    first.close()
    DocumentJournal(path, CHUNK).close()


def test_a_path_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """The error names the option and the reason."""
    with pytest.raises(SetupError, match=r"blend.keep = .*: No such file"):
        DocumentJournal(tmp_path / "missing" / "kept", CHUNK)


def test_a_full_disk_ends_the_keeping_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One error is logged; the index works without the file; old records remain."""
    path = tmp_path / "kept"
    entries = filled(path, 2)
    kept = DocumentJournal(path, CHUNK)
    assert len(read(kept)) == 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        for number in range(3, 6):
            kept.write(entry(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept.close()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    again = DocumentJournal(path, CHUNK)
    assert read(again) == as_set(entries)
    again.close()
