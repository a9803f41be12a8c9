"""Named shared memory: how processes of one host see the same bytes.

`os.open` and `mmap`, not `multiprocessing.shared_memory`, whose tracker unlinks what
other processes still use.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvcore.errors import Closed, HandleError, SetupError

SHM_DIR = Path("/dev/shm")
SEGMENT_PREFIX = "kvcore-"
"""A server's own begin so, its process id next; `remove_dead` looks for them."""
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_MAX_NAME = 255
# O_NONBLOCK: a FIFO that someone put there must not stop us.
_OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_CREATE_ATTEMPTS = 8
_MAX_TOUCH_THREADS = 16
_MADV_POPULATE_WRITE = 23  # madvise(2)
POPULATE_BYTES = 64 << 20
"""Mapped in one go: some 6 ms, in which others fault slowly."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Segment:
    """A named POSIX shared-memory object, or a range of one, mapped read and write.

    Whoever creates a segment owns it: it holds an flock on the object for as long as
    it is mapped there, which is how `remove_dead` tells a dead owner's segment from a
    living one's, in whatever pid namespace the owner ran. A forked child that
    inherits the descriptor counts as the owner.

    The object must not shrink while it is mapped: touching what was cut off ends the
    process with SIGBUS. `check_pages` finds that out before a copy, except for a
    process that truncates it during the copy.
    """

    def __init__(
        self,
        name: str,
        mapping: mmap.mmap,
        array: Bytes,
        lock: int | None,
        end: int = 0,
    ) -> None:
        self.name = name
        self._mapping: mmap.mmap | None = mapping
        self._array: Bytes | None = array
        self._lock = lock
        self._linked = lock is not None
        self.num_bytes = array.nbytes
        self._end = end or array.nbytes
        self._is_populated = lock is not None

    @classmethod
    def create(cls, name: str, num_bytes: int, *, touch: bool) -> Segment:
        """Create a segment of this user alone (mode 0600) and own it.

        With `touch` every page is there at return; the first touch of fresh memory
        is some eight times slower than a copy into warm memory.

        Raises:
            SetupError: the name is taken, or there is no room for `num_bytes`.
            HandleError: not a name of a segment.
        """
        path = _path(name)
        if num_bytes <= 0:
            raise SetupError(f"a segment of {num_bytes} bytes cannot be made")
        _require_room(name, num_bytes, touch)
        fd = _create_locked(path)
        try:
            os.ftruncate(fd, num_bytes)
            mapping = mmap.mmap(fd, num_bytes)
            if touch:
                _touch(mapping, fd)
        except OSError as error:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise SetupError(
                f"cannot make {num_bytes:,} bytes of shared memory {name!r}: "
                f"{error.strerror}; make it smaller or /dev/shm larger"
            ) from error
        return cls(name, mapping, np.frombuffer(mapping, np.uint8), fd)

    @classmethod
    def adopt(cls, name: str, num_bytes: int) -> Segment | None:
        """Own a segment that its owner left, with every page touched.

        One of another size is removed. None when there is none of this name and size.

        Raises:
            SetupError: its owner lives, it cannot be opened, or there is no room.
            HandleError: not a name of a segment.
        """
        path = _path(name)
        try:
            fd = os.open(path, os.O_RDWR | _OPEN_FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SetupError(f"shared memory {path}: {error.strerror}") from error
        try:
            if not _try_lock(fd):
                raise SetupError(f"shared memory {path} is another server's, who lives")
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
                path.unlink()
                os.close(fd)
                return None
            mapping = mmap.mmap(fd, num_bytes)
            # Its last owner may have been killed before it had touched every page.
            _touch(mapping, fd)
        except OSError as error:
            os.close(fd)
            raise SetupError(
                f"cannot use {num_bytes:,} bytes of shared memory {name!r}: "
                f"{error.strerror}; make /dev/shm larger or remove {path}"
            ) from error
        except BaseException:
            os.close(fd)
            raise
        return cls(name, mapping, np.frombuffer(mapping, np.uint8), fd)

    @classmethod
    def attach(cls, name: str, *, offset: int, length: int) -> Segment:
        """Map `length` bytes from `offset` of a segment that another process made.

        Raises:
            HandleError: no such segment, not one of ours to open, or smaller than
                `offset + length`.
        """
        path = _path(name)
        if offset < 0 or length <= 0:
            raise HandleError(
                f"segment {name!r}: no range has offset {offset} and length {length}"
            )
        fd = _open_existing(path)
        try:
            _check_size(name, os.fstat(fd), offset + length)
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            mapping = mmap.mmap(fd, offset - start + length, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            raise HandleError(f"segment {name!r} cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        array = np.frombuffer(mapping, np.uint8, count=length, offset=offset - start)
        return cls(name, mapping, array, None, offset + length)

    def check_pages(self) -> None:
        """Check that every page of the range is there, so that a copy can touch it.

        The first call populates the pages, at 0.1 to 0.2 s per GiB; later ones compare
        sizes.

        Raises:
            HandleError: the object has shrunk, or there is no room for its pages.
        """
        mapping = self._mapping
        if mapping is None:
            return
        size = mapping.size()
        if size < self._end:
            raise HandleError(
                f"segment {self.name!r} has shrunk to {size:,} bytes; {self._end:,} "
                "were registered"
            )
        if not self._is_populated:
            try:
                _raise_if_full([_populate(self.array, 0, self.num_bytes)])
            except OSError as error:
                raise HandleError(
                    f"segment {self.name!r}: its {self.num_bytes:,} bytes cannot all "
                    f"be used: {error.strerror}; /dev/shm is full, or it has shrunk"
                ) from error
            self._is_populated = True

    @property
    def array(self) -> Bytes:
        """The mapped range, `[num_bytes]`; raises `Closed` after `close`."""
        if self._array is None:
            raise Closed(f"segment {self.name!r} is closed")
        return self._array

    def close(self) -> None:
        """Release the memory and the ownership; the name stays.

        Views of the array that are still about keep the mapping (never dangling), and
        with it the ownership; it goes with the last of them.
        """
        self._array = None
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with suppress(BufferError):  # A view lives: the last one unmaps.
                mapping.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def unlink(self) -> None:
        """Remove the name if this is the owner: no process can attach afterwards.

        Does nothing on an attached segment. Who has mapped it keeps the memory.
        """
        if self._linked:
            self._linked = False
            _path(self.name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unlink()
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._array is None else "mapped"
        return f"<Segment {self.name} {self.num_bytes} bytes {state}>"


class Claim:
    """A segment that another library made and mapped here, under a name of ours.

    Maps nothing; holds the lock that tells `remove_dead` of a living owner.
    """

    def __init__(self, made_as: str, name: str) -> None:
        """Rename the segment and own it.

        Raises:
            HandleError: not names of segments, or no such segment.
        """
        self.name = name
        path, ours = _path(made_as), _path(name)
        self._fd = _open_existing(path)
        try:
            # Before it has a name that `remove_dead` looks at.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.rename(ours)
        except OSError as error:
            os.close(self._fd)
            raise HandleError(f"segment {made_as!r}: {error.strerror}") from error
        self._is_held = True

    def __repr__(self) -> str:
        return f"<Claim {self.name} {'held' if self._is_held else 'released'}>"

    @property
    def fd(self) -> int:
        """Descriptor of the whole segment, open to read and write until `release`."""
        return self._fd

    def release(self) -> None:
        """Remove the name; who has mapped the segment keeps the memory. Idempotent."""
        if self._is_held:
            self._is_held = False
            _path(self.name).unlink(missing_ok=True)
            os.close(self._fd)


def remove_dead(prefix: str) -> list[str]:
    """Unlink the segments called `prefix...` whose owner is gone; return their names.

    Safe beside living owners and beside others who call it: a name is removed only
    while we hold the lock that its owner would hold.
    """
    names = sorted(name for name in os.listdir(SHM_DIR) if name.startswith(prefix))
    return [name for name in names if _NAME.fullmatch(name) and _remove_if_dead(name)]


def _remove_if_dead(name: str) -> bool:
    path = SHM_DIR / name
    try:
        fd = os.open(path, os.O_RDONLY | _OPEN_FLAGS)
    except OSError:
        return False  # Gone by now, or another user's.
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or not _try_lock(fd):
            return False
        if os.fstat(fd).st_nlink == 0:
            return False  # The name went while we opened: it may be another's now.
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _create_locked(path: Path) -> int:
    """Create the file and lock it, as often as `remove_dead` comes in between."""
    for _ in range(_MAX_CREATE_ATTEMPTS):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)
        except OSError as error:
            raise SetupError(
                f"cannot create shared memory {path}: {error.strerror}"
            ) from error
        # Who holds the new file's lock took it for a dead owner's and is about to
        # remove it: wait for that, and begin anew.
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink > 0:
            return fd
        os.close(fd)
    raise SetupError(f"shared memory {path} is removed as soon as it is created")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _path(name: str) -> Path:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise HandleError(
            f"{name[:64]!r} is no segment name: letters, digits, '.', '_' and '-', "
            "not beginning with '.'"
        )
    return SHM_DIR / name


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | _OPEN_FLAGS)
    except FileNotFoundError:
        raise HandleError(
            f"no segment {path.name!r} in {SHM_DIR}: it is gone, or belongs to "
            "another ipc namespace or mount"
        ) from None
    except OSError as error:
        raise HandleError(
            f"segment {path.name!r} cannot be opened: {error.strerror}"
        ) from error


def _check_size(name: str, status: os.stat_result, end: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise HandleError(f"{name!r} is not a shared-memory segment")
    if status.st_size < end:
        raise HandleError(
            f"segment {name!r} has {status.st_size:,} bytes; the handle claims {end:,}",
            size=status.st_size,
            claimed=end,
        )


def populate(mapped: Bytes, go_on: Callable[[], bool]) -> None:
    """Map every page into this process, a piece at a time, while `go_on()`.

    Without it each page costs a fault when it is first copied to or from. For a thread
    of its own: some 0.1 s per GiB, without the interpreter's lock.
    """
    for offset in range(0, mapped.nbytes, POPULATE_BYTES):
        if not go_on() or _populate(mapped, offset, POPULATE_BYTES):
            return  # Refused by Linux before 5.14: then it is fault by fault.


def _populate(mapped: Bytes, offset: int, size: int) -> int:
    """Map the pages of a range, allocating them; return the error number or 0.

    It answers EFAULT where a write would raise SIGBUS, and releases the interpreter's
    lock.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = mapped.ctypes.data + offset
    size = min(size, mapped.nbytes - offset) + start % mmap.PAGESIZE
    start -= start % mmap.PAGESIZE
    failed = madvise(start, size, _MADV_POPULATE_WRITE)
    return ctypes.get_errno() if failed else 0


