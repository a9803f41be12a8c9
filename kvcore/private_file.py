"""Files that only this user may read and write, in folders that others may share."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_private(path: Path, flags: int) -> int:
    """Open a file, or create it with O_CREAT, and set its mode to 0600.

    The umask does not matter. A symbolic link is refused: in a shared folder another
    user may have put it there. What is not a regular file, a FIFO for one, keeps its
    mode. Returns a descriptor.

    Raises:
        OSError: the path is a symbolic link or another user's file, or cannot be
            opened.
    """
    truncate = flags & os.O_TRUNC
    flags = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(
                errno.ELOOP, "a symbolic link is not followed; name the file itself"
            ) from None
        raise
    try:
        if stat.S_ISREG(os.fstat(file).st_mode):
            os.fchmod(file, 0o600)
            if truncate:
                # Not before the mode could be set: the file is this user's own.
                os.ftruncate(file, 0)
    except OSError:
        os.close(file)
        raise
    return file
