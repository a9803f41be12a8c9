"""Identity of a process: its pid, start time and pid namespace."""

from __future__ import annotations

from pathlib import Path

from kvcore.errors import SetupError


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it is gone.

    Field 22 of /proc/PID/stat (proc(5)); the name in field 2 may hold spaces.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def pid_namespace() -> int:
    """Return the inode that names this process's pid namespace."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError as error:
        raise SetupError(f"/proc/self/ns/pid: {error.strerror}") from None
