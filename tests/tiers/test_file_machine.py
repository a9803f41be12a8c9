"""The file tier beside a dict: stores, loads, faults, restarts on whatever is there.

Between two servers files are cut short, doubled, exchanged and put there by others.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcore.extents import checksum_of
from kvcore.keys import ChunkHash
from kvcore.tiers import file_backend as file
from kvcore.tiers.direct_io import PAGE, file_bytes
from kvcore.tiers.file_backend import FileBackend
from kvcore.tiers.thread_pool_tier import ThreadPoolTier
from kvcore.tiers.tier import LoadItem, LoadOutcome, PartKey, StoreItem, StoreResult
from tests.tiers.file_tier_parts import FILE_DAMAGES
from tests.tiers.part_factory import LAYOUT

SIZES = [1, PAGE, PAGE + 1, 3 * PAGE, 2 * PAGE - 1, PAGE, 2 * PAGE, 7]
"""Bytes of each part; a key has one size for ever."""
NUMBERS = range(len(SIZES))
ROOM = 4 * PAGE
RETRY_S = 1.0
WAIT_S = 5.0
"""For what should come at once."""

MEMORY = mmap.mmap(-1, (len(SIZES) + 1) * ROOM)
for _number in NUMBERS:
    _first = _number * ROOM
    MEMORY[_first : _first + ROOM] = bytes([_number + 1, *range(256)][:256]) * (
        ROOM // 256
    )

numbers = st.sampled_from(NUMBERS)


def key_of(number: int) -> PartKey:
    """Name a part; each has a folder of its own."""
    return PartKey(ChunkHash(bytes([0xA0 + number] * 32)), 0, 0, LAYOUT)


def buffers_at(first: int, size: int) -> tuple[memoryview, ...]:
    """Bytes of the memory, in two pieces where they fill pages."""
    view = memoryview(MEMORY)
    if size > PAGE:
        return view[first : first + PAGE], view[first + PAGE : first + size]
    return (view[first : first + size],)


def store_item(number: int) -> StoreItem:
    """A part with its checksum."""
    buffers = buffers_at(number * ROOM, SIZES[number])
    return StoreItem(key_of(number), buffers, checksum_of(buffers))


@dataclass
class Kept:
    """A file: its size, when it was written, and what a load says of it."""

    size: int
    stamp: int
    outcome: LoadOutcome = LoadOutcome.DONE
    is_right: bool = True


class FileMachine(RuleBasedStateMachine):
    """The model: what is on the disk, and what the tier knows, oldest use first."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvtest-"))
        self.disk: dict[int, Kept] = {}
        self.known: dict[int, int] = {}
        """With the sizes that count against the bound."""
        self.blocked: set[int] = set()
        """In whose folder's place stands a file."""
        self.now = 0.0
        self.stamp = 0
        self.full_until = 0.0
        self.scan_on: threading.Event | None = None
        self.was_known: list[int] = []

    @initialize(pages=st.sampled_from([4, 9, 16, 99]))
    def build(self, pages: int) -> None:
        """Open a directory that does not exist yet."""
        self.open(pages, held=False)

    def open(self, pages: int, *, held: bool) -> None:
        """Open the folder; `held`, the reading of it does not end for now."""
        self.max_bytes = pages * PAGE
        self.backend = FileBackend(self.folder / "tier", self.max_bytes)
        self.tier = ThreadPoolTier(
            "t",
            "file:",
            self.backend,
            timeout_s=20,
            retry_s=RETRY_S,
            threads=1,
            clock=lambda: self.now,
        )
        self.full_until = 0.0
        if not held:
            self.read_anew()
            return
        self.scan_on = go_on = threading.Event()
        read = threading.Event()
        listing = file._parts_under

        def slow(directory: Path) -> Iterator[tuple[float, str, int]]:
            files = [*listing(directory)]
            read.set()
            go_on.wait()
            return iter(files)

        with mock.patch.object(file, "_parts_under", slow):
            self.tier.contains([key_of(0)]).result()
            assert read.wait(WAIT_S)

    def read_anew(self) -> None:
        """Have the folder read; the oldest written go first from here on."""
        self.tier.contains([key_of(0)]).result()
        assert self.backend._scanned.wait(WAIT_S)
        self.model_read()

    def model_read(self) -> None:
        """What is on the disk is known, by the time of writing, within the bound."""
        by_age = sorted(self.disk, key=lambda number: self.disk[number].stamp)
        self.known = {number: self.disk[number].size for number in by_age}
        self.evict(self.max_bytes)

    def evict(self, bound: int) -> None:
        """Forget the least recently used."""
        while sum(self.known.values()) > bound and self.known:
            number = next(iter(self.known))
            del self.known[number]
            self.disk.pop(number, None)

    def path(self, number: int) -> Path:
        """Where a part's file is."""
        name = str(key_of(number))
        return self.folder / "tier" / name[:2] / name

    def date(self, number: int) -> int:
        """Give a file the next time."""
        self.stamp += 1
        os.utime(self.path(number), (self.stamp, self.stamp))
        return self.stamp

    # -- what a server does -----------------------------------------------------------

    @precondition(lambda self: not self.scan_on)
    @rule(some=st.lists(numbers, min_size=1, max_size=3, unique=True))
    def store(self, some: list[int]) -> None:
        """Parts are written that are not there; the least recently used make room."""
        is_full = self.now < self.full_until
        outcomes = self.tier.store([store_item(number) for number in some]).result()
        for number, stored in zip(some, outcomes, strict=True):
            size = file_bytes(SIZES[number])
            if is_full:
                assert stored is StoreResult.FULL
            elif number in self.known:
                assert stored is StoreResult.PRESENT
            elif size > self.max_bytes:
                assert stored is StoreResult.FULL
                self.full_until = self.now + RETRY_S
            elif number in self.blocked:
                assert stored is StoreResult.FAILED
                self.evict(self.max_bytes - size)
            else:
                assert stored is StoreResult.DONE
                self.evict(self.max_bytes - size)
                self.known[number] = size
                self.disk[number] = Kept(size, 0)
        for number in some:  # Now that none of them can go any more.
            if number in self.disk and not self.disk[number].stamp:
                self.disk[number].stamp = self.date(number)

    @rule(number=numbers)
    def load(self, number: int) -> None:
        """It brings the right bytes with their checksum, or says what is wrong."""
        room = buffers_at(len(SIZES) * ROOM, SIZES[number])
        loaded = self.tier.load([LoadItem(key_of(number), room)]).result()[0]
        kept = self.disk.get(number)
        assert loaded.outcome is (kept.outcome if kept else LoadOutcome.MISSING)
        if loaded.outcome is LoadOutcome.DONE:
            if number in self.known:
                self.known[number] = self.known.pop(number)
            right = store_item(number).checksum
            assert loaded.checksum == right
            assert (checksum_of(room) == right) == (kept is not None and kept.is_right)
        else:
            self.forget(number)

    @rule(some=st.lists(numbers, min_size=1, max_size=2))
    def delete(self, some: list[int]) -> None:
        """Delete parts, as after a checksum mismatch."""
        self.tier.delete([key_of(number) for number in some]).result()
        for number in some:
            self.forget(number)

    def forget(self, number: int) -> None:
        """A part is gone."""
        self.known.pop(number, None)
        self.disk.pop(number, None)

    # -- what disks do ----------------------------------------------------------------

    @precondition(lambda self: not self.scan_on)
    @rule(number=numbers)
    def fill_disk(self, number: int) -> None:
        """The disk is full before the bound is met: as much is given back."""
        size = file_bytes(SIZES[number])
        if self.now < self.full_until or number in self.known:
            return
        with self.failing("pwritev", errno.ENOSPC):
            stored = self.tier.store([store_item(number)]).result()
        assert stored == [StoreResult.FULL]
        self.full_until = self.now + RETRY_S
        if size <= self.max_bytes:
            self.evict(self.max_bytes - size)
            self.evict(max(0, sum(self.known.values()) - size))

    @precondition(lambda self: not self.scan_on and self.disk)
    @rule(data=st.data())
    def break_disk(self, data: st.DataObject) -> None:
        """A file cannot be read; the folder is opened and read anew."""
        whole = [n for n, k in self.disk.items() if k.outcome is LoadOutcome.DONE]
        if not whole:
            return
        number = data.draw(st.sampled_from(whole))
        room = buffers_at(len(SIZES) * ROOM, SIZES[number])
        with self.failing("preadv", errno.EIO):
            loaded = self.tier.load([LoadItem(key_of(number), room)]).result()[0]
        assert loaded.outcome is LoadOutcome.FAILED
        assert not self.tier.health().up
        assert self.tier.contains([key_of(number)]).result() == [False]
        self.now += RETRY_S
        self.read_anew()

    def failing(self, call: str, number: int) -> AbstractContextManager[object]:
        """Have a system call fail."""
        error = OSError(number, os.strerror(number))
        return mock.patch.object(os, call, side_effect=error)

    @precondition(lambda self: not self.scan_on and self.disk)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """Another process removes a file while the tier runs."""
        number = data.draw(st.sampled_from(sorted(self.disk)))
        self.path(number).unlink()
        del self.disk[number]

    @precondition(lambda self: not self.scan_on)
    @rule(number=numbers)
    def block(self, number: int) -> None:
        """A file stands where a part's folder should be; what was there is gone."""
        shutil.rmtree(self.path(number).parent, ignore_errors=True)
        self.path(number).parent.write_bytes(b"mine")
        self.blocked.add(number)
        self.disk.pop(number, None)

    @precondition(lambda self: self.blocked)
    @rule()
    def unblock(self) -> None:
        """It has gone."""
        self.path(self.blocked.pop()).parent.unlink()

    @rule()
    def wait(self) -> None:
        """A full tier is tried again."""
        self.now += RETRY_S

    # -- restarts ---------------------------------------------------------------------

    @precondition(lambda self: not self.scan_on)
    @rule(data=st.data(), pages=st.sampled_from([4, 9, 16, 99]), held=st.booleans())
    def restart(self, data: st.DataObject, pages: int, held: bool) -> None:
        """Restart the server; other processes change files in between."""
        self.tier.close()
        for number in data.draw(st.lists(numbers, max_size=2, unique=True)):
            self.spoil(number, data.draw(st.sampled_from(sorted(FILE_DAMAGES))))
        for foreign in data.draw(st.lists(st.sampled_from(FOREIGN), max_size=2)):
            place = self.folder / "tier" / foreign
            if place.parent.is_file():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if foreign in LINKS:
                place.unlink(missing_ok=True)
                place.symlink_to("nowhere")
            else:
                place.write_bytes(b"mine")
        self.open(pages, held=held)

    def spoil(self, number: int, how: str) -> None:
        """Change a file, or put one there."""
        path, kept = self.path(number), self.disk.get(number)
        if number in self.blocked:
            return
        if how == "put":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * file_bytes(SIZES[number]))
        elif kept is None:
            return
        else:
            FILE_DAMAGES[how](path)
        size = path.stat().st_size
        is_whole = how == "payload" and (
            kept is None or kept.outcome is LoadOutcome.DONE
        )
        outcome = LoadOutcome.DONE if is_whole else LoadOutcome.REJECTED
        self.disk[number] = Kept(size, self.date(number), outcome, is_right=False)

    @precondition(lambda self: self.scan_on)
    @rule()
    def scan(self) -> None:
        """The folder has been read."""
        assert self.scan_on
        self.scan_on.set()
        self.scan_on = None
        assert self.backend._scanned.wait(WAIT_S)
        self.model_read()

    # -- what always holds ------------------------------------------------------------

    @invariant()
    def it_knows_what_is_there(self) -> None:
        """The index, or while that is made the disk, says what there is."""
        contained = self.tier.contains([key_of(number) for number in NUMBERS]).result()
        known = self.disk if self.scan_on else self.known
        assert contained == [number in known for number in NUMBERS]

    @invariant()
    def the_bound_holds(self) -> None:
        """On the disk are the files of the model, and no more bytes than may be."""
        for number in NUMBERS:
            path, kept = self.path(number), self.disk.get(number)
            assert path.is_file() == (kept is not None)
            assert kept is None or path.stat().st_size == kept.size
        if not self.scan_on:
            assert self.backend._index.used_bytes == sum(self.known.values())
            assert sum(kept.size for kept in self.disk.values()) <= self.max_bytes
            assert not [*(self.folder / "tier" / "incoming").iterdir()]

    def teardown(self) -> None:
        """A tier closes in whatever state."""
        if self.scan_on:
            self.scan_on.set()
        self.tier.close()
        shutil.rmtree(self.folder)


_name = str(key_of(0))
LINKS = [f"ff/{'ff' * 32}{_name[64:]}"]
FOREIGN = [
    *LINKS,
    "notes",
    "a0/notes",
    "incoming/12-3",
    "fe",
    f"fd/{_name}",
]
"""A link to nowhere, other files, one half written, one in a folder's place, a part in
another's folder."""

TestFileMachine = FileMachine.TestCase
TestFileMachine.__doc__ = """A load gives the right bytes or none, within the bound."""
TestFileMachine.settings = settings(stateful_step_count=40)
