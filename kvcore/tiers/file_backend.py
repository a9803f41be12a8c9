"""One local directory: a file a part, written aside and renamed, bounded, LRU.

Files are not synced: after a power cut some may be cut off or empty, which their
length, header or checksum shows. The order of use survives a restart only as the
order in which files were written.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from kvcore.errors import BadRequest, DeadlineExceeded, Unavailable
from kvcore.shm import Bytes
from kvcore.tiers.backend import Deadline, Usage
from kvcore.tiers.direct_io import (
    Mode,
    file_bytes,
    probe,
    read_record,
    write_record,
)
from kvcore.tiers.file_index import FileIndex
from kvcore.tiers.tier import (
    MISSING,
    REJECTED,
    LoadItem,
    LoadOutcome,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    num_bytes_of,
)

log = logging.getLogger(__name__)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_IN_THE_WAY = {
    errno.EACCES,
    errno.EEXIST,
    errno.EINVAL,  # What O_DIRECT gets of a folder.
    errno.EISDIR,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
    errno.EXDEV,
}
"""What is said where something foreign stands in a part's place, or its folder's."""
_INCOMING = "incoming"
"""Folder of files that are being written."""


class FileBackend:
    """`Backend` over a directory, which it makes and which it alone uses.

    It opens the directory when first asked, and reads what is there in the background:
    meanwhile the disk is asked what is there, and stores wait.
    """

    batch = 1

    def __init__(self, directory: Path, max_bytes: int | None) -> None:
        self._directory = directory
        self._index = FileIndex(max_bytes)
        self._lock = threading.Lock()
        self._lock_fd: int | None = None
        self._lock_file = os.stat_result([0] * 10)
        self._mode = Mode.BUFFERED
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._scanned = threading.Event()
        self._scan: threading.Thread | None = None
        self._passed_over: set[str] = set()
        """Folders of which it was said that something is in the way there."""

    def attach(self, name: str, arena: Bytes) -> None:
        """Nothing to do: any page-aligned memory will do."""

    @property
    def num_evicted(self) -> int:
        """See `Backend.num_evicted`."""
        return self._index.num_evicted

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Look into the index, and before that is complete onto the disk."""
        self._open(deadline)
        if self._scanned.is_set():
            return [str(key) in self._index for key in keys]
        return [os.path.exists(self._path(str(key))) for key in keys]

    def load(
        self, slots: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Read straight into the slots."""
        self._open(deadline)
        for slot in slots:
            yield self._load(slot, deadline)

    def store(
        self, blobs: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Write beside, rename, evict what is then too much."""
        self._open(deadline)
        if not self._scanned.wait(deadline.left()):
            raise DeadlineExceeded(f"{self._directory} is still being read")
        for blob in blobs:
            yield self._store(blob, deadline)

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Remove files, whether the index knows them or not."""
        self._open(deadline)
        return sum(self._remove(str(key)) for key in keys)

    def usage(self, deadline: Deadline) -> Usage:
        """Bytes of the files known so far, while the directory is there."""
        self._open(deadline)
        self._look()
        return Usage(self._index.used_bytes, self._index.max_bytes)

    def close(self) -> None:
        """Leave the directory to the next."""
        if self._scan is not None:
            self._scan.join()
        self._unlock()

    # -- one part -----------------------------------------------------------------

    def _load(self, slot: LoadItem, deadline: Deadline) -> LoadResult:
        name = str(slot.key)
        try:
            checksum = read_record(self._path(name), slot, self._mode, deadline)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._pass_over(name, error)
            self._index.remove(name)
            return MISSING
        if checksum is None:
            return REJECTED
        self._index.touch(name)
        return LoadResult(LoadOutcome.DONE, checksum)

    def _store(self, blob: StoreItem, deadline: Deadline) -> StoreResult:
        name = str(blob.key)
        if name in self._index:
            return StoreResult.PRESENT
        size = file_bytes(num_bytes_of(blob.buffers))
        room = self._index.claim(size)
        self._unlink(room.evicted)
        if not room.granted:
            return StoreResult.FULL
        try:
            self._write(name, blob, deadline)
        except OSError as error:
            self._index.release(size)
            if error.errno not in _NO_ROOM:
                self._pass_over(name, error)
                return StoreResult.FAILED
            # The disk is smaller than the bound, or others fill it: give some back.
            self._unlink(self._index.shrink(size))
            return StoreResult.FULL
        except DeadlineExceeded:
            self._index.release(size)
            raise
        self._index.settle(name, size)
        return StoreResult.DONE

    def _write(self, name: str, blob: StoreItem, deadline: Deadline) -> None:
        aside = self._directory / _INCOMING / f"{self._run}-{next(self._numbers)}"
        try:
            write_record(aside, blob, self._mode, deadline)
            path = self._path(name)
            try:
                aside.rename(path)
            except FileNotFoundError:
                path.parent.mkdir(exist_ok=True)  # Another thread may be here.
                aside.rename(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def _remove(self, name: str) -> bool:
        known = self._index.remove(name)
        self._unlink([name])
        return known

    def _unlink(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._path(name).unlink(missing_ok=True)
            except OSError as error:
                self._pass_over(name, error)

    def _pass_over(self, name: str, error: OSError) -> None:
        """Do without a part whose place is taken; raises for what is worse."""
        if error.errno not in _IN_THE_WAY:
            raise self._failure(error) from error
        self._look()
        folder = name[:2]
        if folder not in self._passed_over:
            self._passed_over.add(folder)
            log.warning("%s: parts are passed over: %s", self._directory, error)

    def _path(self, name: str) -> Path:
        return self._directory / name[:2] / name

    # -- the directory ------------------------------------------------------------

    def _open(self, deadline: Deadline) -> None:
        """Take the directory and have it read, unless that is done."""
        with self._lock:
            if self._lock_fd is not None:
                return
            if self._scan is not None:
                self._scan.join(deadline.left())
                if self._scan.is_alive():
                    raise DeadlineExceeded(f"{self._directory} is still being read")
            incoming = self._directory / _INCOMING
            try:
                incoming.mkdir(parents=True, exist_ok=True)
                self._lock_fd = self._take()
                self._mode = probe(incoming)
            except OSError as error:
                self._unlock()
                place = error.filename or self._directory
                raise Unavailable(f"{place}: {error.strerror}") from error
            self._index.clear()
            self._scanned.clear()
            self._scan = threading.Thread(target=self._read_names, daemon=True)
            self._scan.start()

    def _take(self) -> int:
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
        fd = os.open(self._lock_path, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise Unavailable(
                f"{self._directory} is another server's: give each its own"
            ) from error
        self._lock_file = os.fstat(fd)
        return fd

    @property
    def _lock_path(self) -> Path:
        return self._directory / ".lock"

    def _look(self) -> None:
        """Raise `Unavailable` when the directory is not the one that was opened."""
        try:
            if not os.path.samestat(self._lock_path.stat(), self._lock_file):
                raise OSError(errno.ESTALE, "another directory is in its place")
        except OSError as error:
            raise self._failure(error) from error

    def _unlock(self) -> None:
        fd, self._lock_fd = self._lock_fd, None
        if fd is not None:
            os.close(fd)

    def _failure(self, error: OSError) -> Unavailable:
        """Translate an error, and open the directory anew next time."""
        with self._lock:
            self._unlock()
        return Unavailable(f"{self._directory}: {error.strerror}")

    def _read_names(self) -> None:
        """Fill the index with what an earlier server left."""
        try:
            for path in (self._directory / _INCOMING).iterdir():
                if not path.name.startswith(self._run):
                    with suppress(OSError):  # A folder, say, which is nobody's of ours.
                        path.unlink()
            files = sorted(_parts_under(self._directory), reverse=True)
            evicted = self._index.add_old((name, size) for _, name, size in files)
            self._unlink(evicted)
        except (OSError, Unavailable):
            self._index.add_old(())  # Whoever asks next meets the same, and tells.
        finally:
            self._scanned.set()


def _parts_under(directory: Path) -> Iterator[tuple[float, str, int]]:
    """Yield when each part was written, its name and its size.

    What is no part, goes meanwhile or cannot be read is passed over.
    """
    for folder in directory.glob("[0-9a-f][0-9a-f]"):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if not _is_part(entry.name, folder.name):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield status.st_mtime, entry.name, status.st_size


def _is_part(name: str, folder: str) -> bool:
    try:
        PartKey.parse(name)
    except BadRequest:
        return False
    return name.startswith(folder)
