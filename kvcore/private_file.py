"""Files that only this user may read and write, in folders that others may share."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_private(path: Path, flags: int) -> int:
    """Open a file, or create it with O_CREAT, and set its mode to 0600.

    The mode does not depend on the umask. Symbolic links are refused: in a shared
    folder, another user may have created them. Files that are not regular, such as a
    FIFO, keep their mode. Returns a descriptor that the caller closes.

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
                # Only now: setting the mode fails for another user's file.
                os.ftruncate(file, 0)
    except OSError:
        os.close(file)
        raise
    return file
