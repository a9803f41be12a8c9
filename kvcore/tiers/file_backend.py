"""One local directory: a file per part, renamed when complete, with an LRU bound.

Files are not synced: after a power failure some may be truncated, which their length,
header or checksum shows. After a restart the order of use is that of modification.
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
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import SplitResult, unquote

from kvcore.errors import BadRequest, DeadlineExceeded, SetupError, Unavailable
from kvcore.option_structs import ByteSize
from kvcore.tiers.direct_io import (
    file_bytes,
    read_record,
    supports_direct_io,
    write_record,
)
from kvcore.tiers.tier import (
    MISSING,
    REJECTED,
    Backend,
    Deadline,
    LoadItem,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    Usage,
)
from kvcore.tiers.tier_url import TierOptions, register_tier

log = logging.getLogger(__name__)

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_OBSTRUCTED = {
    errno.EACCES,
    errno.EEXIST,
    errno.EINVAL,  # From O_DIRECT of a folder.
    errno.EISDIR,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
    errno.EXDEV,
}
"""Errors when something foreign is in the place of a part or of its folder."""
_INCOMING = "incoming"
"""Folder of incomplete files."""


class FileOptions(TierOptions, frozen=True):
    """Options of `file:///DIRECTORY`."""

    max: ByteSize | None = None
    """Bound of the directory; without it the disk is the bound."""


class FileBackend(Backend):
    """`Backend` over a directory, which it creates and locks.

    It opens the directory at the first call and lists it in the background: until then
    queries go to the disk, and stores wait.
    """

    def __init__(self, directory: Path, max_bytes: int | None) -> None:
        self._directory = directory
        self._index = FileIndex(max_bytes)
        self._lock = threading.Lock()
        self._lock_fd: int | None = None
        self._lock_file = os.stat_result([0] * 10)
        self._direct = False
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._scanned = threading.Event()
        self._scan: threading.Thread | None = None
        self._reported: set[str] = set()
        """Folders whose obstruction was logged."""

    @property
    def num_evicted(self) -> int:
        """See `Backend.num_evicted`."""
        return self._index.num_evicted

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Search the index, and the disk until the index is complete."""
        self._open(deadline)
        if self._scanned.is_set():
            return [str(key) in self._index for key in keys]
        return [os.path.exists(self._path(str(key))) for key in keys]

    def load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Read directly into the items' buffers."""
        self._open(deadline)
        for item in items:
            yield self._load(item, deadline)

    def store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Evict what the bound requires, write to another name, rename."""
        self._open(deadline)
        if not self._scanned.wait(deadline.remaining()):
            raise DeadlineExceeded(f"{self._directory} is still being read")
        for item in items:
            yield self._store(item, deadline)

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Remove files, whether the index has them or not."""
        self._open(deadline)
        names = [str(key) for key in keys]
        known = [self._index.remove(name) for name in names]
        self._unlink(names)
        return sum(known)

    def usage(self, deadline: Deadline) -> Usage:
        """Return the bytes of the files known so far."""
        self._open(deadline)
        self._check_directory()
        return Usage(self._index.used_bytes, self._index.max_bytes)

    def close(self) -> None:
        """Release the directory's lock."""
        if self._scan is not None:
            self._scan.join()
        self._unlock()

    # -- one part -----------------------------------------------------------------

    def _load(self, item: LoadItem, deadline: Deadline) -> LoadResult:
        name = str(item.key)
        path = self._path(name)
        try:
            result = read_record(path, item, deadline, direct=self._direct)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._skip_obstruction(name, error)
            self._index.remove(name)
            return MISSING
        if result is not REJECTED:
            self._index.touch(name)
        return result

    def _store(self, item: StoreItem, deadline: Deadline) -> StoreResult:
        name = str(item.key)
        if name in self._index:
            return StoreResult.PRESENT
        size = file_bytes(item.num_bytes)
        evicted = self._index.reserve(size)
        if evicted is None:
            return StoreResult.FULL
        self._unlink(evicted)
        try:
            self._write(name, item, deadline)
        except OSError as error:
            self._index.release(size)
            if error.errno not in _NO_SPACE:
                self._skip_obstruction(name, error)
                return StoreResult.FAILED
            # The disk is smaller than the bound, or others fill it: free some.
            self._unlink(self._index.shrink(size))
            return StoreResult.FULL
        except DeadlineExceeded:
            self._index.release(size)
            raise
        self._index.add(name, size)
        return StoreResult.DONE

    def _write(self, name: str, item: StoreItem, deadline: Deadline) -> None:
        incoming = self._directory / _INCOMING / f"{self._run}-{next(self._numbers)}"
        try:
            write_record(incoming, item, deadline, direct=self._direct)
            path = self._path(name)
            try:
                incoming.rename(path)
            except FileNotFoundError:
                path.parent.mkdir(exist_ok=True)  # Another thread may create it, too.
                incoming.rename(path)
        except BaseException:
            incoming.unlink(missing_ok=True)
            raise

    def _unlink(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._path(name).unlink(missing_ok=True)
            except OSError as error:
                self._skip_obstruction(name, error)

    def _skip_obstruction(self, name: str, error: OSError) -> None:
        """Log once per folder that a part is skipped; raise for other errors."""
        if error.errno not in _OBSTRUCTED:
            raise self._failure(error) from error
        self._check_directory()
        folder = name[:2]
        if folder not in self._reported:
            self._reported.add(folder)
            log.warning("%s: parts are skipped: %s", self._directory, error)

    def _path(self, name: str) -> Path:
        return self._directory / name[:2] / name

    # -- the directory ------------------------------------------------------------

    def _open(self, deadline: Deadline) -> None:
        """Lock the directory and start to list it, unless that is done."""
        with self._lock:
            if self._lock_fd is not None:
                return
            if self._scan is not None:
                self._scan.join(deadline.remaining())
                if self._scan.is_alive():
                    raise DeadlineExceeded(f"{self._directory} is still being read")
            incoming = self._directory / _INCOMING
            try:
                incoming.mkdir(parents=True, exist_ok=True)
                self._lock_fd = self._lock_directory()
                self._direct = supports_direct_io(incoming)
            except OSError as error:
                self._unlock()
                place = error.filename or self._directory
                raise Unavailable(f"{place}: {error.strerror}") from error
            self._index.clear()
            self._scanned.clear()
            self._scan = threading.Thread(target=self._list_files, daemon=True)
            self._scan.start()

    def _lock_directory(self) -> int:
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
        fd = os.open(self._lock_path, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise Unavailable(
                f"{self._directory} is used by another server: give each its own"
            ) from error
        self._lock_file = os.fstat(fd)
        return fd

    @property
    def _lock_path(self) -> Path:
        return self._directory / ".lock"

    def _check_directory(self) -> None:
        """Raise `Unavailable` if the directory is not the one that was opened."""
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
        """Translate an error, and have the next call open the directory again."""
        with self._lock:
            self._unlock()
        return Unavailable(f"{self._directory}: {error.strerror}")

    def _list_files(self) -> None:
        """Add the files of an earlier server to the index; remove incomplete ones."""
        try:
            for path in (self._directory / _INCOMING).iterdir():
                if not path.name.startswith(self._run):
                    with suppress(OSError):  # A folder, for example: not from here.
                        path.unlink()
            files = sorted(_parts_under(self._directory), reverse=True)
            evicted = self._index.add_old((name, size) for _, name, size in files)
            self._unlink(evicted)
        except (OSError, Unavailable):
            self._index.add_old(())  # The next call meets the same error, and fails.
        finally:
            self._scanned.set()


def _parts_under(directory: Path) -> Iterator[tuple[float, str, int]]:
    """Yield each part's modification time, name and size.

    Foreign files, and those that vanish or cannot be read, are skipped.
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
    with suppress(BadRequest):
        PartKey.parse(name)
        return name.startswith(folder)
    return False


class FileIndex:
    """Names and sizes of files by last use, and reservations of incomplete files.

    Thread-safe. Reservations count as used, so the bound always holds.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.num_evicted = 0
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used = 0
        self._reserved = 0
        """Of the used bytes."""
        self._removed: set[str] | None = None
        """While old files are listed: names removed since `clear`."""

    @property
    def used_bytes(self) -> int:
        """Bytes of known files and reservations."""
        return self._used

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def touch(self, name: str) -> None:
        """Make a file the most recently used."""
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)

    def add_old(self, files: Iterable[tuple[str, int]]) -> tuple[str, ...]:
        """Add files, latest used first, as older than all known; return evicted names.

        Names removed since `clear` are not added.
        """
        with self._lock:
            removed, self._removed = self._removed or (), None
            for name, size in files:
                if name not in self._sizes and name not in removed:
                    self._sizes[name] = size
                    self._sizes.move_to_end(name, last=False)
                    self._used += size
            return self._evict()

    def reserve(self, size: int) -> tuple[str, ...] | None:
        """Reserve space for a file to be written; return evicted names.

        None, and nothing is reserved, if other reservations leave too little space.
        The caller unlinks what was evicted.
        """
        with self._lock:
            if self.max_bytes is not None and self._reserved + size > self.max_bytes:
                return None
            self._used += size
            self._reserved += size
            return self._evict()

    def add(self, name: str, size: int) -> None:
        """Turn a reservation into the most recently used file."""
        with self._lock:
            self._reserved -= size
            self._used -= self._sizes.pop(name, 0)
            self._sizes[name] = size

    def release(self, size: int) -> None:
        """End a reservation without a file."""
        with self._lock:
            self._reserved -= size
            self._used -= size

    def remove(self, name: str) -> bool:
        """Remove a file; return whether it was known."""
        with self._lock:
            size = self._sizes.pop(name, None)
            self._used -= size or 0
            if self._removed is not None:
                self._removed.add(name)
            return size is not None

    def shrink(self, num_bytes: int) -> tuple[str, ...]:
        """Remove at least `num_bytes` of the least recently used files."""
        with self._lock:
            return self._evict(self._used - num_bytes)

    def clear(self) -> None:
        """Remove all files, before a listing; reservations stay."""
        with self._lock:
            self._removed = set()
            self._used -= sum(self._sizes.values())
            self._sizes.clear()

    def _evict(self, bound: int | None = None) -> tuple[str, ...]:
        """Remove files until `bound` is met; by default that of the directory."""
        if bound is None:
            bound = self._used if self.max_bytes is None else self.max_bytes
        evicted = []
        while self._used > bound and self._sizes:
            name, size = self._sizes.popitem(last=False)
            self._used -= size
            evicted.append(name)
        self.num_evicted += len(evicted)
        return tuple(evicted)


def open_file(url: SplitResult, options: FileOptions) -> FileBackend:
    """Open `file:///DIRECTORY`; raises `SetupError`."""
    if url.netloc or not url.path.strip("/"):
        raise SetupError("must read file:///DIRECTORY")
    return FileBackend(Path(unquote(url.path)), options.max)


register_tier("file", open_file, FileOptions)