def _raise_if_full(errors: Iterable[int]) -> None:
    """Raise `OSError` if pages could not be allocated."""
    for number in errors:
        if number not in (0, errno.EINVAL):
            is_full = number in (errno.EFAULT, errno.ENOMEM)
            number = errno.ENOSPC if is_full else number
            raise OSError(number, os.strerror(number))


def _touch(mapping: mmap.mmap, fd: int) -> None:
    """Allocate every page, by as many threads as help: 1 GiB in 0.3 s with two.

    Populating came with Linux 5.14; before, one thread allocates.

    Raises:
        OSError: there is no room.
    """
    num_threads = min(os.cpu_count() or 1, _MAX_TOUCH_THREADS)
    step = -(-len(mapping) // num_threads)
    step += -step % mmap.ALLOCATIONGRANULARITY
    array = np.frombuffer(mapping, np.uint8)
    offsets = range(0, len(mapping), step)
    with ThreadPoolExecutor(num_threads) as threads:
        errors = [*threads.map(lambda offset: _populate(array, offset, step), offsets)]
    _raise_if_full(errors)
    if errno.EINVAL in errors:
        os.posix_fallocate(fd, 0, len(mapping))


@dataclass(frozen=True, slots=True)
class _FreeSpace:
    place: str
    num_bytes: int
    advice: str


def _require_room(name: str, num_bytes: int, touch: bool) -> None:
    for room in _rooms(touch):
        if num_bytes > room.num_bytes:
            raise SetupError(
                f"shared memory {name!r} wants {num_bytes:,} bytes; {room.place} has "
                f"{room.num_bytes:,}: make it smaller or {room.advice}"
            )


def _rooms(touch: bool) -> Iterator[_FreeSpace]:
    shm = os.statvfs(SHM_DIR)
    yield _FreeSpace(
        "/dev/shm",
        shm.f_bavail * shm.f_frsize,
        "enlarge /dev/shm (a container: --shm-size or --ipc=host)",
    )
    if not touch:
        return
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            yield _FreeSpace("the machine's free memory", free, "free some memory")
    if _CGROUP_LIMIT.exists():
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit.isdigit():
            yield _FreeSpace("the container", int(limit), "raise its memory limit")
